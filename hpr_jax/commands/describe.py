"""Tells what a detector costs, without data or a device: parameters, FLOPs, shapes, memory; or what it takes on a GPU.

examples:
  python -m hpr_jax.main describe --config configs/ddq.py:r50_1x
  python -m hpr_jax.main describe --config configs/ddq.py:r50_1x --compile-for h100 --config.compute.dtype=bfloat16
  python -m hpr_jax.main describe --workdir runs/mine --measure

With --compile-for, XLA compiles inference and a training step for a GPU that this machine need not have, and the tables tell
what the programs launch, move, multiply and hold there, part by part. That needs the extra gpu-compiler (Linux). With
--measure, the detector runs on this machine.
"""

import os
from argparse import Namespace

from hpr_jax.commands.arguments import CommandParser, Overrides, add_checkpoint, add_config, image_size
from hpr_jax.commands.start import start
from hpr_jax.config import load_config
from hpr_jax.errors import UserError
from hpr_jax.settings import check

# The cards that programs can be compiled for: the keys of `hpr_jax.analysis.gpu_compiler.CARDS`.
CARDS = ("h100", "a100")


def add_arguments(parser: CommandParser) -> None:
    add_config(parser, "the detector to describe")
    add_checkpoint(parser)
    parser.add_argument("--classes", type=int, default=80, help="classes of a config's detector (default 80)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--compile-for", choices=CARDS, help="compile for this GPU, and tell what the programs do there")
    instead.add_argument(
        "--measure", action="store_true", help="run the detector here, and print latency, throughput and memory"
    )
    compiled = parser.add_argument_group("with --compile-for")
    compiled.add_argument("--images", type=int, metavar="N", help="images of a batch (default 1)")
    compiled.add_argument("--size", metavar="HxW", help="size of the images (default: the largest that is evaluated)")
    compiled.add_argument("--objects", type=int, metavar="N", help="room for true boxes in each view (default 20)")
    compiled.add_argument("--rows", type=int, metavar="N", help="rows of each table (default 12)")


def run(arguments: Namespace, overrides: Overrides) -> None:
    """Describes as the arguments say.

    Raises:
      UserError: the command cannot be carried out.
    """
    if not (arguments.config or arguments.workdir or arguments.checkpoint):
        raise UserError("Describing needs --config FILE.py[:VARIANT], or a checkpoint's --workdir or --checkpoint DIR.")
    for name in ("classes", "images", "objects", "rows"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise UserError(f"--{name} is {number}; it must be at least 1.")
        if name != "classes" and number is not None and not arguments.compile_for:
            raise UserError(f"--{name} is for --compile-for {'|'.join(CARDS)}; add that, or leave it out.")
    if arguments.size and not arguments.compile_for:
        raise UserError(f"--size is for --compile-for {'|'.join(CARDS)}; add that, or leave it out.")
    size = image_size(arguments.size) if arguments.size else None
    config = load_config(arguments.config, overrides) if arguments.config else None
    if config is not None:
        check(config)
    if arguments.compile_for:
        # XLA would warn about what it cannot know without the card, and about slow machines.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Programs for a GPU are compiled on the CPU, also where there is a GPU.
    start(platform="cpu" if arguments.compile_for else None)
    from hpr_jax.analysis.describe import Subject, describe

    # With a config, --workdir alone does not mean its checkpoint: the config describes a run that has not begun yet.
    checkpoint = arguments.checkpoint or (None if config is not None else arguments.workdir)
    subject = Subject(config, arguments.classes, checkpoint, overrides)
    if arguments.compile_for:
        from hpr_jax.analysis.describe_compiled import Case, describe_compiled

        case = Case(size, arguments.images or 1, arguments.objects or 20)
        describe_compiled(subject, arguments.compile_for, case, arguments.rows or 12)
    elif arguments.measure:
        from hpr_jax.analysis.measure import measure

        measure(subject)
    else:
        describe(subject)

"""Tells what a detector costs, without data or a device: parameters, FLOPs, shapes, memory.

example:
  python -m hpr_jax.main describe --config configs/ddq.py:r50_1x
"""

from argparse import Namespace

from hpr_jax.commands.arguments import CommandParser, Overrides, add_checkpoint, add_config
from hpr_jax.commands.start import start
from hpr_jax.config import load_config
from hpr_jax.errors import UserError
from hpr_jax.settings import check


def add_arguments(parser: CommandParser) -> None:
    add_config(parser, "the detector to describe")
    add_checkpoint(parser)
    parser.add_argument("--classes", type=int, default=80, help="classes of a config's detector (default 80)")


def run(arguments: Namespace, overrides: Overrides) -> None:
    """Describes as the arguments say.

    Raises:
      UserError: the command cannot be carried out.
    """
    if not (arguments.config or arguments.workdir or arguments.checkpoint):
        raise UserError("Describing needs --config FILE.py[:VARIANT], or a checkpoint's --workdir or --checkpoint DIR.")
    if arguments.classes < 1:
        raise UserError(f"--classes is {arguments.classes}; it must be at least 1.")
    config = load_config(arguments.config, overrides) if arguments.config else None
    if config is not None:
        check(config)
    start()
    from hpr_jax.analysis.describe import describe

    # With a config, --workdir alone does not mean its checkpoint: the config describes a run that has not begun yet.
    checkpoint = arguments.checkpoint or (None if config is not None else arguments.workdir)
    describe(config, arguments.classes, checkpoint, overrides)

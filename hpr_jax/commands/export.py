"""Exports a detector as programs that JAX runs without this project, or as ONNX files.

examples:
  python -m hpr_jax.main export --workdir runs/mine exported
  python -m hpr_jax.main export --checkpoint hf://me/mine exported --platform cpu,cuda --size 800x1344,1344x800 --batch 4
  python -m hpr_jax.main export --workdir runs/mine exported --image-size 1080x1920
  python -m hpr_jax.main export --workdir runs/mine exported --platform onnx --size 800x1344
"""

from argparse import Namespace

from hpr_jax.commands.arguments import CommandParser, Overrides, add_checkpoint, add_config, image_size, path
from hpr_jax.commands.start import start
from hpr_jax.config import load_config
from hpr_jax.errors import UserError

PLATFORMS = ("cpu", "cuda", "tpu", "onnx")


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("output", type=path, help="a new folder for the programs")
    add_config(parser, "the config of a detector with random weights; with a checkpoint, in place of its own")
    add_checkpoint(parser)
    parser.add_argument("--platform", default="cpu", metavar="P,...", help="some of cpu, cuda, tpu and onnx (default cpu)")
    parser.add_argument("--batch", default="1", metavar="N", help="number of images of a call, or any (default 1)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", metavar="HxW,...", help="padded sizes (default: two that resized images of every shape fit)")
    size.add_argument("--image-size", metavar="HxW,...", help="sizes of images, which are then resized inside the programs")
    parser.add_argument(
        "--weights",
        choices=("inside", "beside"),
        default="beside",
        help="in each program, or in model.safetensors (default); ONNX files always hold theirs",
    )
    parser.add_argument(
        "--kernels", action="store_true", help="programs for cuda call Triton kernels: faster, less portable"
    )


def run(arguments: Namespace, overrides: Overrides) -> None:
    """Exports as the arguments say.

    Raises:
      UserError: the command cannot be carried out.
    """
    checkpoint = arguments.checkpoint or arguments.workdir
    if not (arguments.config or checkpoint):
        raise UserError(
            "Exporting needs a checkpoint's --workdir or --checkpoint PATH, or --config FILE.py for random weights."
        )
    platforms, batch = _platforms(arguments.platform), _batch(arguments.batch)
    sizes = _sizes(arguments.size or arguments.image_size)
    config = load_config(arguments.config, overrides) if arguments.config and checkpoint else None
    start()
    from hpr_jax.inference.export import Wanted, write_exported
    from hpr_jax.inference.export_format import ORIGINAL, RESIZED
    from hpr_jax.weights.source import open_source, random_source

    wanted = Wanted(
        platforms=platforms,
        batch=batch,
        sizes=sizes,
        images=ORIGINAL if arguments.image_size else RESIZED,
        weights_beside=arguments.weights == "beside",
        kernels=arguments.kernels,
    )
    source = open_source(checkpoint, overrides, config) if checkpoint else random_source(arguments.config, overrides)
    write_exported(arguments.output, source, wanted)
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    print(f"{arguments.output}: {size / 1e6:,.1f} MB. It is loaded by hpr_jax.load({str(arguments.output)!r}).")


def _platforms(text: str) -> tuple[str, ...]:
    """The platforms of `cpu,cuda`, each once."""
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in PLATFORMS:
            raise UserError(f"--platform names {name!r}; known are {', '.join(PLATFORMS)}, separated by commas.")
    return names


def _batch(text: str) -> int | None:
    """The number of images; None for any."""
    if text == "any":
        return None
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= 1024:
        raise UserError(f"--batch is {text!r}; give a number from 1 to 1024, or any.")
    return int(text)


def _sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    """The (height, width) pairs of `800x1344,1344x800`, each once."""
    sizes: dict[tuple[int, int], None] = {}
    for part in text.split(",") if text else ():
        sizes[image_size(part)] = None
    return tuple(sizes)

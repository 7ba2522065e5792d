"""Converts weights: official files to checkpoints of this project and back, and detectors to their published form and back.

examples:
  python -m hpr_jax.main convert official.pth runs/official
  python -m hpr_jax.main convert --to-torch runs/official back.pth
  python -m hpr_jax.main convert --publish runs/mine mine
  python -m hpr_jax.main convert --publish runs/mine mine.safetensors
  python -m hpr_jax.main convert --publish runs/mine hf://me/mine
  python -m hpr_jax.main convert hf://me/mine runs/again
"""

from argparse import Namespace
from pathlib import Path

from hpr_jax.commands.arguments import CommandParser, Overrides, add_config, path, place
from hpr_jax.commands.start import start
from hpr_jax.config import load_config
from hpr_jax.errors import UserError
from hpr_jax.settings import check


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument(
        "source",
        type=place,
        help="a file of weights, a checkpoint or workdir, a published folder, or hf://owner/name",
    )
    parser.add_argument(
        "target",
        type=place,
        help="a new workdir; with --to-torch a .pth file; with --publish a new folder, .safetensors file, or hf://owner/name",
    )
    add_config(parser, "the model that the weights belong to, where a file does not say it")
    parser.add_argument(
        "--annotations", type=path, metavar="FILE.json", help="COCO annotation file whose categories are the classes"
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--to-torch", action="store_true", help="a checkpoint to a .pth file for the official code")
    way.add_argument(
        "--publish",
        action="store_true",
        help="a detector to the form for others; repositories that are new are public, so make a private one beforehand",
    )


def run(arguments: Namespace, overrides: Overrides) -> None:
    """Converts as the arguments say.

    Raises:
      UserError, RunError: the command cannot be carried out.
    """
    if arguments.to_torch:
        _to_torch(arguments, overrides)
    elif arguments.publish:
        _publish(arguments, overrides)
    else:
        _to_checkpoint(arguments, overrides)


def _to_torch(arguments: Namespace, overrides: Overrides) -> None:
    if arguments.config or arguments.annotations or overrides:
        raise UserError("--to-torch takes the config and the classes from the checkpoint; leave out the other options.")
    start()
    from hpr_jax.weights.convert import to_torch

    to_torch(_path(arguments.source), _path(arguments.target))


def _publish(arguments: Namespace, overrides: Overrides) -> None:
    if arguments.annotations:
        raise UserError("--publish takes the classes from the source; leave out --annotations, or make a checkpoint first.")
    config = load_config(arguments.config, overrides) if arguments.config else None
    start()
    from hpr_jax.weights.convert import publish

    publish(arguments.source, arguments.target, overrides, config)


def _to_checkpoint(arguments: Namespace, overrides: Overrides) -> None:
    source, target = arguments.source, _path(arguments.target)
    if not arguments.config:
        if arguments.annotations:
            raise UserError("--annotations goes with --config, for files that do not say what their weights are of.")
        start()
        from hpr_jax.weights.convert import to_checkpoint

        to_checkpoint(source, target, overrides)
        return
    config = load_config(arguments.config, overrides)
    check(config)
    start()
    from hpr_jax.weights.convert import from_torch

    from_torch(config, _path(source), target, arguments.annotations)


def _path(where: str | Path) -> Path:
    """A place that must be a path.

    Raises:
      UserError: it is a repository of the Hugging Face hub.
    """
    if isinstance(where, str):
        raise UserError(f"{where} is a repository of the Hugging Face hub; such places go with --publish.")
    return where

"""Converts official PyTorch weights to a checkpoint of this project, or back.

examples:
  python -m hpr_jax.main convert --config configs/ddq.py:r50_1x official.pth runs/official
  python -m hpr_jax.main convert --to-torch runs/official back.pth
"""

from argparse import Namespace

from hpr_jax.commands.arguments import CommandParser, Overrides, add_config, path
from hpr_jax.commands.start import start
from hpr_jax.config import load_config
from hpr_jax.errors import UserError
from hpr_jax.settings import check


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("source", type=path, help="the .pth file, or with --to-torch a checkpoint or workdir")
    parser.add_argument("target", type=path, help="a new workdir, or with --to-torch a .pth file")
    add_config(parser, "the model that the weights belong to")
    parser.add_argument(
        "--annotations", type=path, metavar="FILE.json", help="COCO annotation file whose categories are the classes"
    )
    parser.add_argument("--to-torch", action="store_true", help="the other way: a checkpoint to a .pth file")


def run(arguments: Namespace, overrides: Overrides) -> None:
    """Converts as the arguments say.

    Raises:
      UserError, RunError: the command cannot be carried out.
    """
    if arguments.to_torch:
        if arguments.config or arguments.annotations or overrides:
            raise UserError("--to-torch takes the config and the classes from the checkpoint; leave out the other options.")
        start()
        from hpr_jax.weights.convert import to_torch

        to_torch(arguments.source, arguments.target)
        return
    if not arguments.config:
        raise UserError("Give --config FILE.py[:VARIANT], the model that the weights belong to, or --to-torch.")
    config = load_config(arguments.config, overrides)
    check(config)
    start()
    from hpr_jax.weights.convert import from_torch

    from_torch(config, arguments.source, arguments.target, arguments.annotations)

"""Draws a small COCO data set of coloured shapes, the same at every call, to train and try things on.

example:
  python -m hpr_jax.main make-shapes runs/demo/data
"""

from argparse import Namespace

from hpr_jax.commands.arguments import CommandParser, Overrides, check_folder, path
from hpr_jax.errors import UserError


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("directory", type=path, metavar="DIR", help="folder of the data set")
    parser.add_argument("--train", type=int, default=400, help="training images (default 400)")
    parser.add_argument("--val", type=int, default=100, help="validation images (default 100)")
    parser.add_argument("--side", type=int, default=128, help="longer side in pixels (default 128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn (default 0)")


def run(arguments: Namespace, overrides: Overrides) -> None:
    """Draws as the arguments say.

    Raises:
      UserError: the command cannot be carried out.
    """
    for name, least in (("train", 1), ("val", 1), ("side", 16), ("seed", 0)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} is {getattr(arguments, name)}; it must be at least {least}.")
    check_folder(arguments.directory, "data set")
    from hpr_jax.data.shapes import make_shapes

    make_shapes(arguments.directory, arguments.train, arguments.val, arguments.side, arguments.seed)
    print(f"{arguments.directory}: {arguments.train} training and {arguments.val} validation images.")

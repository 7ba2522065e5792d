"""Writes a data set in COCO layout as a TFDS directory, without TensorFlow.

example:
  python -m hpr_jax.main make-tfds --config configs/ddq.py --config.data.directory=DIR tensorflow_datasets/
"""

from argparse import Namespace

from hpr_jax.commands.arguments import CommandParser, Overrides, add_config, check_folder, path
from hpr_jax.config import load_config
from hpr_jax.errors import UserError


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("target", type=path, metavar="DATA_DIR", help="where TFDS data sets are kept")
    add_config(parser, "whose data to write")


def run(arguments: Namespace, overrides: Overrides) -> None:
    """Writes as the arguments say.

    Raises:
      UserError: the command cannot be carried out.
    """
    if not arguments.config:
        raise UserError("Writing a TFDS directory needs --config FILE.py[:VARIANT], which names the data.")
    check_folder(arguments.target, "data folder")
    config = load_config(arguments.config, overrides)
    from hpr_jax.data.sources.tfds_writer import make_tfds

    directory = make_tfds(config.data, arguments.target)
    print(f"{directory}: --config.data.directory={directory} trains on it.")

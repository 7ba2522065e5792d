"""The command `make-tfds`: writes a COCO folder as a TFDS data set."""

import sys
from pathlib import Path

from hpr_jax.commands.arguments import CommandParser, run_command, split_overrides
from hpr_jax.config import load_config
from hpr_jax.data.sources.tfds_writer import make_tfds


def run(command_line: list[str]) -> None:
    """Does what the arguments say.

    Raises:
      UserError: with a sentence for the user.
    """
    parser = CommandParser(prog="make_tfds", description=__doc__)
    parser.add_argument("--config", required=True, help="config file, with a variant behind a colon")
    parser.add_argument("target", type=Path, metavar="DATA_DIR", help="where TFDS data sets are kept")
    command_line, overrides = split_overrides(command_line)
    arguments = parser.parse_args(command_line)
    config = load_config(arguments.config, overrides)
    directory = make_tfds(config.data, arguments.target)
    print(f"{directory}: --config.data.directory={directory} trains on it.")


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(sys.argv[1:])))

"""Evaluates a checkpoint on the validation images: average precision, overall and by class.

example:
  python -m hpr_jax.main evaluate --workdir runs/mine
"""

from argparse import Namespace

from hpr_jax.commands.arguments import (
    DISTRIBUTED,
    CommandParser,
    Overrides,
    add_checkpoint,
    add_config,
    add_data,
    check_folder,
    path,
    with_data,
)
from hpr_jax.commands.start import start
from hpr_jax.config import load_config
from hpr_jax.errors import UserError


def add_arguments(parser: CommandParser) -> None:
    add_checkpoint(parser)
    add_config(parser, "settings in place of the checkpoint's; the model must be the same")
    add_data(parser)
    parser.add_argument(
        "--output",
        type=path,
        metavar="DIR",
        help="folder for metrics.json and detections.json (default: WORKDIR/evaluation)",
    )
    parser.add_argument("--distributed", action="store_true", help=DISTRIBUTED)


def run(arguments: Namespace, overrides: Overrides) -> None:
    """Evaluates as the arguments say.

    Raises:
      UserError: the command cannot be carried out.
    """
    if not arguments.workdir and not (arguments.checkpoint and arguments.output):
        raise UserError("Evaluating needs --workdir DIR, the folder of a run, or --checkpoint DIR and --output DIR.")
    check_folder(arguments.workdir, "workdir")
    check_folder(arguments.output, "output folder")
    overrides = with_data(arguments.data, overrides)
    config = load_config(arguments.config, overrides) if arguments.config else None
    start(distributed=arguments.distributed)
    from hpr_jax.evaluation.evaluate import evaluate

    output = arguments.output or arguments.workdir / "evaluation"
    evaluate(arguments.checkpoint or arguments.workdir, output, overrides, config)

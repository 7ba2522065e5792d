"""Trains a detector, or goes on with a run that was stopped.

examples:
  python -m hpr_jax.main train --config configs/ddq.py:small --data DIR --workdir runs/mine
  python -m hpr_jax.main train --finetune FILE --data DIR --workdir runs/mine
"""

import logging
from argparse import Namespace
from pathlib import Path

from hpr_jax.commands.arguments import (
    DISTRIBUTED,
    CommandParser,
    Overrides,
    add_config,
    add_data,
    check_folder,
    path,
    place,
    with_data,
)
from hpr_jax.commands.start import start
from hpr_jax.config import config_name, load_config
from hpr_jax.data.presence import missing_data
from hpr_jax.errors import UserError
from hpr_jax.settings import check
from hpr_jax.weights.find_checkpoint import has_begun
from hpr_jax.weights.pretrained import missing_weights

log = logging.getLogger("hpr_jax")

# The config of --finetune without another one.
FINE_TUNING = "finetune.py"
# The end of the sentence that names missing data or weights: what can be done about it.
MEND = """\
`python -m hpr_jax.main make-shapes runs/demo/data` draws the data of the variant `demo`, which needs no weights; \
--config.data.directory=DIR and --config.train.initial_weights=FILE name your own, and \
--config.train.initial_weights=random begins with random weights"""


def add_arguments(parser: CommandParser) -> None:
    add_config(parser, "what to train")
    add_data(parser)
    parser.add_argument(
        "--finetune",
        type=place,
        metavar="PATH",
        help="the detector to begin with, whatever `hpr_jax.load` takes; the recipe is --config (default: finetune.py)",
    )
    parser.add_argument(
        "--workdir",
        type=path,
        metavar="DIR",
        help="folder of the run: checkpoints, metrics, log (default: runs/ and the names of config and variant)",
    )
    parser.add_argument("--distributed", action="store_true", help=DISTRIBUTED)
    parser.add_argument(
        "--accept-changes", action="store_true", help="go on with a run whose settings or data were others when it began"
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="begin although the workdir's file system has no locks, which tell that no other run is at work there",
    )


def run(arguments: Namespace, overrides: Overrides) -> None:
    """Trains as the arguments say.

    Raises:
      UserError: there is no such config, or no data or weights to begin with.
      RunError, StoppedError: as `hpr_jax.training.run.train` raises them.
    """
    overrides = with_data(arguments.data, overrides)
    if arguments.finetune is not None:
        arguments.config = arguments.config or FINE_TUNING
    if not arguments.config:
        raise UserError("Training needs --config FILE.py[:VARIANT], or --finetune PATH; --help lists the commands.")
    workdir = arguments.workdir or Path("runs", config_name(arguments.config))
    check_folder(workdir, "workdir")
    if arguments.finetune is None:
        config = load_config(arguments.config, overrides)
    else:
        start(distributed=arguments.distributed)
        from hpr_jax.training.fine_tuning import fine_tuning_config

        config = fine_tuning_config(load_config(arguments.config), arguments.finetune, overrides)
    check(config)
    # A run that has begun goes on from its checkpoints, and needs no initial weights.
    begun = has_begun(workdir)
    missing = [missing_data(config.data), None if begun else missing_weights(config)]
    if any(missing):
        raise UserError(f"Training cannot begin: {', and '.join(filter(None, missing))}. {MEND}.")
    if arguments.finetune is None:
        start(distributed=arguments.distributed)
    log.info("The run %s is in %s.", arguments.config, workdir)
    from hpr_jax.training.run import train

    train(config, workdir, accept_changes=arguments.accept_changes, take_over=arguments.take_over)

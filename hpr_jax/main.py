"""Command line.

python -m hpr_jax.main --config configs/ddq.py[:variant] --workdir DIR
    [--mode train|evaluate|predict|describe] [--config.section.key=value ...]
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from hpr_jax.commands.arguments import CommandParser, run_command, split_overrides
from hpr_jax.config import load_config, suggestion
from hpr_jax.errors import UserError
from hpr_jax.runtime.logs import log_to_console

MODES = ("train", "evaluate", "predict", "describe")

USAGE = """%(prog)s --config FILE.py[:VARIANT] --workdir DIR [--config.SECTION.KEY=VALUE ...]
       %(prog)s --mode evaluate --workdir DIR [--checkpoint DIR] [--output DIR] [--config.SECTION.KEY=VALUE ...]
       %(prog)s --mode predict --workdir DIR [--checkpoint DIR] [--output DIR] [--threshold T] IMAGE_OR_FOLDER ...
       %(prog)s --mode describe --config FILE.py[:VARIANT] [--classes K] [--config.SECTION.KEY=VALUE ...]
       %(prog)s --mode describe --workdir DIR [--checkpoint DIR]"""


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m hpr_jax.main",
        usage=USAGE,
        description="Trains, evaluates, runs and describes HPR detectors.",
    )
    parser.add_argument("--config", help="config file, with a variant behind a colon; needed for training")
    parser.add_argument("--workdir", type=Path, help="folder of the run: checkpoints, metrics, log")
    parser.add_argument("--mode", default="train", help="train (default), evaluate, predict or describe")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint to use, except in training; default: the workdir's")
    parser.add_argument("--output", type=Path, help="folder of the results; default: WORKDIR/evaluation or /predictions")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score that predict keeps (default 0.3)")
    parser.add_argument("--classes", type=int, default=80, help="classes of a config's detector to describe (default 80)")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="be one of several processes, which Slurm, Open MPI or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID bring together",
    )
    parser.add_argument(
        "--accept-changes", action="store_true", help="go on with a run whose settings or data were others when it began"
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.add_argument("inputs", nargs="*", type=Path, help="images and folders of images, for predict")
    return parser


def _check(arguments: argparse.Namespace, unknown: list[str], parser: CommandParser) -> None:
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"There is no option {unknown[0]}; {suggestion(unknown[0].partition('=')[0], options)}")
    if arguments.mode not in MODES:
        raise UserError(f"There is no mode {arguments.mode!r}; {suggestion(arguments.mode, MODES)}")
    if arguments.mode == "train" and not arguments.config:
        raise UserError("Training needs --config FILE.py[:VARIANT].")
    if arguments.mode in ("train", "describe") and arguments.inputs:
        what = "Training" if arguments.mode == "train" else "Describing"
        raise UserError(f"{what} takes no inputs, and got {arguments.inputs[0]}.")
    if arguments.mode == "describe":
        if not (arguments.config or arguments.workdir or arguments.checkpoint):
            raise UserError("Describing needs --config FILE.py[:VARIANT], or a checkpoint's --workdir or --checkpoint DIR.")
        if arguments.classes < 1:
            raise UserError(f"--classes is {arguments.classes}; it must be at least 1.")
    elif not arguments.workdir and (arguments.mode == "train" or not (arguments.checkpoint and arguments.output)):
        raise UserError("Give --workdir DIR, the folder of the run.")
    if arguments.accept_changes and arguments.mode != "train":
        raise UserError("--accept-changes is for training that goes on; leave it out.")
    if arguments.distributed and arguments.mode not in ("train", "evaluate"):
        raise UserError("Several processes can train and evaluate; leave out --distributed.")
    if arguments.workdir and arguments.workdir.exists() and not arguments.workdir.is_dir():
        raise UserError(f"The workdir {arguments.workdir} is a file; give a folder.")


def run(command_line: list[str]) -> None:
    """Does what the arguments say.

    Raises:
      UserError, RunError: with a sentence for the user.
    """
    command_line, overrides = split_overrides(command_line)
    parser = _parser()
    arguments, unknown = parser.parse_known_intermixed_args(command_line)
    if arguments.version:
        from importlib.metadata import version

        print(version("hpr_jax"))
        return
    _check(arguments, unknown, parser)
    config = load_config(arguments.config, overrides) if arguments.config else None

    log_to_console()
    from hpr_jax.runtime.compilation_cache import enable_compilation_cache
    from hpr_jax.runtime.host_memory import return_memory_of_compiling

    enable_compilation_cache()
    return_memory_of_compiling()
    if arguments.distributed:
        from hpr_jax.runtime.devices import is_main_process, join_processes

        join_processes()
        if not is_main_process():
            # One says how it goes; warnings are each one's own.
            log_to_console(logging.WARNING)
    if arguments.mode == "train":
        from hpr_jax.commands.train import train

        train(config, arguments.workdir, accept_changes=arguments.accept_changes)
        return
    if arguments.mode == "describe":
        from hpr_jax.commands.describe import describe

        # A config describes a run that is yet to be, whatever its workdir.
        checkpoint = arguments.checkpoint or (None if config is not None else arguments.workdir)
        describe(config, arguments.classes, checkpoint, overrides)
        return
    checkpoint = arguments.checkpoint or arguments.workdir
    if arguments.mode == "evaluate":
        from hpr_jax.commands.evaluate import evaluate

        evaluate(checkpoint, arguments.output or arguments.workdir / "evaluation", overrides, config)
    else:
        from hpr_jax.commands.predict import predict

        output = arguments.output or arguments.workdir / "predictions"
        predict(checkpoint, arguments.inputs, output, arguments.threshold, overrides, config)


def main() -> int:
    code = run_command(lambda: run(sys.argv[1:]))
    if code in (1, 2) and "--distributed" in sys.argv:
        # JAX's way out would wait for the other processes, which wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())

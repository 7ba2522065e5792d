"""Command line.

python -m hpr_jax.main --config configs/ddq.py[:variant] --workdir DIR [--mode train|evaluate|predict]
    [--config.section.key=value ...]
"""

import argparse
import sys
from pathlib import Path

from hpr_jax.config import load_config, override, suggestion
from hpr_jax.errors import RunError, UserError
from hpr_jax.logs import log_to_console

MODES = ("train", "evaluate", "predict")

USAGE = """%(prog)s --config FILE.py[:VARIANT] --workdir DIR [--config.SECTION.KEY=VALUE ...]
       %(prog)s --mode evaluate --workdir DIR [--checkpoint DIR] [--output DIR] [--config.SECTION.KEY=VALUE ...]
       %(prog)s --mode predict --workdir DIR [--checkpoint DIR] [--output DIR] [--threshold T] IMAGE_OR_FOLDER ..."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing its usage."""

    def error(self, message):
        raise UserError(f"{message[0].upper()}{message[1:]}; see --help.")


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m hpr_jax.main",
        usage=USAGE,
        description="Trains, evaluates and runs HPR detectors.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="config file, with a variant behind a colon; needed for training")
    parser.add_argument("--workdir", type=Path, help="folder of the run: checkpoints, metrics, log")
    parser.add_argument("--mode", default="train", help="train (default), evaluate or predict")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint to evaluate or predict with; default: the workdir's")
    parser.add_argument("--output", type=Path, help="folder of the results; default: WORKDIR/evaluation or /predictions")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score that predict keeps (default 0.3)")
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.add_argument("inputs", nargs="*", type=Path, help="images and folders of images, for predict")
    return parser


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Separates `--config.a.b=value` and `--config.a.b value` from the other arguments."""
    rest, overrides = [], []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            value = next(waiting, None)
            if value is None:
                raise UserError(f"--config.{key} has no value.")
        overrides.append((key, value))
    return rest, overrides


def _check(arguments: argparse.Namespace, unknown: list[str], parser: _Parser) -> None:
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"There is no option {unknown[0]}; {suggestion(unknown[0].partition('=')[0], options)}")
    if arguments.mode not in MODES:
        raise UserError(f"There is no mode {arguments.mode!r}; {suggestion(arguments.mode, MODES)}")
    if arguments.mode == "train" and not arguments.config:
        raise UserError("Training needs --config FILE.py[:VARIANT].")
    if arguments.mode == "train" and arguments.inputs:
        raise UserError(f"Training takes no inputs, and got {arguments.inputs[0]}.")
    if not arguments.workdir and (arguments.mode == "train" or not (arguments.checkpoint and arguments.output)):
        raise UserError("Give --workdir DIR, the folder of the run.")
    if arguments.workdir and arguments.workdir.exists() and not arguments.workdir.is_dir():
        raise UserError(f"The workdir {arguments.workdir} is a file; give a folder.")


def run(command_line: list[str]) -> None:
    """Does what the arguments say.

    Raises:
      UserError, RunError: with a sentence for the user.
    """
    command_line, overrides = _split_overrides(command_line)
    parser = _parser()
    arguments, unknown = parser.parse_known_intermixed_args(command_line)
    if arguments.version:
        from importlib.metadata import version

        print(version("hpr_jax"))
        return
    _check(arguments, unknown, parser)
    config = load_config(arguments.config) if arguments.config else None
    if config is not None:
        for key, text in overrides:
            override(config, key, text)

    log_to_console()
    if arguments.mode == "train":
        from hpr_jax.train import train

        train(config, arguments.workdir)
        return
    checkpoint = arguments.checkpoint or arguments.workdir
    if arguments.mode == "evaluate":
        from hpr_jax.evaluate import evaluate

        evaluate(checkpoint, arguments.output or arguments.workdir / "evaluation", overrides, config)
    else:
        from hpr_jax.predict import predict

        output = arguments.output or arguments.workdir / "predictions"
        predict(checkpoint, arguments.inputs, output, arguments.threshold, overrides, config)


def main() -> int:
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(f"hpr_jax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"hpr_jax: {error.filename or 'A file'}: {error.strerror or error}.", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"hpr_jax: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hpr_jax: stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What all commands share: common arguments, overrides of settings, exit codes, and errors printed as one sentence."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hpr_jax.errors import RunError, StoppedError, UserError
from hpr_jax.weights.hub import is_hub

# Settings from the command line: (dotted key, text) of each `--config.KEY=TEXT`.
Overrides = list[tuple[str, str]]

# The setting that the option --data gives.
DIRECTORY = "data.directory"
# The sides of images that programs are made for, in pixels.
SMALLEST, LARGEST = 32, 16384
# The help of the option --distributed.
DISTRIBUTED = """\
be one of several processes, which Slurm, Open MPI or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID bring
together"""


class CommandParser(argparse.ArgumentParser):
    """A parser that prints the lines of its description as they are, and raises a UserError at wrong arguments."""

    def __init__(self, **keywords: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **keywords)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[0].upper()}{message[1:]}; see --help.")

    def options(self) -> list[str]:
        """The names of all options, like `--workdir`."""
        return [option for action in self._actions for option in action.option_strings]


def path(text: str) -> Path:
    """A path on the command line. A shell leaves the `~` in `--output=~/x` as it is."""
    return Path(text).expanduser()


def place(text: str) -> str | Path:
    """A path on the command line, or the name of a repository on the Hugging Face hub."""
    return text if is_hub(text) else path(text)


def image_size(text: str) -> tuple[int, int]:
    """The (height, width) of `800x1344`.

    Raises:
      UserError: the text is no size.
    """
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if not match or not all(SMALLEST <= int(side) <= LARGEST for side in match.groups()):
        raise UserError(
            f"{text!r} is no size; sizes are HEIGHTxWIDTH, like 800x1344, with sides of {SMALLEST} to {LARGEST} pixels."
        )
    return int(match[1]), int(match[2])


def add_config(parser: CommandParser, meaning: str) -> None:
    """Adds `--config`, and to the help the two ways to change and to list settings."""
    parser.add_argument("--config", metavar="FILE.py[:VARIANT]", help=meaning)
    parser.add_argument(
        "--config.KEY", metavar="VALUE", dest="_override", help="another value of a setting, e.g. --config.train.seed=1"
    )
    parser.add_argument(
        "--help-config", action="store_true", help="list all settings with their values and meanings, and leave"
    )


def add_data(parser: CommandParser) -> None:
    """Adds `--data`, whose value `with_data` makes a setting of."""
    parser.add_argument("--data", metavar="DIR", help="folder of the data, the same as --config.data.directory=DIR")


def with_data(data: str | None, overrides: Overrides) -> Overrides:
    """The settings from the command line, with the one that `--data` gives.

    Raises:
      UserError: `--data` names no folder, or another one than the settings.
    """
    if data is None:
        return overrides
    if not data:
        raise UserError("--data names no folder; write --data DIR.")
    for key, text in overrides:
        if key == DIRECTORY and path(text) != path(data):
            raise UserError(f"--data is {data} and --config.{DIRECTORY} is {text}; give one of the two.")
    return [*overrides, (DIRECTORY, data)]


def add_checkpoint(parser: CommandParser) -> None:
    """Adds `--workdir` and `--checkpoint`."""
    parser.add_argument("--workdir", type=path, metavar="DIR", help="folder of a run, whose best checkpoint is used")
    parser.add_argument(
        "--checkpoint",
        type=place,
        metavar="PATH",
        help="a checkpoint, a published folder or hf://owner/name, or a file of published weights, to use instead",
    )


def check_folder(path: Path | None, what: str) -> None:
    """Checks that a path is no file, so that it can be the folder for what is written.

    Raises:
      UserError: it is a file; `what` says what the folder is for.
    """
    if path is not None and path.exists() and not path.is_dir():
        raise UserError(f"The {what} {path} is a file; give a folder.")


def split_overrides(arguments: list[str]) -> tuple[list[str], Overrides]:
    """Separates `--config.KEY=TEXT` and `--config.KEY TEXT` from the other arguments, which come first in the result.

    Raises:
      UserError: the last key has no value.
    """
    rest: list[str] = []
    overrides: Overrides = []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        key, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            following = next(waiting, None)
            if following is None:
                raise UserError(f"--config.{key} has no value.")
            text = following
        overrides.append((key, text))
    return rest, overrides


def run_command(run: Callable[[], int | None], *, leave_at_once: bool = False) -> int:
    """Runs a command and returns the exit code; prints errors as one sentence to standard error.

    Args:
      run: the command; returns an exit code, or None for 0.
      leave_at_once: at an error, ends the process without what JAX does at exit: it would wait for the other processes of
        the run, which wait for this one.
    """
    code = 0
    try:
        code = run() or 0
    except UserError as error:
        code = _say(error, 2)
    except OSError as error:
        code = _say(f"{error.filename or 'A file'}: {error.strerror or error}.", 2)
    except RunError as error:
        code = _say(error, 1)
    except StoppedError as stopped:
        return _say(stopped, stopped.exit_code)
    except KeyboardInterrupt:
        return _say("stopped.", 130)
    if code in (1, 2) and leave_at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _say(sentence: object, code: int) -> int:
    """Prints a sentence to standard error, and returns the code."""
    print(f"hpr_jax: {sentence}", file=sys.stderr)
    return code

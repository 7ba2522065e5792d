"""What all commands share: arguments, overrides of settings, errors as sentences, exit codes."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from hpr_jax.errors import RunError, StoppedError, UserError

# (dotted key, text) of each `--config.KEY=TEXT`.
Overrides = list[tuple[str, str]]

DISTRIBUTED = """\
be one of several processes, which Slurm, Open MPI or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID bring
together"""


class CommandParser(argparse.ArgumentParser):
    """Keeps the lines of its description, and raises instead of printing its usage."""

    def __init__(self, **keywords):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **keywords)

    def error(self, message):
        raise UserError(f"{message[0].upper()}{message[1:]}; see --help.")

    def options(self) -> list[str]:
        """All options, like `--workdir`."""
        return [option for action in self._actions for option in action.option_strings]


def add_config(parser: CommandParser, meaning: str) -> None:
    """Adds `--config` and the two options that tell about settings."""
    parser.add_argument("--config", metavar="FILE.py[:VARIANT]", help=meaning)
    parser.add_argument(
        "--config.KEY", metavar="VALUE", dest="_override", help="another value of a setting, e.g. --config.train.seed=1"
    )
    parser.add_argument(
        "--help-config", action="store_true", help="list all settings with their values and meanings, and leave"
    )


def add_checkpoint(parser: CommandParser) -> None:
    """Adds `--workdir` and `--checkpoint`."""
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="folder of a run, whose best checkpoint is used")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint to use instead")


def check_folder(path: Path | None, what: str) -> None:
    """Looks whether a folder can be written to.

    Raises:
      UserError: it is a file.
    """
    if path is not None and path.exists() and not path.is_dir():
        raise UserError(f"The {what} {path} is a file; give a folder.")


def split_overrides(arguments: list[str]) -> tuple[list[str], Overrides]:
    """Separates `--config.a.b=value` and `--config.a.b value` from the other arguments."""
    rest, overrides = [], []
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
    """Runs a command; answers errors with one sentence, and returns the exit code.

    Args:
      leave_at_once: ends the process at an error without JAX's way out, which would wait for other processes that wait
        for this one.
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
    print(f"hpr_jax: {sentence}", file=sys.stderr)
    return code

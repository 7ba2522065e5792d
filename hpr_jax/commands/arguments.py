"""What the command line tools share: errors as sentences, exit codes."""

import argparse
import sys
from collections.abc import Callable

from hpr_jax.errors import RunError, StoppedError, UserError


class CommandParser(argparse.ArgumentParser):
    """Keeps the lines of its description, and raises instead of printing its usage."""

    def __init__(self, **keywords):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **keywords)

    def error(self, message):
        raise UserError(f"{message[0].upper()}{message[1:]}; see --help.")


def split_overrides(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
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


def run_command(run: Callable[[], None]) -> int:
    """Runs a tool; answers errors with one sentence, and returns the exit code."""
    try:
        run()
    except UserError as error:
        print(f"hpr_jax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"hpr_jax: {error.filename or 'A file'}: {error.strerror or error}.", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"hpr_jax: {error}", file=sys.stderr)
        return 1
    except StoppedError as stopped:
        print(f"hpr_jax: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("hpr_jax: stopped.", file=sys.stderr)
        return 130
    return 0

"""Command line: `python -m hpr_jax.main COMMAND ...`, or `hpr_jax COMMAND ...` where the package is installed.

Each command is a file in `hpr_jax.commands`, which is imported when it is asked for. Mistakes on the command line are
answered before JAX is imported.
"""

import signal

from hpr_jax.runtime.console import hear_signals, leave, protect_from_console

if __name__ == "__main__":
    # At once, since an interrupt in the middle of an import of JAX would crash.
    signal.signal(signal.SIGINT, leave)

import difflib
import importlib
import sys
from types import ModuleType

from hpr_jax.commands.arguments import CommandParser, run_command, split_overrides
from hpr_jax.config import load_config
from hpr_jax.errors import UserError
from hpr_jax.settings import describe_settings, suggestion

# The names of all commands. Each is a file of hpr_jax.commands, whose first line says what it does.
COMMANDS = (
    "train",
    "evaluate",
    "predict",
    "serve",
    "report",
    "describe",
    "check-data",
    "convert",
    "export",
    "make-tfds",
    "make-shapes",
)

OVERVIEW = """\
usage: python -m hpr_jax.main [COMMAND] [OPTIONS] [--config.SECTION.KEY=VALUE ...]

commands:
{commands}

Without a command it trains. `COMMAND --help` tells a command's options, and --version the version.
"""


def run(command_line: list[str]) -> int | None:
    """Carries out a command line; returns an exit code, or None for 0.

    Raises:
      UserError: the command line is wrong, or the command cannot be carried out.
      RunError, StoppedError: the command has ended early.
    """
    first = command_line[0] if command_line else ""
    if first in ("--help", "-h", "help"):
        print(_overview(), end="")
        return None
    if first == "--version":
        from importlib.metadata import version

        print(version("hpr_jax"))
        return None
    name, rest = _command(command_line)
    command = _module(name)
    parser = CommandParser(prog=f"python -m hpr_jax.main {name}", description=command.__doc__)
    command.add_arguments(parser)
    rest, overrides = split_overrides(rest)
    if "--help-config" in rest and "--help-config" in parser.options():
        print(_settings(rest, overrides))
        return None
    if overrides and "--config" not in parser.options():
        raise UserError(f"The command {name} has no settings; leave out --config.{overrides[0][0]}.")
    arguments, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        raise UserError(_unknown(name, unknown[0], parser))
    return command.run(arguments, overrides)


def _command(command_line: list[str]) -> tuple[str, list[str]]:
    """The name of the command, and its arguments. Without a command the name is `train`."""
    for place, word in enumerate(command_line):
        # Commands were an option once.
        if word.partition("=")[0] == "--mode":
            mode = word.partition("=")[2] or "".join(command_line[place + 1 : place + 2])
            name = next(iter(difflib.get_close_matches(mode, COMMANDS, n=1)), "COMMAND")
            raise UserError(
                f"There is no --mode; write `python -m hpr_jax.main {name} ...` (commands: {', '.join(COMMANDS)})."
            )
    if not command_line or command_line[0].startswith("-"):
        return "train", command_line
    name = command_line[0]
    if name not in COMMANDS:
        raise UserError(f"There is no command {name!r}; {suggestion(name, COMMANDS)}")
    return name, command_line[1:]


def _module(name: str) -> ModuleType:
    """The file of a command."""
    return importlib.import_module(f"hpr_jax.commands.{name.replace('-', '_')}")


def _overview() -> str:
    """The help of the program: usage, and the commands with their first lines."""
    lines = [f"  {name:12} {(_module(name).__doc__ or '').splitlines()[0]}" for name in COMMANDS]
    return OVERVIEW.format(commands="\n".join(lines))


def _settings(arguments: list[str], overrides: list[tuple[str, str]]) -> str:
    """All settings of the config that the arguments name, by default of configs/ddq.py."""
    parser = CommandParser(add_help=False)
    parser.add_argument("--config", default="configs/ddq.py")
    return describe_settings(load_config(parser.parse_known_args(arguments)[0].config, overrides))


def _unknown(name: str, word: str, parser: CommandParser) -> str:
    """A sentence about a word that a command does not know."""
    if word.startswith("-"):
        return f"There is no option {word}; {suggestion(word.partition('=')[0], parser.options())}"
    return f"The command {name} takes no inputs, and got {word}."


def main() -> int:
    """Carries out the command line of this process; returns its exit code."""
    return run_command(lambda: run(sys.argv[1:]), leave_at_once="--distributed" in sys.argv)


def console() -> int:
    """Does what `main` does, as a process of its own: neither the console nor Ctrl-C end it in a traceback."""
    signal.signal(signal.SIGINT, leave)
    hear_signals()
    protect_from_console()
    return main()


if __name__ == "__main__":
    sys.exit(console())

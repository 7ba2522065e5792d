"""Writes one page of HTML on a run: curves, AP, errors, doubtful labels, speed.

example:
  python -m hpr_jax.main report --workdir runs/mine
"""

from argparse import Namespace

from hpr_jax.commands.arguments import CommandParser, Overrides, add_data, check_folder, path, with_data
from hpr_jax.commands.start import start
from hpr_jax.errors import UserError


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("--workdir", type=path, metavar="DIR", help="folder of a run, whose best checkpoint is reported on")
    add_data(parser)
    parser.add_argument("--output", type=path, metavar="FILE.html", help="the page (default: WORKDIR/report.html)")
    parser.add_argument("--limit", type=int, metavar="N", help="look at the first N validation images alone")


def run(arguments: Namespace, overrides: Overrides) -> None:
    """Reports as the arguments say.

    Raises:
      UserError: the command cannot be carried out.
    """
    if not arguments.workdir:
        raise UserError("A report needs --workdir DIR, the folder of a run.")
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit is {arguments.limit}; it must be at least 1.")
    check_folder(arguments.workdir, "workdir")
    output = arguments.output or arguments.workdir / "report.html"
    if output.is_dir():
        raise UserError(f"The output {output} is a folder; give a file, like {output / 'report.html'}.")
    overrides = with_data(arguments.data, overrides)
    start()
    from hpr_jax.analysis.report import report

    report(arguments.workdir, output, overrides, arguments.limit)

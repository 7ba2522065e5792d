"""The log of the command line: to standard output, around progress bars, and to a file of the run."""

import logging
import sys
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("hpr_jax")


class _BesideBars(logging.Handler):
    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stdout)


def log_to_console(level: int = logging.INFO) -> None:
    """Sends the log, from a level on, to standard output, and nowhere else."""
    log.setLevel(logging.INFO)
    # That of Orbax, which logs tracebacks of errors that it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    log.propagate = False
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    log.addHandler(_BesideBars(level))


def log_to_file(file: Path) -> None:
    """Sends the log to a file, too, in place of an earlier one."""
    for earlier in [handler for handler in log.handlers if isinstance(handler, logging.FileHandler)]:
        log.removeHandler(earlier)
        earlier.close()
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)

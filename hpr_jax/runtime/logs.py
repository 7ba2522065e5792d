"""Where the command line sends the log: to standard output, without breaking progress bars, and to a file of the run."""

import logging
import sys
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("hpr_jax")


class _ConsoleHandler(logging.Handler):
    """Prints to standard output, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


def log_to_console(level: int = logging.INFO) -> None:
    """Sends messages of at least this level to standard output, and nowhere else."""
    log.setLevel(logging.INFO)
    # Orbax logs to "absl", tracebacks of errors among them, although it raises the errors, too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    log.propagate = False
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    log.addHandler(_ConsoleHandler(level))


def log_to_file(file: Path) -> None:
    """Sends the log to a file as well, and no longer to the file of an earlier call."""
    for earlier in [handler for handler in log.handlers if isinstance(handler, logging.FileHandler)]:
        log.removeHandler(earlier)
        earlier.close()
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)

"""Where the command line sends the log: to standard output, without breaking progress bars, and to a file of the run."""

import logging
import sys
import time
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("hpr_jax")
# Lines about the progress of a loop, of which there are many.
progress = logging.getLogger("hpr_jax.progress")
# Seconds between two lines of progress on a console that is no terminal.
PROGRESS_INTERVAL = 60.0


class _ConsoleHandler(logging.Handler):
    """Writes to standard output without breaking progress bars.

    Where bars are shown, they tell about progress. Where standard error is no terminal, as under nohup, there are no bars,
    and a line of progress is written once a minute.
    """

    def __init__(self, level: int):
        super().__init__(level)
        self._last_progress = -PROGRESS_INTERVAL

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == progress.name:
            now = time.monotonic()
            if sys.stderr.isatty() or now - self._last_progress < PROGRESS_INTERVAL:
                return
            self._last_progress = now
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def log_to_console(level: int = logging.INFO) -> None:
    """Sends messages of at least this level to standard output, and nowhere else."""
    log.setLevel(logging.INFO)
    # Orbax logs tracebacks of errors through these loggers, and raises the same errors.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
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
    handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)

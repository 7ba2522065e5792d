"""Worker processes that load batches.

Of N workers, each loads every N-th step, so that batches come in order whatever N is. A worker is a new interpreter that
runs this file. (A fork would be unsafe beside JAX's threads, and a process of `multiprocessing` would run the script of the
caller again.) It imports no JAX. Batches are handed over in shared memory: files without names, which the system removes
when the last process that has them open ends, in whatever way.
"""

import contextlib
import ctypes
import gc
import itertools
import mmap
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hpr_jax.errors import RunError

# Arrays begin at multiples of this in shared memory, in bytes.
ALIGNMENT = 64
# Environment variables of workers. They keep NumPy from starting threads, which would compete with the other workers, and
# JAX, should a caller's own loader import it, from taking the accelerator.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}


def keep_freed_memory() -> None:
    """Makes this process keep the memory of freed images for the next ones.

    Getting it from the system anew, page by page, takes a quarter of the loading time. Only the GNU C library has an option
    for this; with others nothing happens.
    """
    # Names of options, as in the C library's malloc.h.
    trim_threshold, mmap_threshold = -1, -3
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    set_option(mmap_threshold, ctypes.c_int(2**28))
    set_option(trim_threshold, ctypes.c_int(2**30))


class LoadedByWorkers:
    """Iterates over `loader[step]` for all steps, in order, loaded ahead by worker processes.

    A worker has at most two batches at a time: one in shared memory, which is as large as the worker's largest batch so far,
    and one that it loads meanwhile.

    The workers end with the iteration: when an error is raised, with `close()`, or when nothing refers to the iterator.

    Args:
      loader: each worker has a copy, so it must be possible to pickle it and to import its classes.
      workers: number of workers, at least 1.

    Raises, in the place of a batch:
      RunError: the batch's worker ended before its time.
      Exception: what the loader raised.
    """

    def __init__(self, loader: Any, steps: Sequence[int], workers: int):
        self._workers: list[_Worker] = []
        self.close = weakref.finalize(self, _end_workers, self._workers)
        # The workers read the loader from a file, which lives until the last of them has done so.
        with _file_in_memory() as pickled:
            # With a newer protocol, arrays would be views of others, which take a quarter more memory.
            pickle.dump(loader, pickled, protocol=4)
            pickled.flush()
            for first in range(min(workers, len(steps))):
                self._workers.append(_Worker(pickled, steps[first::workers]))
        self._turns = itertools.islice(itertools.cycle(self._workers), len(steps))

    def __iter__(self) -> "LoadedByWorkers":
        return self

    def __next__(self) -> Any:
        if not self.close.alive:
            raise StopIteration
        try:
            return next(self._turns).take()
        except BaseException:
            self.close()
            raise


class _Worker:
    """A worker as its parent sees it."""

    def __init__(self, loader: BinaryIO, steps: Sequence[int]):
        self.shared = _file_in_memory()
        self.memory: mmap.mmap | None = None
        self.connection, other_end = Pipe()
        files = [file.fileno() for file in (other_end, loader, self.shared)]
        path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
        with other_end:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, *map(str, files)],
                pass_fds=files,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
                # Ctrl-C, which goes to the whole process group of the parent, does not reach a group of its own.
                process_group=0,
            )
        self._send(steps)
        self._send("memory is free")

    def _send(self, message: Any) -> None:
        # If the process has ended, the error is raised when its batch is wanted.
        with contextlib.suppress(ConnectionError):
            self.connection.send(message)

    def take(self) -> Any:
        """Waits for the worker's next batch."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError):
            raise RunError(
                f"A worker process that loads batches {self._how_it_ended()}. If the machine ran out of memory, lower "
                "config.data.workers."
            ) from None
        if isinstance(message, Exception):
            raise message
        *starts, total = itertools.accumulate(map(_aligned, message), initial=0)
        if self.memory is None or len(self.memory) < total:
            self.memory = mmap.mmap(self.shared.fileno(), total, access=mmap.ACCESS_READ)
        copy = np.frombuffer(self.memory, np.uint8, total).copy()
        self._send("memory is free")
        head, *arrays = (copy[start : start + size] for start, size in zip(starts, message))
        return pickle.loads(head.data, buffers=arrays)

    def _how_it_ended(self) -> str:
        """How the process, which has closed its end of the connection, ended: the end of a sentence that begins with it."""
        code = self.process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _end_workers(workers: list[_Worker]) -> None:
    """Ends processes and frees what they shared."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        # A process cannot be ended while it waits for a file system that does not answer.
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(5)
        worker.connection.close()
        worker.shared.close()
        worker.memory = None


def _file_in_memory() -> BinaryIO:
    """A file without a name, in memory if the system can."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("hpr_jax"), "r+b")
    return tempfile.TemporaryFile()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _work(connection_file: int, loader_file: int, shared_file: int) -> None:
    """The main function of a worker; its arguments are descriptors of open files that it inherits."""
    # The parent decides what a signal to all processes of the run means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(connection_file)
    threading.Thread(target=_end_with_parent, args=[connection_file], daemon=True).start()
    keep_freed_memory()
    shared = _SharedMemory(shared_file)
    try:
        loader = _unpickle(loader_file)
        for step in connection.recv():
            batch = loader[step]
            # The parent says so when it has taken the last batch out of the shared memory.
            connection.recv()
            connection.send(shared.write(batch))
    except Exception as error:
        # If the error is that the parent is gone, there is nobody to tell.
        with contextlib.suppress(ConnectionError):
            connection.send(_portable(error))


def _end_with_parent(connection_file: int) -> None:
    """Ends this process as soon as the parent has closed the connection or ended."""
    poll = select.poll()
    # A hang-up is reported even if no events are asked for.
    poll.register(connection_file, 0)
    poll.poll()
    os._exit(0)


def _unpickle(file: int) -> Any:
    # Looking for garbage among the millions of new objects would take as long as making them.
    gc.disable()
    with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as pickled:
        loader = pickle.loads(pickled)
    os.close(file)
    gc.freeze()
    gc.enable()
    return loader


class _SharedMemory:
    """The memory in which a worker hands over its batches, as large as the largest one so far."""

    def __init__(self, file: int):
        self.file = file
        self.memory: mmap.mmap | None = None

    def write(self, batch: Any) -> list[int]:
        """Writes a pickled batch and, behind it, its arrays; returns the number of bytes of each."""
        arrays: list[pickle.PickleBuffer] = []
        head = pickle.dumps(batch, protocol=5, buffer_callback=arrays.append)
        parts = [memoryview(head), *(array.raw() for array in arrays)]
        sizes = [part.nbytes for part in parts]
        needed = sum(map(_aligned, sizes))
        if self.memory is None or needed > len(self.memory):
            os.ftruncate(self.file, needed)
            self.memory = mmap.mmap(self.file, needed)
        start = 0
        for part, size in zip(parts, sizes):
            self.memory[start : start + size] = part
            start += _aligned(size)
        return sizes


def _portable(error: Exception) -> Exception:
    """The error, with the traceback as a note, which commands do not print; a description of it if it cannot be pickled."""
    error.add_note(f"In a worker process:\n{''.join(traceback.format_exception(error))}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    _work(*map(int, sys.argv[1:]))

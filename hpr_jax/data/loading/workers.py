"""Worker processes that load batches, each of its own steps in turn, so that batches come in order whatever their number.

A worker is a new interpreter that runs this file: not a fork, which is unsafe beside JAX's threads, and not a process of
`multiprocessing`, which would run the caller's script again. It imports no JAX. Batches cross in memory that is shared
through files without names, which are gone with the last process that has them open, however that ends.
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

# Of arrays in shared memory, in bytes.
ALIGNMENT = 64
# Threads of NumPy's products would compete with the processes. If a caller's own loader imports JAX, it leaves the
# accelerator alone.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}


def keep_freed_memory() -> None:
    """Makes the process keep the memory of freed images for the next ones: getting it from the system anew, page by page,
    takes a quarter of the loading time. With the GNU C library alone; elsewhere nothing happens."""
    trim_threshold, mmap_threshold = -1, -3
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    set_option(mmap_threshold, ctypes.c_int(2**28))
    set_option(trim_threshold, ctypes.c_int(2**30))


class LoadedByWorkers:
    """Iterates over `loader[step]` of all steps, in order, loaded ahead by processes.

    Two batches a worker are in flight at most: one in shared memory, which is as large as its largest batch so far, and one
    that the worker loads meanwhile or holds.

    Whatever is raised ends the iteration and the workers. `close()` ends them, too, as does forgetting the iterator.

    Args:
      loader: can be pickled, and its classes imported; each worker has a copy.
      workers: at least 1.

    Raises, in the place of a batch:
      RunError: its worker has ended before its time.
      Exception: what the loader raised.
    """

    def __init__(self, loader: Any, steps: Sequence[int], workers: int):
        self._workers: list[_Worker] = []
        self.close = weakref.finalize(self, _end, self._workers)
        # Processes only read it, and the file lives until the last of them has.
        with _file_in_memory() as pickled:
            # Arrays of a newer protocol are views of others, which take a quarter more memory.
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
    """A process, as seen from its parent."""

    def __init__(self, loader: BinaryIO, steps: Sequence[int]):
        self.shared, self.memory = _file_in_memory(), None
        self.connection, other_end = Pipe()
        files = [file.fileno() for file in (other_end, loader, self.shared)]
        path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
        with other_end:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, *map(str, files)],
                pass_fds=files,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
                # Ctrl-C goes to the parent's group.
                process_group=0,
            )
        self._send(steps)
        self._send("memory is free")

    def _send(self, message: Any) -> None:
        # That the process has ended is found when its batch is wanted.
        with contextlib.suppress(ConnectionError):
            self.connection.send(message)

    def take(self) -> Any:
        """Waits for its next batch."""
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
        return pickle.loads(head, buffers=arrays)

    def _how_it_ended(self) -> str:
        """How a process that has closed its end of the connection has ended, to be read behind its name."""
        code = self.process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        # A process that waits for a file system that does not answer cannot be ended.
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(5)
        worker.connection.close()
        worker.shared.close()
        worker.memory = None


def _file_in_memory() -> BinaryIO:
    """A file without a name."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("hpr_jax"), "r+b")
    return tempfile.TemporaryFile()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _work(connection_file: int, loader_file: int, shared_file: int) -> None:
    """What a worker does."""
    # The parent decides what signals to the whole run mean.
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
            # Not before the parent has taken the batch before.
            connection.recv()
            connection.send(shared.write(batch))
    except Exception as error:
        # Nobody listens if this is the news that the parent is gone.
        with contextlib.suppress(ConnectionError):
            connection.send(_portable(error))


def _end_with_parent(connection_file: int) -> None:
    """Ends this process as soon as the parent has closed its end or died."""
    poll = select.poll()
    # Hang-ups are reported, whatever is asked for.
    poll.register(connection_file, 0)
    poll.poll()
    os._exit(0)


def _unpickle(file: int) -> Any:
    # Looking for garbage among millions of new objects takes as long as making them.
    gc.disable()
    with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as pickled:
        loader = pickle.loads(pickled)
    os.close(file)
    gc.freeze()
    gc.enable()
    return loader


class _SharedMemory:
    """The memory of a worker's batches, as large as the largest one so far."""

    def __init__(self, file: int):
        self.file, self.memory = file, b""

    def write(self, batch: Any) -> list[int]:
        """Stores a pickled batch and, behind it, its arrays; returns the bytes of each."""
        arrays: list[pickle.PickleBuffer] = []
        head = pickle.dumps(batch, protocol=5, buffer_callback=arrays.append)
        parts = [memoryview(head), *(array.raw() for array in arrays)]
        sizes = [part.nbytes for part in parts]
        needed = sum(map(_aligned, sizes))
        if needed > len(self.memory):
            os.ftruncate(self.file, needed)
            self.memory = mmap.mmap(self.file, needed)
        start = 0
        for part, size in zip(parts, sizes):
            self.memory[start : start + size] = part
            start += _aligned(size)
        return sizes


def _portable(error: Exception) -> Exception:
    """An exception that can be pickled, with the traceback as a note, which command line tools do not show."""
    error.add_note(f"In a worker process:\n{''.join(traceback.format_exception(error))}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    _work(*map(int, sys.argv[1:]))

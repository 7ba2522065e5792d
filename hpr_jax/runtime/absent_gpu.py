"""Silence about missing GPUs where JAX's packages for NVIDIA GPUs are installed only to compile for GPUs elsewhere."""

import contextlib
import ctypes
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

from hpr_jax.runtime import console

# What the packages print while they are loaded, before JAX's own settings of logs count.
_WORDS = (b"Could not find cuda drivers", b"before absl::InitializeLog()")


def only_compiles() -> bool:
    """Whether JAX has its packages for NVIDIA GPUs, and the machine has no driver."""
    if not any(importlib.util.find_spec(f"jax_cuda{number}_plugin") for number in (12, 13)):
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


@contextlib.contextmanager
def no_words_about_gpus() -> Iterator[None]:
    """A context for importing JAX and looking for its devices. Where `only_compiles`, nothing is said about missing drivers,
    and JAX takes the CPU, unless JAX_PLATFORMS asks for something else."""
    if not only_compiles():
        yield
        return
    os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"
    sys.stderr.flush()
    # The packages write to the file descriptor, past Python.
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        # Who presses Ctrl-C meanwhile is answered all the same.
        console.say_at(kept)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            console.say_at(2)
            os.close(kept)
            said.seek(0)
            for line in said:
                if not any(words in line for words in _WORDS):
                    os.write(2, line)

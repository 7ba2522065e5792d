"""Silence about missing GPUs where JAX's packages for NVIDIA GPUs are installed only to compile for GPUs elsewhere."""

import contextlib
import ctypes
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

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
    """A context for importing JAX and looking for its devices. Where `only_compiles`, JAX takes the CPU, and nothing is said
    about missing drivers. A platform that JAX_PLATFORMS asks for is not touched."""
    if (os.environ.get("JAX_PLATFORMS") or "cpu") != "cpu" or not only_compiles():
        yield
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.stderr.flush()
    # The packages write to the file descriptor, past Python.
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            said.seek(0)
            for line in said:
                if not any(words in line for words in _WORDS):
                    os.write(2, line)

"""Gives freed memory of the host back to the system, and tells how much there was.

The GNU C library would keep gigabytes of it, in the gaps between arrays that are still in use.
"""

import ctypes
import functools
import sys

import jax


def return_freed_memory() -> None:
    """Gives memory that is free now back to the system. Does nothing with other C libraries than GNU's."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return
    trim(0)


def peak_memory() -> int | None:
    """The most memory of the host that this process has had, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    # In kilobytes on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@functools.cache
def return_memory_of_compiling() -> None:
    """From now on gives memory back whenever a program has been compiled, which takes gigabytes for a large model."""

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            return_freed_memory()

    jax.monitoring.register_event_duration_secs_listener(compiled)

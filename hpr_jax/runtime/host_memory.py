"""Gives freed memory of the host back to the system.

The GNU C library would keep gigabytes of it, in the gaps between arrays that are still in use.
"""

import ctypes
import functools

import jax


def return_freed_memory() -> None:
    """Gives memory that is free now back to the system. Does nothing with other C libraries than GNU's."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return
    trim(0)


@functools.cache
def return_memory_of_compiling() -> None:
    """From now on gives memory back whenever a program has been compiled, which takes gigabytes for a large model."""

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            return_freed_memory()

    jax.monitoring.register_event_duration_secs_listener(compiled)

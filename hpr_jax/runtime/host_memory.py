"""The host's memory goes back to the system when it is free: the GNU C library keeps gigabytes of holes between arrays."""

import ctypes
import functools

import jax


def return_freed_memory() -> None:
    """Has the system get back what is free now. With the GNU C library alone; elsewhere nothing happens."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return
    trim(0)


@functools.cache
def return_memory_of_compiling() -> None:
    """From now on, the system gets back what compiling a program took, gigabytes for a large model, once it is compiled."""

    def compiled(event: str, _seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            return_freed_memory()

    jax.monitoring.register_event_duration_secs_listener(compiled)

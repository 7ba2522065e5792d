"""The host's memory goes back to the system as soon as it is free."""

import ctypes

import jax

# Arrays from this size on, in bytes, are pages of their own, which the system has back when they are freed. By default the
# GNU C library raises the limit up to 32 MB, and keeps gigabytes of smaller holes between what a training step leaves.
PAGES_OF_THEIR_OWN = 1 << 20
# From its malloc.h.
M_MMAP_THRESHOLD = -3


def return_host_memory() -> None:
    """Has the system get back large arrays when they are freed, and what compiling took, gigabytes for a large model, when a
    program is compiled. With the GNU C library alone; elsewhere nothing happens."""
    try:
        library = ctypes.CDLL(None)
        limit, trim = library.mallopt, library.malloc_trim
    except (OSError, TypeError, AttributeError):
        return

    def compiled(event: str, _seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            trim(0)

    limit(M_MMAP_THRESHOLD, PAGES_OF_THEIR_OWN)
    jax.monitoring.register_event_duration_secs_listener(compiled)

"""The memory of the host: how much is free, how much there was, and how freed memory goes back to the system.

The GNU C library would keep gigabytes of it, in the gaps between arrays that are still in use.
"""

import ctypes
import functools
import os
import sys
from pathlib import Path

import jax

# Where the limit of a group of processes, its use, and the statistics of that are, below `CONTROL_GROUPS`: in the second
# version of control groups, and in the first.
CONTROL_GROUPS = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
MEMORY_FACTS = Path("/proc/meminfo")


def available_memory() -> int:
    """Bytes that programs can take without others being swapped out, within the limit of this process's container."""
    free = [_free_on_host()]
    for limit, used, statistics, cached in _LIMITS:
        try:
            most, taken = ((CONTROL_GROUPS / name).read_text().strip() for name in (limit, used))
            facts = dict(line.split() for line in (CONTROL_GROUPS / statistics).read_text().splitlines())
            # Cached files give way to programs.
            free.append(int(most) - int(taken) + int(facts.get(cached, 0)))
        except (OSError, ValueError):
            # There is no such group, or no limit: memory.max is then "max".
            continue
    return max(min(free), 0)


def _free_on_host() -> int:
    try:
        facts = dict(line.split(":", 1) for line in MEMORY_FACTS.read_text().splitlines())
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        # Systems without this file tell how much there is. Half of it is taken for free.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


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

"""A workdir has one owner: process 0 of its run holds a lock of the operating system, which ends with the process.

So a run that was killed leaves nothing behind that would keep the next one out.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from hpr_jax.errors import UserError
from hpr_jax.runtime.devices import agree

# The file that is locked. It stays, and what it says is for messages alone: process numbers repeat, above all in containers.
NAME = "owner"


@contextlib.contextmanager
def owned(workdir: Path, *, take_over: bool = False) -> Iterator[None]:
    """A context in which no other run can begin in the workdir. All processes of a run enter it.

    Args:
      take_over: begin even if the file system has no locks, and so cannot tell whether another run is at work.

    Raises:
      UserError: another run owns the workdir, the file system cannot tell, or nothing can be written there.
    """
    with contextlib.ExitStack() as held:
        obstacle = agree(lambda: _lock(workdir, take_over, held))
        if obstacle:
            raise UserError(obstacle)
        yield


def _lock(workdir: Path, take_over: bool, held: contextlib.ExitStack) -> str | None:
    """Takes the lock, which `held` gives back; returns the sentence that says why it cannot be taken."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = held.enter_context((workdir / NAME).open("a+"))
    except OSError as error:
        return f"Nothing can be written to the workdir {workdir}: {error.strerror}."
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read(200).strip()
        return (
            f"The workdir {workdir} belongs to a run that is at work{f' ({owner})' if owner else ''}. Wait for its end, or "
            "choose another workdir."
        )
    except OSError as error:
        if not take_over:
            return (
                f"The file system of the workdir {workdir} has no locks ({error.strerror}), and two runs in one workdir "
                "would destroy each other. If there is no other, begin with --take-over."
            )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    return None

"""Chooses the implementation of an operation: plain XLA, or a Pallas kernel."""

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

import jax

from hpr_jax.ops.platform import target_platform

log = logging.getLogger("hpr_jax")

Result = TypeVar("Result")

# Names of the implementations. `pallas_interpret` is for tests: it computes what the kernel computes, slowly, on any
# platform.
IMPLEMENTATIONS = ("xla", "pallas", "pallas_interpret")


def dispatch(
    operation: str,
    implementation: str | None,
    xla: Callable[..., Result],
    kernel: Callable[..., Result],
    *arguments: jax.Array,
    obstacle: str | None = None,
) -> Result:
    """Calls one implementation of an operation, and logs once which one, where it chooses by itself.

    Args:
      operation: its name, for messages.
      implementation: one of `IMPLEMENTATIONS`; None: the kernel on NVIDIA GPUs if it can run, else XLA.
      xla, kernel: the implementations, functions of the arguments; `kernel` also takes the keyword `interpret`.
      obstacle: why the kernel cannot run on these arguments, as a clause; None if it can.

    Raises:
      ValueError: an unknown name, or a kernel asked for by name that cannot run.
    """
    if implementation is None:
        platform = target_platform()
        if obstacle:
            why = f": {obstacle}" if platform == "gpu" else f" (default platform: {platform})"
            _log_once(f"{operation} runs as XLA{why}.")
            return xla(*arguments)
        _log_once(f"{operation} runs as {'a Pallas kernel' if platform == 'gpu' else 'XLA'} (default platform: {platform}).")
        # The choice is made when the program is lowered, which may be for another platform than the default one.
        return jax.lax.platform_dependent(*arguments, cuda=functools.partial(kernel, interpret=False), default=xla)
    if implementation == "xla":
        return xla(*arguments)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{operation} has no implementation {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}."
        )
    if implementation == "pallas" and target_platform() != "gpu":
        obstacle = f"it needs an NVIDIA GPU, and the default platform is {target_platform()}"
    if obstacle:
        raise ValueError(
            f"{operation} cannot run as {implementation!r}: {obstacle}; use 'xla', or None for whichever can run."
        )
    return kernel(*arguments, interpret=implementation == "pallas_interpret")


@functools.cache
def _log_once(sentence: str) -> None:
    log.info(sentence)

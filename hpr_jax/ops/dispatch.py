"""Which implementation of an operation runs: plain XLA, or a Pallas kernel."""

import functools
import logging
from collections.abc import Callable

import jax

log = logging.getLogger("hpr_jax")

# `pallas_interpret` computes what the kernel computes, step by step and slowly, on any platform: for tests.
IMPLEMENTATIONS = ("xla", "pallas", "pallas_interpret")


def dispatch(
    operation: str,
    implementation: str | None,
    xla: Callable[..., jax.Array],
    kernel: Callable[..., jax.Array],
    *arguments: jax.Array,
    obstacle: str | None = None,
) -> jax.Array:
    """Calls the implementation of that name; with None the kernel on NVIDIA GPUs and XLA elsewhere.

    Args:
      xla, kernel: take the arguments; `kernel` also the keyword `interpret`.
      obstacle: why the kernel cannot run on these arguments, a clause; None if it can.

    Raises:
      ValueError: an unknown name, or a kernel asked for by name that cannot run.
    """
    if implementation is None:
        if obstacle:
            _say_once(f"{operation} runs as XLA: {obstacle}.")
            return xla(*arguments)
        platform = jax.default_backend()
        _say_once(f"{operation} runs as {'a Pallas kernel' if platform == 'gpu' else 'XLA'} (default platform: {platform}).")
        # Decided when the program is lowered: it may be meant for another platform than the default one.
        return jax.lax.platform_dependent(*arguments, cuda=functools.partial(kernel, interpret=False), default=xla)
    if implementation == "xla":
        return xla(*arguments)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{operation} has no implementation {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}."
        )
    if implementation == "pallas" and jax.default_backend() != "gpu":
        obstacle = f"it needs an NVIDIA GPU, and the default platform is {jax.default_backend()}"
    if obstacle:
        raise ValueError(
            f"{operation} cannot run as {implementation!r}: {obstacle}; use 'xla', or None to choose by itself."
        )
    return kernel(*arguments, interpret=implementation == "pallas_interpret")


@functools.cache
def _say_once(sentence: str) -> None:
    log.info(sentence)

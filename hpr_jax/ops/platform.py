"""The platform that programs are made for, for code that must decide before a program is lowered.

Where a choice can wait until then, `jax.lax.platform_dependent` makes it. It costs a trace of every alternative, and in a
backward pass the inner values of all of them, so that some choices are made by this.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

# The names that JAX's backends have, by the names that programs are exported for. ONNX is none of JAX's; it is given what is
# for no platform in particular.
_BACKENDS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu", "onnx": "onnx"}

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def target_platform() -> str:
    """The platform that programs which are traced now will run on: `cpu`, `gpu`, `tpu` or `onnx`. It is that of JAX's
    default backend, but inside of `programs_for`."""
    return _target.get() or jax.default_backend()


@contextlib.contextmanager
def programs_for(platform: str) -> Iterator[None]:
    """A context in which programs are traced for a platform that this machine may not have.

    JAX keeps traces of functions, and does not look at this context: what is traced in it must be a new function.

    Args:
      platform: `cpu`, `cuda` or `tpu`, as `jax.export` names them, or `onnx`.
    """
    token = _target.set(_BACKENDS[platform])
    try:
        yield
    finally:
        _target.reset(token)

"""Lowering kernels for NVIDIA GPUs on a machine without one."""

import contextlib

import jax

# The custom call by which a program calls a kernel of the Triton backend.
CUSTOM_CALL = "__gpu$xla.gpu.triton"


def abstract_gpu() -> contextlib.AbstractContextManager[object]:
    """A context in which kernels can be lowered for CUDA. JAX 0.11 and newer need a device for that, which may be abstract;
    older versions do not."""
    try:
        # An H200 stands for all GPUs of its generation and later ones.
        device = jax.sharding.AbstractDevice("NVIDIA H200", None, "cuda")
    except (AttributeError, TypeError):
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))

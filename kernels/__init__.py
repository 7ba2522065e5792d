"""Pallas kernels for NVIDIA GPUs, on the Triton backend. They know nothing of detectors.

`hpr_jax.ops` calls them, differentiates them, and chooses between them and plain XLA.
May import JAX, and nothing else of the package.
"""

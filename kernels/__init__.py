"""Pallas kernels for NVIDIA GPUs, on the Triton backend. They import nothing but JAX, and know nothing of detectors.

What calls them, differentiates them, and chooses between them and plain XLA is in `hpr_jax.ops`.
"""

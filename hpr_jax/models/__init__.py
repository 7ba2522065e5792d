"""Flax NNX modules of the detectors.

`build.py` alone reads configs, their sections `model` and `compute`; everything else takes explicit arguments.
May import ops, kernels and types; never losses, data or weights.
"""

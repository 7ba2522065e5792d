"""Flax NNX modules of the detectors.

`build.py` reads the section `model` of a config; everything else takes explicit arguments.
May import ops, kernels and types; never losses, data or weights.
"""

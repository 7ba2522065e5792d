"""Flax NNX modules of the detectors. Only `build.py` reads configs; everything else takes explicit arguments."""

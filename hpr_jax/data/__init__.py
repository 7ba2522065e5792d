"""Data sets, from files to padded batches, in NumPy and OpenCV.

`build.py` reads the sections `data` and `augmentation` of a config.
May import errors and config. Everything but `build.py` and the reading of TFDS imports without JAX.
"""

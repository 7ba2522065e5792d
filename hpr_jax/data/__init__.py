"""From files to batches, in NumPy and OpenCV.

`build.py` reads the sections `data` and `augmentation` of a config.
May import errors and config. All but `build.py` and the reading of TFDS imports without JAX.
"""

"""Data sets, from files to padded batches, in NumPy and OpenCV.

`build.py` reads the sections `data` and `augmentation` of a config.
May import errors and config. Everything but `build.py` and the reading of TFDS imports without JAX.
"""

import os

# OpenCV reads these when it is first imported. It would write lines of its own about damaged images, and make images of more
# pixels than Pillow does, whose limit this is.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "178956970")

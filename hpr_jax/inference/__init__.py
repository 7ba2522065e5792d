"""From an image to boxes and pictures.

`load.py` and `image_detector.py` are what notebooks use.
May import weights and all wings below it.
"""

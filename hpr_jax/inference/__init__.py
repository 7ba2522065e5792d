"""From an image to boxes and pictures.

`image_detector.py` is what notebooks use.
May import weights and all wings below it.
"""

"""Data sets by the format in which they are stored.

Each file reads one format into the same `Dataset`; `data/build.py` lists the formats, and says how to add one.
May import the top of data, never augmentation or loading.
"""

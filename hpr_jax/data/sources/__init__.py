"""Data sets by the form in which they are stored.

Each file reads one form into the same `Dataset`.
May import the top of data, never augmentation or loading.
"""

"""Weights on disk and on the Hugging Face hub: checkpoints and published detectors of this project, and files of others.

Reading a file never runs code that is in it.
May import models and all wings below it.
"""

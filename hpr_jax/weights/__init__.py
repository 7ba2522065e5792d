"""Weights on disk: checkpoints of this project, and files of others.

Reading a file never runs code that is in it.
May import models and all wings below it.
"""

"""Answers that need no training: what a detector costs, and what a data set holds.

Nothing here changes weights or files of a run.
May import training and all wings below it.
"""

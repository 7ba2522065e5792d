"""The detections of a split, and their average precision.

Detections are collected by `evaluator.py` and counted by `average_precision.py`.
May import inference and all wings below it.
"""

"""The detections of a split, and their average precision.

`evaluator.py` collects detections, and `average_precision.py` compares them with the ground truth.
May import inference and all wings below it.
"""

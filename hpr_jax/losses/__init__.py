"""Matching of predictions with ground truth, and losses.

`build.py` reads the section `loss` of a config.
May import ops and types, never a model.
"""

"""Backbones: from images to feature maps.

The setting `backbone.kind` of a config is the name of a file here: `resnet` or `swin` (with `window_attention.py`).
May import layers of models, ops and kernels.
"""

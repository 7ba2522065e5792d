"""Backbones: from images to feature maps.

A config's `backbone.kind` is the name of a file here.
May import layers of models, ops and kernels.
"""

"""Hybrid Proposal Refiner (CVPR 2024): DETR-style object detection in JAX."""

import importlib

from hpr_jax.errors import UserError

__all__ = [
    "Callback",
    "Detections",
    "ImageDetector",
    "Interaction",
    "SharedSettings",
    "Surroundings",
    "UserError",
    "describe",
    "evaluate",
    "load",
    "load_config",
    "make_shapes",
    "register_refiner",
    "report",
    "train",
]

# Where the names are that are imported when they are asked for: the command line answers mistakes before it imports JAX.
_PLACES = {
    "Callback": "hpr_jax.training.callbacks",
    "Detections": "hpr_jax.inference.detections",
    "ImageDetector": "hpr_jax.inference.image_detector",
    "Interaction": "hpr_jax.models.refiner.interaction",
    "SharedSettings": "hpr_jax.models.refiner.interaction",
    "Surroundings": "hpr_jax.models.refiner.interaction",
    "describe": "hpr_jax.analysis.python",
    "evaluate": "hpr_jax.evaluation.python",
    "load": "hpr_jax.inference.load",
    "load_config": "hpr_jax.config",
    "make_shapes": "hpr_jax.data.shapes",
    "register_refiner": "hpr_jax.models.build",
    "report": "hpr_jax.analysis.python",
    "train": "hpr_jax.training.python",
}


def __getattr__(name: str):
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'hpr_jax' has no attribute {name!r}")

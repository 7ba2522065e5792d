"""Hybrid Proposal Refiner (CVPR 2024): DETR-style object detection in JAX."""

from hpr_jax.errors import UserError

__all__ = ["Detections", "ImageDetector", "UserError", "load", "load_config"]


def __getattr__(name: str):
    # The command line answers mistakes before it imports JAX.
    if name == "load":
        from hpr_jax.inference.load import load

        return load
    if name in ("Detections", "ImageDetector"):
        from hpr_jax.inference import image_detector as inference

        return getattr(inference, name)
    if name == "load_config":
        from hpr_jax.config import load_config

        return load_config
    raise AttributeError(f"module 'hpr_jax' has no attribute {name!r}")

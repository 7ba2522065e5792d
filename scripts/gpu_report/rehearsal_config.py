"""Config of the detector of a rehearsal: as small as it gets with all of its parts."""

from pathlib import Path
from typing import Any

from hpr_jax.config import load_config

ROOT = Path(__file__).resolve().parent.parent.parent


def get_config() -> Any:
    """HPR-DDQ's smallest variant, made smaller still, with one auxiliary refiner and no rematerialisation."""
    config = load_config(str(ROOT / "configs/ddq.py:demo"))
    model = config.model
    model.update(channels=16, heads=2, hidden=24, points=2)
    model.backbone.base_channels = 8
    model.backbone.blocks = (1, 1, 1, 1)
    model.encoder.layers = model.refiner.layers = 1
    model.neck.groups = 4
    model.queries.update(count=8, dense_ratio=1.5)
    model.denoising.queries = 4
    model.refiner.region.output_size = 3
    model.refiner.dynamic_conv.hidden = 4
    model.refiner.auxiliaries = ("dynamic_conv",)
    config.compute.remat = ()
    return config

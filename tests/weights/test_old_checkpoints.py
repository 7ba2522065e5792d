"""Checkpoints of earlier versions of this project are read, although their configs had other settings."""

import tiny

from hpr_jax.config import to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.weights.checkpoint import Meta


def test_configs_without_the_section_compute():
    """They had rematerialisation in the model, and no strong views."""
    made = tiny.config()
    made.compute.remat = ("encoder", "refiner")
    config = to_plain(made)
    now = dict(config)
    config.pop("compute")
    config["model"] = {**config["model"], "remat": True, "backbone": {**config["model"]["backbone"], "remat": False}}
    config["augmentation"]["strong_views"] = True
    config["augmentation"] = {k: v for k, v in config["augmentation"].items() if k not in ("lsj", "drop_vanished")}
    meta = Meta(config, Classes(("cup",), (1,)), 3, {})
    read = Meta.from_json(meta.to_json()).config
    assert read["model"] == now["model"]
    assert read["compute"] == now["compute"]
    assert read["augmentation"].keys() == now["augmentation"].keys()
    assert not read["augmentation"]["strong_views"]

"""Checkpoints of earlier versions of this project are read, although their configs had other settings."""

import tiny

from hpr_jax.config import to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.weights.checkpoint import Meta


def test_configs_without_the_section_compute():
    """They had rematerialisation in the model, and no strong views."""
    made = tiny.config()
    made.compute.update(remat=("encoder", "refiner"), operations="auto")
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


def test_settings_of_a_checkpoint_are_not_overwritten():
    """The values of settings that were added later are for configs that lack them."""
    made = tiny.config()
    made.data.update(workers=3, image_bits=12, train_split="other")
    made.train.update(accumulation_steps=2, ema_decay=0.5)
    made.evaluate.max_detections = (100, 300, 1000)
    config = to_plain(made)
    read = Meta.from_json(Meta(config, Classes(("cup",), (1,)), 3, {}).to_json()).config
    assert read == config
    for name in ("workers", "image_bits", "train_split"):
        del config["data"][name]
    for name in ("accumulation_steps", "ema_decay"):
        del config["train"][name]
    del config["evaluate"]["max_detections"]
    read = Meta.from_json(Meta(config, Classes(("cup",), (1,)), 3, {}).to_json()).config
    assert (read["data"]["workers"], read["data"]["image_bits"], read["data"]["train_split"]) == (0, 16, "train")
    assert (read["train"]["accumulation_steps"], read["train"]["ema_decay"]) == (1, 0.0)
    assert read["evaluate"]["max_detections"] == [1, 10, 100]

"""HPR-DDQ: distinct and dense queries, NMS between layers.

    python -m hpr_jax.main --config configs/ddq.py[:variant] --workdir runs/ddq --config.data.directory=DIR

Variants:
  r50_1x  the official 12-epoch ResNet-50 recipe (published AP on COCO val2017 52.6, with re-augmentation)
  small   from scratch, for a few hundred images of about 320 to 480 pixels
  demo    tiny, from scratch, for 128-pixel images; a few minutes on two CPU cores
"""

import common
from ml_collections import ConfigDict

VARIANTS = ("r50_1x", "small", "demo")


def get_config(variant: str = "r50_1x") -> ConfigDict:
    """Config of a variant."""
    config = common.base()
    config.model.queries = {"kind": "distinct", "count": 300, "dense_ratio": 1.5, "nms_threshold": 0.8}
    config.model.refiner.merge_xavier = True
    # DDQ's dense loss: positives per box, weight of GIoU, exponents of score and IoU in the alignment.
    config.loss.dense = {"positives": 4, "giou_weight": 2.0, "alpha": 1.0, "beta": 6.0}
    config.optimizer.update(learning_rate=2e-4, weight_decay=0.05, warmup_steps=2000, milestones=(80_000,))
    config.train.steps = 88_000
    if variant in ("small", "demo"):
        config.model.refiner.merge_xavier = False
        {"small": small, "demo": demo}[variant](config)
    return config


def small(config: ConfigDict) -> None:
    """A thirteenth of the parameters; about a second an image and step on two CPU cores."""
    common.from_scratch(config, base_channels=32, blocks=(2, 2, 2, 2))
    model = config.model
    model.update(channels=128, heads=4, hidden=512)
    model.encoder.layers = model.refiner.layers = 2
    model.neck.groups = 16
    model.queries.update(count=80, dense_ratio=1.0)
    model.denoising.queries = 30
    model.refiner.dynamic_conv.hidden = 32
    model.refiner.regional_attention.update(heads=4, samples=3)
    config.augmentation.update(sides=(320, 352, 384), max_side=512, crop_sides=(320, 360, 400), crop_range=(224, 384))
    config.data.update(buckets=2, keep_empty=True)
    config.train.update(batch_size=2, steps=6000, checkpoint_every=200, evaluate_every=1000, log_every=20)
    config.optimizer.update(learning_rate=4e-4, weight_decay=1e-3, warmup_steps=100, milestones=(5000,))
    config.evaluate.update(batch_size=4, side=352, max_side=512, detections=100, buckets=2)


def demo(config: ConfigDict) -> None:
    """For scripts/demo."""
    common.from_scratch(config, base_channels=16, blocks=(1, 1, 1, 1))
    model = config.model
    model.update(channels=64, heads=4, hidden=128)
    model.encoder.layers = model.refiner.layers = 2
    model.neck.groups = 8
    model.queries.update(count=20, dense_ratio=1.0)
    model.denoising.queries = 10
    model.refiner.region.output_size = 5
    model.refiner.dynamic_conv.hidden = 16
    model.refiner.regional_attention.update(heads=4, samples=2)
    config.augmentation.update(sides=(128,), max_side=128, crop=0.0)
    config.data.update(directory="runs/demo/data", buckets=1, keep_empty=True, threads=2)
    config.train.update(batch_size=8, steps=1000, checkpoint_every=250, evaluate_every=500, log_every=20)
    config.optimizer.update(learning_rate=1e-3, weight_decay=1e-3, warmup_steps=50, milestones=(800,))
    config.evaluate.update(batch_size=8, side=128, max_side=128, detections=50, buckets=1)

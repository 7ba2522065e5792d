"""Fine-tuning of a detector on a few hundred images of one's own.

    python -m hpr_jax.main train --finetune FILE --data DIR --workdir runs/mine

FILE is whatever `hpr_jax.load` takes. Model, losses and size of images are those of the detector; the rest is here. On one
GPU it takes minutes to hours. On a CPU, add `--config configs/finetune.py:frozen`, which trains what stands behind the
encoder alone, and let it run overnight.

What the settings rest on: detectors of this family are fine-tuned at a half to a tenth of the rate that they were trained
with, which falls once near the end. A short warm-up lets the new class layers find their size before they move the rest. A
moving average takes the place of a longer schedule. Strong views cost a second pass, and are for long schedules.
"""

import common
from ml_collections import ConfigDict

VARIANTS = ("all", "frozen")


def get_config(variant: str = "all") -> ConfigDict:
    """The recipe; its model is replaced by that of the detector to begin with, apart from `frozen_parts`."""
    config = common.base()
    if variant == "frozen":
        config.model.frozen_parts = ("backbone", "neck", "encoder")
    config.augmentation.update(strong_views=False, drop_vanished=True)
    config.data.update(keep_empty=True, buckets=4, min_side=1)
    config.train.update(
        batch_size=4, epochs=12, evaluate_every=1, checkpoint_every=200, log_every=20, ema_decay=0.997, patience=5
    )
    config.optimizer.update(learning_rate=5e-5, backbone_multiplier=0.1, warmup_steps=100, milestones=(10,))
    config.optimizer.recipe_batch_size = 4
    return config

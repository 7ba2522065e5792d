"""What scripts/demo trains: the detector of `ddq.py:demo`, with a recipe for the 400 shapes that `make-shapes` draws.

    python -m hpr_jax.main make-shapes runs/demo/data
    python -m hpr_jax.main --config configs/shapes.py --workdir runs/demo

Few images are made to last: scales change a little, and objects of other images are pasted, for which the shapes have masks.
Steps are small and many, and what is evaluated is the mean of the weights of the last thousand or so.
"""

import ddq
from ml_collections import ConfigDict

STEPS = 3600
VARIANTS = ("demo",)


def get_config(variant: str = "demo") -> ConfigDict:
    """The config of a variant; `demo` is the only one."""
    config = ddq.get_config(variant)
    config.augmentation.kind = "lsj"
    config.augmentation.lsj.update(side=128, scale_range=(0.8, 1.25))
    config.evaluate.canvas = 128
    config.train.update(batch_size=4, steps=STEPS, checkpoint_every=600, evaluate_every=STEPS // 3, log_every=50)
    config.train.ema_decay = 0.998
    config.optimizer.update(learning_rate=7e-4, schedule="cosine", milestones=(), gamma=0.01, recipe_batch_size=4)
    # The model is so small that all inner values fit the memory.
    config.compute.remat = ()
    return config

"""HPR-Deformable DETR: two-stage, the best proposals with learned content, no denoising (Zhu et al. 2021).

    python -m hpr_jax.main --config configs/deformable_detr.py[:variant] --workdir runs/detr --config.data.directory=DIR

Recipes `r50_{1x|2x}` and `r50_1x_lsj`; published AP on COCO val2017: 1x/2x 50.6/51.9. From scratch: `small`, `demo`.
Plain two-stage Deformable DETR as mmdetection publishes it: `plain_r50`, AP 47.0, whose queries are made of the boxes of
proposals. HPR that begins as it, with `--config.train.initial_weights=FILE`: `from_plain_r50`.
"""

import common
from ml_collections import ConfigDict

RECIPES = ("r50_1x", "r50_2x", "r50_1x_lsj")
PLAIN = ("plain_r50", "from_plain_r50")
VARIANTS = (*RECIPES, *common.FROM_SCRATCH, *PLAIN)


def get_config(variant: str = "r50_1x") -> ConfigDict:
    """The config of a variant."""
    config = common.base()
    config.model.denoising.queries = 0
    config.model.pixel_std = common.DINO_STD
    common.set_variant(config, variant, in_epochs=True)
    if variant in PLAIN:
        _two_stage(config)
    return config


def _two_stage(config: ConfigDict) -> None:
    """Changes a config to the two-stage detector with refinement of boxes that is published, and to its recipe.

    That recipe also has dropout of 0.1 in encoder and decoder, which later detectors of the family train better without. It
    is not here.
    """
    model = config.model
    model.hidden = 1024
    model.encoder.update(position_temperature=10000.0, position_offset=-0.5)
    model.queries = {"kind": "positions", "count": 300}
    model.refiner.update(final_norm=False, look_forward_twice=False, refine_epsilon=1e-5)
    config.loss.class_weight = 2.0
    config.train.update(batch_size=32, epochs=50)
    config.optimizer.update(learning_rate=2e-4, recipe_batch_size=32, offsets_multiplier=0.1, milestones=(40,))
    config.evaluate.detections = 100

"""HPR-Deformable DETR: two-stage, the best proposals with learned content, no denoising (Zhu et al. 2021).

    python -m hpr_jax.main --config configs/deformable_detr.py[:variant] --workdir runs/detr --config.data.directory=DIR

Recipes `r50_{1x|2x}` and `r50_1x_lsj`; published AP on COCO val2017: 1x/2x 50.6/51.9. From scratch: `small`, `demo`.
"""

import common
from ml_collections import ConfigDict

RECIPES = ("r50_1x", "r50_2x", "r50_1x_lsj")
VARIANTS = (*RECIPES, *common.FROM_SCRATCH)


def get_config(variant: str = "r50_1x") -> ConfigDict:
    """The config of a variant."""
    config = common.base()
    config.model.denoising.queries = 0
    config.model.pixel_std = common.DINO_STD
    common.set_variant(config, variant, in_epochs=True)
    return config

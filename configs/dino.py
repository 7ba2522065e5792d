"""HPR-DINO: the best proposals with learned content, contrastive denoising (DINO, Zhang et al. 2023).

    python -m hpr_jax.main --config configs/dino.py[:variant] --workdir runs/dino --config.data.directory=DIR

Recipes `{r50|swin_l}_{1x|2x|3x}`; published AP on COCO val2017: r50 1x/2x 51.1/51.9. From scratch: `small`, `demo`.
"""

import common
from ml_collections import ConfigDict

RECIPES = ("r50_1x", "r50_2x", "swin_l_1x", "swin_l_2x", "swin_l_3x")
VARIANTS = (*RECIPES, *common.FROM_SCRATCH)


def get_config(variant: str = "r50_1x") -> ConfigDict:
    """The config of a variant."""
    config = common.base()
    config.model.pixel_std = common.DINO_STD
    common.set_variant(config, variant, in_epochs=True)
    return config

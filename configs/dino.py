"""HPR-DINO: the best proposals with learned content, contrastive denoising (DINO, Zhang et al. 2023).

    python -m hpr_jax.main --config configs/dino.py[:variant] --workdir runs/dino --config.data.directory=DIR

Recipes `{r50|swin_l}_{1x|2x|3x}`; published AP on COCO val2017: r50 1x/2x 51.1/51.9. From scratch: `small`, `demo`.
Plain DINO as mmdetection publishes it: `plain_r50`, AP 49.0, and with five levels `plain_swin_l_5scale`, 57.2.
HPR that begins as these, with `--config.train.initial_weights=FILE`: `from_plain_r50`, `from_plain_swin_l_5scale`.
"""

import common
from ml_collections import ConfigDict

RECIPES = ("r50_1x", "r50_2x", "swin_l_1x", "swin_l_2x", "swin_l_3x")
PLAIN = ("plain_r50", "plain_swin_l_5scale")
FROM_PLAIN = tuple(f"from_{variant}" for variant in PLAIN)
VARIANTS = (*RECIPES, *common.FROM_SCRATCH, *PLAIN, *FROM_PLAIN)


def get_config(variant: str = "r50_1x") -> ConfigDict:
    """The config of a variant."""
    config = common.base()
    config.model.pixel_std = common.DINO_STD
    common.set_variant(config, variant, in_epochs=True)
    return config

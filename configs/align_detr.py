"""HPR-Align DETR: DINO with one-to-k matching and IoU-aware classification (Align DETR, Cai et al. 2023).

    python -m hpr_jax.main --config configs/align_detr.py[:variant] --workdir runs/align --config.data.directory=DIR

Recipes `{r50|swin_l}_{1x|2x|3x}[_lsj]`; published AP on COCO val2017: r50 1x/2x 52.1/52.7, with LSJ 1x/2x/3x
52.7/54.6/55.2; swin_l 1x/2x 58.6/59.3, with LSJ 1x/2x/3x 58.8/59.6/60.0. From scratch: `small`, `demo`.
"""

import common
from ml_collections import ConfigDict

PLAIN = ("r50_1x", "r50_2x", "swin_l_1x", "swin_l_2x", "swin_l_3x")
LSJ = ("r50_1x_lsj", "r50_2x_lsj", "r50_3x_lsj", "swin_l_1x_lsj", "swin_l_2x_lsj", "swin_l_3x_lsj")
RECIPES = (*PLAIN, *LSJ)
VARIANTS = (*RECIPES, *common.FROM_SCRATCH)


def get_config(variant: str = "r50_1x") -> ConfigDict:
    """The config of a variant."""
    config = common.base()
    config.model.neck.bias = True
    config.model.encoder.update(position_temperature=10_000.0, position_offset=-0.5)
    config.model.backbone.frozen_stages = 0
    # repeats: how many queries are matched with one box, in each decoder layer; proposal_repeats: how many proposals. alpha:
    # exponent of the score, against that of the IoU, in a class target. gamma: focus on hard negatives. tau: how slowly the
    # weight of lower ranks falls.
    config.loss.aligned = {"repeats": (2, 2, 2, 2, 2, 1), "proposal_repeats": 2, "alpha": 0.25, "gamma": 2.0, "tau": 1.5}
    common.set_variant(config, variant, in_epochs=True)
    if variant in common.FROM_SCRATCH:
        config.loss.aligned.repeats = (2, 1)
    return config

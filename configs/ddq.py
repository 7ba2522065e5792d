"""HPR-DDQ: distinct and dense queries, NMS between layers (DDQ, Zhang et al. 2023).

    python -m hpr_jax.main --config configs/ddq.py[:variant] --workdir runs/ddq --config.data.directory=DIR

Recipes `{r50|swin_l}_{1x|2x|3x}[_lsj]`; published AP on COCO val2017: r50 1x/2x 52.6/53.3, with LSJ 1x/2x/3x
53.0/54.8/55.1; swin_l 1x 58.7, with LSJ 1x/2x 58.8/59.7. From scratch: `small`, `demo`.
Plain DDQ as mmdetection publishes it: `plain_r50`, AP 51.4, with five levels `plain_r50_5scale`, 52.1; `plain_swin_l`, 58.7.
HPR that begins as these, with `--config.train.initial_weights=FILE`: `from_plain_r50` and so on.
"""

import common
from ml_collections import ConfigDict

WITHOUT_LSJ = ("r50_1x", "r50_2x", "swin_l_1x", "swin_l_2x", "swin_l_3x")
LSJ = ("r50_1x_lsj", "r50_2x_lsj", "r50_3x_lsj", "swin_l_1x_lsj", "swin_l_2x_lsj", "swin_l_3x_lsj")
RECIPES = (*WITHOUT_LSJ, *LSJ)
PLAIN = ("plain_r50", "plain_r50_5scale", "plain_swin_l")
FROM_PLAIN = tuple(f"from_{variant}" for variant in PLAIN)
VARIANTS = (*RECIPES, *common.FROM_SCRATCH, *PLAIN, *FROM_PLAIN)


def get_config(variant: str = "r50_1x") -> ConfigDict:
    """The config of a variant."""
    config = common.base()
    config.model.queries = {"kind": "distinct", "count": 300, "dense_ratio": 1.5, "nms_threshold": 0.8}
    # DDQ's dense loss: queries matched with one box, weight of GIoU, exponents of score and IoU in the alignment.
    config.loss.dense = {"positives": 4, "giou_weight": 2.0, "alpha": 1.0, "beta": 6.0}
    config.model.refiner.merge_xavier = True
    config.optimizer.update(learning_rate=2e-4, weight_decay=0.05, warmup_steps=2000)
    common.set_variant(config, variant)
    if variant in common.FROM_SCRATCH:
        config.model.queries.dense_ratio = 1.0
    if variant.endswith("plain_swin_l"):
        config.train.epochs, config.optimizer.milestones = 30, (20, 26)
        config.optimizer.backbone_multiplier = 0.05
    return config

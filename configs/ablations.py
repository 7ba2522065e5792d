"""The paper's ablations of the refiner: each row of its tables 5, 6 and 7 as a variant.

    python -m hpr_jax.main --config configs/ablations.py:table6_attention_ffn --workdir runs/t6 --config.data.directory=DIR

All change settings of one base model (paper, section 4.2): Deformable DETR with ResNet-50, 300 queries, 12 epochs, weak
augmentation. The comment behind each is its published AP on COCO val2017. The same settings, `config.model.refiner.*`, work
in every detector; in DDQ, those of table 7 need merge_xavier=False.
"""

from typing import Any

import deformable_detr
from ml_collections import ConfigDict

HPR = ("regional_attention", "dynamic_conv")

# Table 5: one refiner alone.
TABLE_5: dict[str, dict[str, Any]] = {
    "table5_global_attention": {"primary": "global_attention"},  # 42.3
    "table5_region_fc": {"primary": "region_fc", "layers": 1},  # 32.2
    "table5_deformable": {"primary": "deformable"},  # 47.8
    "table5_dynamic_conv": {"primary": "dynamic_conv"},  # 48.3
    "table5_regional_attention": {"primary": "regional_attention"},  # 47.6
    "table5_point": {"primary": "point", "layers": 1},  # 41.2
}
# Table 6: the parts of the paths behind which features are merged; the row with 49.3 is HPR.
TABLE_6: dict[str, dict[str, Any]] = {
    "table6_attention": {"merge_points": ("attention",)},  # 48.0
    "table6_interaction": {"merge_points": ("interaction",)},  # 46.5
    "table6_ffn": {"merge_points": ("ffn",)},  # 49.2
    "table6_attention_interaction": {"merge_points": ("attention", "interaction")},  # 48.6
    "table6_interaction_ffn": {"merge_points": ("interaction", "ffn")},  # 48.6
    "table6_attention_ffn": {"merge_points": ("attention", "ffn")},  # 49.3
    "table6_all": {"merge_points": ("attention", "interaction", "ffn")},  # 49.1
}
# Table 7: how paths are weighted, in the order primary, regional attention, dynamic convolution.
TABLE_7: dict[str, dict[str, Any]] = {
    "table7_fixed_1_1_1": {"merge": "fixed", "merge_initial": (1.0, 1.0, 1.0)},  # 48.9
    "table7_fixed_2_1_1": {"merge": "fixed", "merge_initial": (2.0, 1.0, 1.0)},  # 49.1
    "table7_scalar_1_1_1": {"merge": "learned_scalar", "merge_initial": (1.0, 1.0, 1.0)},  # 48.9
    "table7_scalar_2_1_1": {"merge": "learned_scalar", "merge_initial": (2.0, 1.0, 1.0)},  # 48.8
    "table7_vector_1_1_1": {"merge": "learned_vector", "merge_initial": (1.0, 1.0, 1.0)},  # 49.3
    "table7_vector_2_1_1": {"merge": "learned_vector", "merge_initial": (2.0, 1.0, 1.0)},  # 49.0
}
SETTINGS: dict[str, dict[str, Any]] = {name: {"auxiliaries": (), **settings} for name, settings in TABLE_5.items()}
SETTINGS |= {name: {"auxiliaries": HPR, **settings} for name, settings in {**TABLE_6, **TABLE_7}.items()}
VARIANTS = tuple(SETTINGS)


def get_config(variant: str = "table6_attention_ffn") -> ConfigDict:
    """The config of a variant."""
    config = deformable_detr.get_config("r50_1x")
    config.model.queries.count = 300
    config.augmentation.strong_views = False
    config.model.refiner.update(SETTINGS[variant])
    return config

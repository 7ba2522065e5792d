"""Names and layouts of official weights, with small values made by hand."""

import numpy as np
import pytest
import tiny

from hpr_jax.models.build import abstract_detector
from hpr_jax.weights.backbone_names import as_official_backbone
from hpr_jax.weights.official import entries
from hpr_jax.weights.official_names import official_name


@pytest.mark.parametrize(
    ("auxiliaries", "columns"),
    [
        (("dynamic_conv", "regional_attention"), (0, 1, 2)),
        (("regional_attention", "dynamic_conv"), (0, 2, 1)),
    ],
)
def test_columns_of_merges(auxiliaries, columns):
    """Official ones are primary, dynamic convolution, regional attention; ours are in the order of the config."""
    config = tiny.config()
    config.model.refiner.auxiliaries = auxiliaries
    found = {entry.merge_columns for entry in entries(abstract_detector(config.model, tiny.CLASSES))}
    assert found == {None, columns}


@pytest.mark.parametrize("auxiliaries", [("dynamic_conv", "regional_attention"), ("regional_attention", "dynamic_conv")])
def test_numbers_of_branches_are_those_of_their_refiners(auxiliaries):
    """Whatever their order in the config: regional attention is 0, dynamic convolution 1."""
    for index, name in enumerate(auxiliaries):
        number = ("regional_attention", "dynamic_conv").index(name)
        found = official_name(f"refiner.branch_norms.{index}.scale", auxiliaries, swin=False, first_map=1)
        assert found == f"decoder.norm_aux.{number}.weight"
        found = official_name(f"branch_heads.{index}.matching.classes.kernel", auxiliaries, swin=False, first_map=1)
        assert found.startswith(f"bbox_head_aux.{number}.")


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.encoder."])
def test_what_classifiers_have_is_left_out(prefix):
    swin = ("patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight", "norm1.weight")
    resnet = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight")
    more = ("norm.weight", "norm.bias", "head.weight", "head.bias", "fc.weight", "absolute_pos_embed")
    for names in (swin, resnet):
        tensors = {f"{prefix}{name}": np.zeros(1) for name in (*names, *more)}
        found = as_official_backbone(tensors, "file")
        assert len(found) == len(names), found.keys()
        assert not any(name.removeprefix("backbone.") in more for name in found)

"""Names and layouts of official weights, with small values made by hand."""

import numpy as np
import pytest
import tiny

from hpr_jax.models.build import abstract_detector
from hpr_jax.weights.backbone_names import as_official_backbone
from hpr_jax.weights.official import entries


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

"""Official weights are loaded strictly and completely. That each goes where it belongs is shown by the parity tests."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
import tiny
from flax import nnx

from hpr_jax.config import load_config
from hpr_jax.errors import UserError
from hpr_jax.models.build import abstract_detector, build_detector
from hpr_jax.weights.backbone_names import OUTPUT_NORMS, as_official_backbone
from hpr_jax.weights.official import IGNORED, entries, load_official, official_buffers, to_official


def official_tensors():
    """Weights of the reference model, by official name."""
    return dict(reference.arrays("ddq_state_dict"))


def unfilled_detector():
    """The reference model, without values."""
    config, classes = reference.model_config("ddq"), reference.sizes()["num_classes"]
    return nnx.eval_shape(lambda: build_detector(config, classes, rngs=nnx.Rngs(0)))


def test_round_trip_is_bit_exact():
    back = to_official(reference.detector("ddq"))
    original = {name: t for name, t in official_tensors().items() if not name.endswith("num_batches_tracked")}
    assert set(back) == set(original)
    for name, tensor in original.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_missing_and_left_over_tensors_are_named():
    wrong = official_tensors()
    wrong["encoder.layers.7.ffn.bias"] = wrong.pop("query_map.weight")
    with pytest.raises(UserError, match=r"missing: query_map.weight; not used: encoder.layers.7.ffn.bias"):
        load_official(unfilled_detector(), wrong)


def test_other_shapes_are_named():
    wrong = official_tensors()
    wrong["query_map.weight"] = wrong["query_map.weight"][:, :-1]
    with pytest.raises(UserError, match=r"shape of query_map.weight"):
        load_official(unfilled_detector(), wrong)


def test_second_names_must_agree():
    twice = official_tensors()
    original = "bbox_head.aux_reg_branches.0.0.bias"
    twice["decoder.aux_reg_branches.0.0.bias"] = twice[original]
    load_official(unfilled_detector(), twice)
    twice["decoder.aux_reg_branches.0.0.bias"] = twice[original] + 1
    with pytest.raises(UserError, match="two names of one tensor"):
        load_official(unfilled_detector(), twice)


FULL_SIZE = {
    "deformable_detr": "deformable_detr.py:r50_1x",
    "dino": "dino.py:r50_1x",
    "align_detr": "align_detr.py:r50_1x",
    "ddq": "ddq.py:r50_1x",
    "dino_swinl": "dino.py:swin_l_1x",
    "align_detr_swinl": "align_detr.py:swin_l_1x",
    "ddq_swinl": "ddq.py:swin_l_1x",
}


@pytest.mark.parametrize("model", FULL_SIZE)
def test_full_size_models_have_the_official_weights(model):
    """Name by name and shape by shape, so that the numbers of parameters are equal, too."""
    official = json.loads((Path(tiny.ROOT) / "tests/reference_values/official/state_dict_shapes.json").read_text())[model]
    wanted = {name: tuple(shape) for name, shape in official.items() if not IGNORED.search(name)}
    config = load_config(f"{tiny.ROOT}/configs/{FULL_SIZE[model]}").model
    detector = abstract_detector(config, 80)
    flat = dict(nnx.to_flat_state(nnx.state(detector)))
    ours: dict[str, tuple[int, ...]] = {}
    for entry in entries(detector):
        tensors = entry.to_official(np.broadcast_to(np.float32(0), flat[entry.path].shape))
        ours |= {name: tensor.shape for name, tensor in zip(entry.names, tensors)}
    assert ours == wanted
    assert sum(v.get_value().size for v in flat.values()) == sum(math.prod(shape) for shape in wanted.values())
    # Strict loading in the official code asks for these buffers, too.
    tables = {name: np.broadcast_to(np.float32(0), s) for name, s in ours.items() if name.endswith("position_bias_table")}
    buffers = official_buffers(tables)
    assert {name for name in official if name.endswith("relative_position_index")} == set(buffers)
    assert all(list(buffer.shape) == official[name] for name, buffer in buffers.items())


def swin_detector():
    """A detector around the reference's small Swin."""
    config = tiny.config(model="dino").model
    config.backbone = {"kind": "swin", "embed_channels": 8, "depths": (2, 2, 4, 2), "heads": (1, 2, 4, 8), "window": 4}
    return abstract_detector(config, tiny.CLASSES)


def test_both_namings_of_swin_are_the_same_backbone():
    """test_swin.py compares features of weights in mmdet's naming with the reference."""
    arrays, filled = reference.arrays("backbone_swin"), {}
    for naming in ("mmdet", "original"):
        tensors = {name.removeprefix(f"{naming}."): t for name, t in arrays.items() if name.startswith(f"{naming}.")}
        detector = swin_detector()
        load_official(detector, as_official_backbone(tensors, naming), only="backbone.", optional=OUTPUT_NORMS)
        filled[naming] = nnx.to_flat_state(nnx.state(detector.backbone))
    for (path, mmdet), (_, original) in zip(filled["mmdet"], filled["original"]):
        if path[0] == "norms":
            # Weights of the original release come from a classifier, which has no output norms.
            assert isinstance(original.get_value(), jax.ShapeDtypeStruct)
        else:
            np.testing.assert_array_equal(mmdet.get_value(), original.get_value(), err_msg=str(path))
    tensors = {name: t for name, t in arrays.items() if name.endswith("relative_position_bias_table")}
    for name, index in official_buffers(tensors).items():
        np.testing.assert_array_equal(index, arrays[name], err_msg=name)


NAMINGS = {
    "mmdet": lambda name: name,
    "torchvision": lambda name: name.removeprefix("backbone."),
    "SoCo": lambda name: "encoder." + name.removeprefix("backbone."),
    "SoCo with stray prefix": lambda name: "module.encoder." + name.removeprefix("backbone."),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_namings_of_resnet(naming):
    backbone = {name: t for name, t in official_tensors().items() if name.startswith("backbone.")}
    renamed = {NAMINGS[naming](name): tensor for name, tensor in backbone.items()}
    renamed |= {"torchvision": {"fc.weight": np.zeros((10, 8)), "fc.bias": np.zeros(10)}}.get(naming, {})
    renamed |= {"neck.lateral_convs.0.conv.weight": np.zeros(1)} if naming.startswith("SoCo") else {}
    detector = unfilled_detector()
    load_official(detector, as_official_backbone(renamed, "file"), only="backbone.")
    flat = dict(nnx.to_flat_state(nnx.state(detector)))
    for entry in entries(detector):
        if entry.path[0] == "backbone":
            (back,) = entry.to_official(flat[entry.path].get_value())
            np.testing.assert_array_equal(back, backbone[entry.names[0]])


def test_a_file_without_a_backbone():
    with pytest.raises(UserError, match=r"w.pth holds neither a detector nor a ResNet or Swin backbone; .* like lstm"):
        as_official_backbone({"lstm.weight": np.zeros(1)}, "w.pth")


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"primary": "dynamic_conv", "auxiliaries": ()}, "DynamicConv"),
        ({"auxiliaries": ("point",)}, "point"),
        ({"auxiliaries": ("dynamic_conv",)}, "both auxiliary refiners"),
        ({"merge_points": ("ffn",)}, "both auxiliary refiners and merge behind attention and FFN"),
        ({"merge_points": ("attention", "interaction", "ffn")}, "do not merge behind the interaction"),
    ],
)
def test_refiners_without_official_weights(setting, named):
    config = tiny.config().model
    config.refiner.update(setting)
    with pytest.raises(UserError, match=named):
        entries(abstract_detector(config, tiny.CLASSES))

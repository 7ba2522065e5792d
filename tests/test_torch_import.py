"""Strictness of the weight import; parity shows that the weights land where they belong."""

import numpy as np
import pytest
import reference
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.build import build_detector
from hpr_jax.torch_import import load_official, load_weights_file, to_official


def tensors():
    return dict(reference.arrays("ddq_state_dict"))


def fresh():
    config, classes = reference.model_config("ddq"), reference.sizes()["num_classes"]
    return nnx.eval_shape(lambda: build_detector(config, classes, rngs=nnx.Rngs(0)))


def test_round_trip_is_bit_exact():
    back = to_official(reference.detector("ddq"))
    original = {name: t for name, t in tensors().items() if not name.endswith("num_batches_tracked")}
    assert set(back) == set(original)
    for name, tensor in original.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_missing_and_left_over_tensors_are_named():
    wrong = tensors()
    wrong["encoder.layers.7.ffn.bias"] = wrong.pop("query_map.weight")
    with pytest.raises(UserError, match=r"missing: query_map.weight; not used: encoder.layers.7.ffn.bias"):
        load_official(fresh(), wrong)


def test_other_shapes_are_named():
    wrong = tensors()
    wrong["query_map.weight"] = wrong["query_map.weight"][:, :-1]
    with pytest.raises(UserError, match=r"shape of query_map.weight"):
        load_official(fresh(), wrong)


def test_second_names_must_agree():
    twice = tensors()
    original = "bbox_head.aux_reg_branches.0.0.bias"
    twice["decoder.aux_reg_branches.0.0.bias"] = twice[original]
    load_official(fresh(), twice)
    twice["decoder.aux_reg_branches.0.0.bias"] = twice[original] + 1
    with pytest.raises(UserError, match="two names of one tensor"):
        load_official(fresh(), twice)


def test_backbone_files(tmp_path):
    backbone = {name: t for name, t in tensors().items() if name.startswith("backbone.")}
    np.savez(tmp_path / "backbone.npz", **backbone)
    np.savez(tmp_path / "all.npz", **tensors())
    detector = fresh()
    load_weights_file(detector, tmp_path / "all.npz")
    load_weights_file(detector, tmp_path / "backbone.npz")
    np.testing.assert_array_equal(to_official(detector)["backbone.conv1.weight"], backbone["backbone.conv1.weight"])


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_files_that_hold_no_arrays(tmp_path, content):
    (tmp_path / "w.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"not an .npz file"):
        load_weights_file(fresh(), tmp_path / "w.npz")
    with pytest.raises(UserError, match="does not exist"):
        load_weights_file(fresh(), tmp_path / "nothing.npz")

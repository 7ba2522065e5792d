"""HPR detectors that begin as a plain one."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from flax import nnx

from hpr_jax.config import to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.models.build import abstract_detector, random_detector
from hpr_jax.training.merges import log_merges
from hpr_jax.training.optimizer import Optimizer
from hpr_jax.weights.checkpoint import Meta
from hpr_jax.weights.checkpoint_writer import Checkpoints
from hpr_jax.weights.initial import load_initial_weights
from hpr_jax.weights.official import load_official, to_official
from hpr_jax.weights.official_names import dotted_path
from hpr_jax.weights.torch_file import write_checkpoint

FROM_PLAIN = {"auxiliaries": ("regional_attention", "dynamic_conv"), "merge_initial": (1.0, 0.0, 0.0)}
CLASSES = reference.sizes()["num_classes"]


def config_of(model, **refiner):
    config = reference.model_config(model)
    config["refiner"] |= {**FROM_PLAIN, **refiner}
    return config


@functools.cache
def plain_file(folder, model):
    path = folder / f"{model}.pth"
    write_checkpoint(path, reference.arrays(f"{model}_state_dict"), {})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plain")


def grown(path, model, compute=None, **refiner):
    # Stand-ins for random weights, which show where they stay.
    detector = abstract_detector(config_of(model, **refiner), CLASSES, compute)
    state = nnx.state(detector)

    def fill(path, variable):
        value = variable.get_value()
        if ".merge_" in dotted_path(path):
            value = jnp.broadcast_to(jnp.array(refiner.get("merge_initial", (1.0, 0.0, 0.0))), value.shape)
        else:
            value = jnp.full(value.shape, 0.01, value.dtype)
        return path, variable.replace(value)

    nnx.update(detector, nnx.from_flat_state([fill(*entry) for entry in nnx.to_flat_state(state)]))
    load_initial_weights(detector, path)
    return detector


@functools.cache
def first_predictions(path, model, dtype):
    """Of all layers: those of the grown detector before training, and those of the plain one."""
    compute = {"dtype": dtype}
    plain = abstract_detector(reference.model_config(model), CLASSES, compute)
    load_official(plain, reference.arrays(f"{model}_state_dict"))
    images, sizes = reference.images()
    run = jax.jit(lambda detector: detector(images, sizes).primary.matching)
    return run(grown(path, model, compute)), run(plain)


@pytest.mark.parametrize(
    "model",
    [pytest.param(model, marks=pytest.mark.slow) for model in ("plain_dino", "plain_deformable_detr")]
    + ["plain_ddq_5scale"],
)
def test_it_begins_with_the_plain_detector_s_predictions(folder, model):
    """Bit for bit in float32, and those of every layer."""
    for ours, theirs in zip(*map(jax.tree.leaves, first_predictions(plain_file(folder, model), model, "float32"))):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_in_bfloat16_it_begins_as_near_as_rounding_lets_it(folder):
    """XLA may keep more digits than the type has between operations that it joins, and joins others here and there."""
    model = "plain_dino"
    path = plain_file(folder, model)
    ours, theirs = first_predictions(path, model, "bfloat16")
    assert jnp.max(jnp.abs(ours.logits - theirs.logits)) < 0.05
    assert jnp.max(jnp.abs(ours.boxes - theirs.boxes)) < 0.02
    # That this is no coincidence of equal programs, the rounding of the type itself shows.
    exact, _ = first_predictions(path, model, "float32")
    assert jnp.max(jnp.abs(exact.logits - theirs.logits)) > 0.05


def test_what_begins_as_the_primary_refiner_and_what_anew(folder, caplog):
    model = "plain_ddq_5scale"
    with caplog.at_level(logging.INFO):
        detector = grown(plain_file(folder, model), model)
    assert (
        "is a plain detector: HPR begins as it. The interactions of the refiners regional_attention and dynamic_conv"
        in caplog.text
    )
    layers = detector.refiner.layers
    for path in layers.auxiliaries:
        for part in ("attention", "norm1", "norm2", "norm3", "ffn"):
            for ours, theirs in zip(
                jax.tree.leaves(nnx.state(getattr(path, part))), jax.tree.leaves(nnx.state(getattr(layers.primary, part)))
            ):
                np.testing.assert_array_equal(ours, theirs)
        assert all(np.all(np.asarray(x) == np.float32(0.01)) for x in jax.tree.leaves(nnx.state(path.interaction)))
    # No two variables share an array, since training steps give all of them away.
    arrays = jax.tree.leaves(nnx.state(detector))
    assert len({id(array) for array in arrays}) == len(arrays)
    for index, heads in enumerate(detector.branch_heads):
        np.testing.assert_array_equal(heads.matching.classes.kernel, detector.heads.matching.classes.kernel)
        np.testing.assert_array_equal(detector.refiner.branch_norms[index].scale, detector.refiner.norm.scale)
    np.testing.assert_array_equal(
        to_official(detector)["query_map.weight"], reference.arrays(f"{model}_state_dict")["query_map.weight"]
    )


def test_a_checkpoint_of_a_plain_detector(tmp_path):
    config = tiny.config()
    config.model.refiner.auxiliaries = ()
    plain = random_detector(config.model, tiny.CLASSES, seed=1)
    classes = Classes(("cup", "pen", "hat"), (2, 5, 9))
    Checkpoints(tmp_path, keep=1).save_best(7, nnx.state(plain), Meta(to_plain(config), classes, 7, {}))
    config.model.refiner.update(FROM_PLAIN)
    detector = random_detector(config.model, tiny.CLASSES)
    load_initial_weights(detector, tmp_path)
    kernel = plain.refiner.layers.primary.attention.output.kernel
    for path in (detector.refiner.layers.primary, *detector.refiner.layers.auxiliaries):
        np.testing.assert_array_equal(path.attention.output.kernel, kernel)
    np.testing.assert_array_equal(detector.backbone.stem.kernel, plain.backbone.stem.kernel)
    arrays = jax.tree.leaves(nnx.state(detector))
    assert len({id(array) for array in arrays}) == len(arrays)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"merge_initial": (1.0, 1.0, 1.0)}, r"set config\.model\.refiner\.merge_initial to \(1,0,0\)"),
        (
            {"merge": "fixed"},
            r"fixed merges would never use other refiners; set config\.model\.refiner\.merge to learned_vector",
        ),
    ],
)
def test_merges_that_would_not_begin_as_the_plain_detector(folder, change, sentence):
    with pytest.raises(UserError, match=sentence):
        grown(plain_file(folder, "plain_dino"), "plain_dino", **change)


def test_merges_learn_at_their_own_rate_and_do_not_decay():
    params = {"backbone": jnp.ones(2), "merge_ffn": {"weights": jnp.ones(2)}, "other": jnp.ones(2)}
    gradients = jax.tree.map(jnp.ones_like, params)
    optimizer = Optimizer(0.0, 0.5, 0.1, merge_multiplier=10.0, merge_decay=False)
    updated, _ = optimizer.update(gradients, optimizer.init(params), params, 0.01)
    # The first step of Adam has the length of the rate; half of the rate is for the decay.
    expected = {"backbone": 1 - 0.1 * 0.015, "merge_ffn": 1 - 10 * 0.01, "other": 1 - 0.015}
    found = {name: float(jax.tree.leaves(value)[0][0]) for name, value in updated.items()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_log_names_merges_that_did_not_move(caplog):
    config = tiny.config()
    config.model.refiner.merge_initial = (1.0, 0.0, 0.0)
    detector = random_detector(config.model, tiny.CLASSES)
    weights = detector.refiner.layers.merge_ffn.weights
    weights.set_value(weights.get_value().at[0, 0, 1].set(0.06))
    with caplog.at_level(logging.INFO):
        log_merges(nnx.state(detector, nnx.Param), (1.0, 0.0, 0.0))
    assert (
        "merge_attention of layer 0: weights of mean size (1.000, 0.000, 0.000) of the paths, the primary one first"
        in caplog.text
    )
    assert "No weight of merge_attention of layer 0 moved by 0.05" in caplog.text
    assert "No weight of merge_ffn of layer 0 moved" not in caplog.text

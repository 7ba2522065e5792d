"""Swin Transformer: official values, independence from padding, drop path, frozen stages, settings."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from reference import arrays, assert_close

from hpr_jax.errors import UserError
from hpr_jax.models.backbones.swin import SwinTransformer, drop_path
from hpr_jax.models.backbones.window_attention import relative_positions
from hpr_jax.models.build import abstract_detector
from hpr_jax.weights.official import entries, load_official

SMALL: dict[str, Any] = {"embed_channels": 8, "depths": (2, 2, 4, 2), "heads": (1, 2, 4, 8), "window": 4}
# A network of half the depth, for what does not depend on depth.
SHALLOW = {"depths": (2, 2), "heads": (1, 2)}
# (height, width) of images whose maps have odd sides, consist of whole windows, or are smaller than a window.
SIZES = ((75, 90), (64, 33), (5, 61))
CANVAS = (80, 96)
RNG = np.random.default_rng(0)
IMAGES = [RNG.normal(size=(h, w, 3)).astype(np.float32) for h, w in SIZES]


def build(**settings):
    return SwinTransformer(**{**SMALL, **settings}, rngs=nnx.Rngs(0))


@functools.cache
def model(*, remat=False, **settings):
    """The backbone of the reference values with its weights, in which all parts matter; settings may leave some out."""
    config = tiny.config(model="dino").model
    config.backbone = {"kind": "swin", **SMALL, **settings}
    detector = abstract_detector(config, tiny.CLASSES, {"remat": ("backbone",) if remat else ()})
    wanted = {name for entry in entries(detector) for name in entry.names}
    tensors = {name.replace("mmdet.", "backbone."): tensor for name, tensor in arrays("backbone_swin").items()}
    load_official(detector, {name: t for name, t in tensors.items() if name in wanted}, only="backbone.")
    return detector.backbone


# It is compiled once for each shape and setting.
@jax.jit
def extract(model, images, sizes, keys=None):
    return model(images, sizes, keys)


def padded(images, shape=CANVAS, fill=0.0):
    batch = np.full((len(images), *shape, 3), fill, np.float32)
    for slot, image in zip(batch, images):
        slot[: image.shape[0], : image.shape[1]] = image
    return jnp.asarray(batch), jnp.asarray([image.shape[:2] for image in images], jnp.int32)


def valid(features, image):
    """The valid area of one image in each map."""
    return [map_[image, : size[image, 0], : size[image, 1]] for map_, size in zip(*features)]


def assert_same(left, right, tolerance=1e-6):
    for level, (a, b) in enumerate(zip(left, right)):
        assert_close(a, b, tolerance, f"map {level}")


def test_official_values():
    images = arrays("backbone_swin")["images"].transpose(0, 2, 3, 1)
    sizes = jnp.array([images.shape[1:3]] * 2, jnp.int32)
    maps, map_sizes = extract(model(), jnp.asarray(images), sizes)
    assert model().out_channels == (8, 16, 32, 64)
    for level, (actual, size) in enumerate(zip(maps, map_sizes)):
        expected = arrays("backbone_swin")[f"feature.{level}"].transpose(0, 2, 3, 1)
        # Measured 4e-7; GELU by tanh would be off by 1e-5 in the last map.
        assert_close(actual, expected, 5e-6, f"map {level}")
        assert size.dtype == jnp.int32
        assert size.tolist() == [list(expected.shape[1:3])] * 2


def test_order_of_the_position_table():
    expected = arrays("backbone_swin")["mmdet.stages.0.blocks.0.attn.w_msa.relative_position_index"]
    np.testing.assert_array_equal(relative_positions(SMALL["window"]), expected)


@pytest.mark.parametrize("canvas", [CANVAS, (135, 121)])
def test_neither_neighbours_nor_canvas_nor_padding_matter(canvas):
    images, sizes = padded(IMAGES, canvas)
    inside = (np.arange(canvas[0])[:, None] < sizes[:, :1, None]) & (np.arange(canvas[1]) < sizes[:, 1:, None])
    garbage = 100 * np.random.default_rng(1).normal(size=images.shape).astype(np.float32)
    together = extract(model(), jnp.where(inside[..., None], images, garbage), sizes)
    assert all(np.isfinite(map_).all() for map_ in together[0])
    for index, image in enumerate(IMAGES):
        alone = extract(model(), *padded([image], image.shape[:2]))
        for level, (actual, expected) in enumerate(zip(valid(together, index), alone[0])):
            assert_close(actual, expected[0], 1e-5, f"image {index}, map {level}")


def test_without_key_or_rate_nothing_is_dropped():
    batch = padded(IMAGES)
    undropped, _ = extract(model(**SHALLOW), *batch)
    again, _ = extract(model(**SHALLOW), *batch)
    without_rate = model(**SHALLOW, drop_path=0.0)
    assert_same(again, undropped, 0)
    assert_same(extract(without_rate, *batch)[0], undropped)
    assert_same(extract(without_rate, *batch, jax.random.split(jax.random.key(0), len(IMAGES)))[0], undropped)


def test_drop_path_zeroes_whole_branches_of_an_image():
    # A batch of copies of one image, which differ only by what was dropped. The rates are 0, 0.3, 0.6, 0.9.
    images, sizes = padded([IMAGES[0][:20, :20]] * 32, (20, 20))
    dropping = model(**SHALLOW, drop_path=0.9)
    undropped, _ = extract(dropping, images, sizes)
    keys = jax.random.split(jax.random.key(0), 32)
    dropped, _ = extract(dropping, images, sizes, keys)
    # The second block drops none of its two branches, one, the other or both.
    assert len(np.unique(np.asarray(dropped[0]).round(4), axis=0)) == 4
    assert len(np.unique(np.asarray(dropped[1]).round(4), axis=0)) > 8
    assert len(np.unique(np.asarray(undropped[1]).round(4), axis=0)) == 1
    again, _ = extract(dropping, images, sizes, keys)
    other, _ = extract(dropping, images, sizes, jax.random.split(jax.random.key(1), 32))
    swapped, _ = extract(dropping, images, sizes, keys[::-1])
    assert_same(again, dropped, 0)
    # What an image drops depends on its own key alone.
    assert_same([map_[::-1] for map_ in swapped], dropped)
    assert not np.array_equal(other[0], dropped[0])


def filled(**settings):
    """A model with weights so large that each branch is seen in its maps; drawn by NumPy, which is quick."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(**settings)))
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), state))


def test_each_block_of_a_stage_drops_its_own():
    """Four blocks with the rates 0, 0.2, 0.4, 0.6 have six branches that are dropped, in 64 ways; with a key for two blocks
    there would be 36."""
    images, sizes = padded([IMAGES[0][:4, :4]] * 2048, (4, 4))
    keys = jax.random.split(jax.random.key(0), 2048)
    ((dropped,), _) = extract(filled(depths=(4,), heads=(1,), drop_path=0.6), images, sizes, keys)
    assert 36 < len(np.unique(np.asarray(dropped).round(3), axis=0)) <= 64


def recorded_drops(monkeypatch, count, **settings):
    """Rate and keys of each call of `drop_path`, in order, for so many copies of an image; blocks compute nothing."""
    calls = []

    def record(branch, rate, keys):
        data = jnp.zeros((0, 2)) if keys is None else jax.random.key_data(keys)
        jax.debug.callback(lambda *call: calls.append(jax.tree.map(np.asarray, call)), rate, data, ordered=True)
        return branch

    monkeypatch.setattr("hpr_jax.models.backbones.swin.drop_path", record)
    monkeypatch.setattr("hpr_jax.models.backbones.swin.WindowAttention.__call__", lambda self, x, sizes, regions: x)
    monkeypatch.setattr("hpr_jax.models.backbones.swin.GeluMLP.__call__", lambda self, x: x)
    images, sizes = padded([IMAGES[0][:4, :4]] * count, (4, 4))
    keys = jax.random.split(jax.random.key(0), count)
    model = filled(**SHALLOW, **settings)
    jax.block_until_ready(jax.jit(lambda *batch: model(*batch))(images, sizes, keys))
    jax.effects_barrier()
    return [(float(rate), [tuple(key.tolist()) for key in keys]) for rate, keys in calls]


def test_every_branch_of_every_image_has_a_key_of_its_own(monkeypatch):
    """Of both stages, both blocks of each and both branches of these; rates rise block by block."""
    calls = recorded_drops(monkeypatch, 2, drop_path=0.6)
    assert [rate for rate, _ in calls] == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6])
    assert len({key for _, keys in calls for key in keys}) == 8 * 2


def test_frozen_stages_have_no_keys(monkeypatch):
    calls = recorded_drops(monkeypatch, 1, drop_path=0.6, frozen_stages=1)
    assert [len(keys) for _, keys in calls] == [0] * 4 + [1] * 4


def test_drop_path_keeps_the_mean():
    dropped = np.asarray(drop_path(jnp.full((4000, 2, 3), 2.0), jnp.float32(0.3), jax.random.split(jax.random.key(0), 4000)))
    assert np.all(dropped == dropped[:, :1, :1]), "an image's branch goes as a whole"
    np.testing.assert_allclose([dropped.min(), dropped.max()], [0, 2 / 0.7], rtol=1e-6)
    np.testing.assert_allclose(dropped.mean(), 2, rtol=0.05)


def trained(model):
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def test_frozen_stages_are_not_parameters():
    everything = trained(model())
    assert {"patch_embed.kernel", "norms.0.scale", "stages.0.pairs.plain.attention.position_bias"} <= everything
    assert everything - trained(model(frozen_stages=0)) == {name for name in everything if name.startswith("patch_embed.")}
    frozen = ("patch_embed.", "stages.0.", "stages.1.", "norms.0.", "norms.1.")
    assert everything - trained(model(frozen_stages=2)) == {name for name in everything if name.startswith(frozen)}


def test_frozen_stages_drop_nothing():
    frozen, batch = model(**SHALLOW, drop_path=0.9, frozen_stages=1), padded(IMAGES)
    undropped, _ = extract(frozen, *batch)
    dropped, _ = extract(frozen, *batch, jax.random.split(jax.random.key(0), len(IMAGES)))
    assert_same(dropped[:1], undropped[:1])
    assert np.abs(dropped[1] - undropped[1]).max() > 0.01


@jax.jit
def gradients(model, images, sizes, keys):
    graph, params, rest = tiny.split_parameters(model)

    def loss(params):
        maps, _ = nnx.merge(graph, params, rest)(images, sizes, keys)
        return sum(jnp.sum(jnp.square(map_[..., 0])) for map_ in maps)

    return jax.grad(loss)(params)


@pytest.mark.slow
def test_recomputation_changes_no_gradient():
    batch, keys = padded([IMAGES[0][:37, :30]], (40, 40)), jax.random.split(jax.random.key(0), 1)
    stored = gradients(model(**SHALLOW), *batch, keys)
    recomputed = gradients(model(**SHALLOW, remat=True), *batch, keys)
    for (path, a), (_, b) in zip(nnx.to_flat_state(stored), nnx.to_flat_state(recomputed)):
        assert_close(b.get_value(), a.get_value(), 1e-5, str(path))
        assert np.any(np.asarray(a.get_value()) != 0), path


def test_dtype_follows_the_images():
    maps, _ = jax.eval_shape(lambda m, x, s: m(x, s), model(), padded(IMAGES)[0].astype(jnp.bfloat16), padded(IMAGES)[1])
    assert [map_.dtype for map_ in maps] == [jnp.bfloat16] * 4
    assert [map_.shape[1:] for map_ in maps] == [(20, 24, 8), (10, 12, 16), (5, 6, 32), (3, 3, 64)]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"depths": (2, 2, 3, 2)}, r"depths .*even"),
        ({"depths": (2, 2, 0, 2)}, r"depths .*at least 2"),
        ({"heads": (1, 2, 4)}, r"heads .*4 stages"),
        ({"heads": (1, 2, 5, 8)}, r"heads .*32 channels .* 5 heads"),
        ({"window": 0}, r"window"),
        ({"drop_path": 1.0}, r"drop_path"),
        ({"frozen_stages": 5}, r"frozen_stages"),
    ],
)
def test_ill_formed_settings_get_a_sentence(setting, sentence):
    with pytest.raises(UserError, match=sentence):
        build(**setting)

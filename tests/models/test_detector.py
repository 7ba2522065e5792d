"""The detector: independence from padding and neighbours, structure, initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.inference.detect import top_detections
from hpr_jax.models import build, encoder
from hpr_jax.models.backbones.resnet import NORMS
from hpr_jax.models.build import abstract_detector, build_detector
from hpr_jax.models.layers import layer
from hpr_jax.models.refiner.merge import MERGE_POINTS, MERGES
from hpr_jax.settings import SETTINGS

RNG = np.random.default_rng(0)
IMAGES = [RNG.uniform(0, 255, (h, w, 3)).astype(np.float32) for h, w in ((40, 64), (61, 33), (64, 64), (48, 50))]


@jax.jit
def detect(detector, images, sizes):
    outputs = detector(detector.normalize(images, sizes), sizes)
    return top_detections(jax.tree.map(lambda x: x[-1], outputs.primary.matching), sizes, 10)


def padded(images, shape, fill=0.0):
    batch = np.full((len(images), *shape, 3), fill, np.float32)
    for slot, image in zip(batch, images):
        slot[: image.shape[0], : image.shape[1]] = image
    return jnp.asarray(batch), jnp.asarray([image.shape[:2] for image in images], jnp.int32)


def assert_same(a, b, image_a, image_b):
    for left, right in zip(a, b):
        np.testing.assert_allclose(left[image_a], right[image_b], atol=1e-4, rtol=1e-4)


def test_neither_neighbours_nor_buckets_nor_padding_matter():
    together = detect(tiny.detector(), *padded(IMAGES, (64, 64)))
    other_bucket = detect(tiny.detector(), *padded(IMAGES, (96, 128), fill=255.0))
    for index, image in enumerate(IMAGES):
        alone = detect(tiny.detector(), *padded([image], (64, 64)))
        assert_same(together, alone, index, 0)
        assert_same(together, other_bucket, index, index)
    boxes = np.asarray(together[0])
    assert np.ptp(boxes[..., 0]) > 1, "the boxes must differ, or this test shows nothing"


def test_detections_lie_in_the_image_and_fall_in_score():
    boxes, scores, labels, valid = map(np.asarray, detect(tiny.detector(), *padded(IMAGES, (64, 64))))
    assert valid.all()
    assert np.all(np.diff(scores, axis=1) <= 0)
    assert labels.min() >= 0
    assert labels.max() < tiny.CLASSES
    for image, found in zip(IMAGES, boxes):
        height, width = image.shape[:2]
        assert found.min() >= 0
        assert np.all(found <= np.array([width, height, width, height]))


def test_frozen_variables_are_not_parameters():
    config = tiny.config().model
    config.backbone.update(norm="frozen_batch", frozen_stages=1)
    detector = nnx.eval_shape(lambda: build_detector(config, tiny.CLASSES, rngs=nnx.Rngs(0)))
    _, params, frozen = tiny.split_parameters(detector)
    trained = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)}
    still = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(frozen)}
    assert "backbone.stem.kernel" in still
    assert "backbone.stages.0.0.conv1.kernel" in still
    assert "backbone.stages.1.0.conv1.kernel" in trained
    assert not any("norm" in name and name.startswith("backbone.") for name in trained)


@pytest.mark.parametrize(
    ("frozen_stages", "trained"),
    [(-1, {"stem", "0", "1", "2", "3"}), (0, {"0", "1", "2", "3"}), (2, {"2", "3"}), (4, set())],
)
def test_frozen_stages(frozen_stages, trained):
    config = tiny.config().model
    config.backbone.update(frozen_stages=frozen_stages)
    _, params, _ = tiny.split_parameters(abstract_detector(config, tiny.CLASSES))
    names = [path[1:] for path, _ in nnx.to_flat_state(params) if path[0] == "backbone"]
    assert {str(name[1]) if name[0] == "stages" else "stem" for name in names} == trained


def test_a_plain_detector_has_no_branches():
    config = tiny.config().model
    config.refiner.auxiliaries = ()
    detector = nnx.eval_shape(lambda: build_detector(config, tiny.CLASSES, rngs=nnx.Rngs(0)))
    outputs = jax.eval_shape(lambda d, x, s: d(x, s), detector, *padded(IMAGES, (64, 64)))
    assert outputs.branches == {}
    assert outputs.primary.matching.logits.shape == (2, 4, 8, tiny.CLASSES)


@pytest.mark.parametrize(
    ("section", "setting", "sentence"),
    [
        ("backbone", {"kind": "swin"}, r"backbone.base_channels does not suit the kind 'swin'"),
        ("backbone", {"kind": "vgg"}, r"known are resnet, swin"),
        ("queries", {"kind": "distinct"}, r"needs config.model.queries.dense_ratio"),
        ("queries", {"kind": "best"}, r"known are top, positions, distinct"),
        ("neck", {"groups": 3}, r"config\.model\.neck: 16 channels do not divide into 3 groups"),
        (
            "refiner",
            {"regional_attention": {"heads": 3, "samples": 2, "temperature": 20.0}},
            r"config\.model\.refiner\.regional_attention: 16 channels do not divide into 3 heads",
        ),
    ],
)
def test_parts_that_do_not_exist_or_do_not_fit_get_a_sentence(section, setting, sentence):
    config = tiny.config(model="dino").model
    config[section].update(setting)
    with pytest.raises(UserError, match=sentence):
        nnx.eval_shape(lambda: build_detector(config, tiny.CLASSES, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("model", ["deformable_detr", "dino", "align_detr", "ddq"])
def test_heads_start_as_published(model):
    """The heads of all layers start as copies of one. The branches of DDQ start from the same head, and those of the other
    detectors from heads of their own."""
    detector = build_detector(tiny.config(model=model).model, tiny.CLASSES, rngs=nnx.Rngs(0))
    kernel = detector.heads.matching.classes.kernel
    np.testing.assert_array_equal(kernel[0], kernel[1])
    np.testing.assert_array_equal(kernel[0], detector.query_init.head.classes.kernel)
    branches = [heads.matching.classes.kernel for heads in detector.branch_heads]
    assert [bool(jnp.all(branch == kernel)) for branch in branches] == [model == "ddq"] * 2
    assert bool(jnp.all(branches[0] == branches[1])) == (model == "ddq")
    assert (detector.denoiser is None) == (model == "deformable_detr")
    assert (detector.heads.dense is None) == (model != "ddq")


def test_more_queries_than_tokens():
    """Queries that find no token are seen by none, and give no detections."""
    config = tiny.config(model="dino").model
    config.queries.count = 100
    detector = build_detector(config, tiny.CLASSES, rngs=nnx.Rngs(0))
    images, sizes = padded(IMAGES[:1], (64, 64))
    outputs = jax.jit(lambda d, x, s: d(d.normalize(x, s), s))(detector, images, sizes)
    tokens = int(np.sum(np.prod(np.asarray(outputs.intermediates.level_sizes[0]), axis=-1)))
    assert tokens < 100
    valid = np.asarray(outputs.primary.matching.valid)
    assert valid[:, 0].sum(axis=-1).tolist() == [tokens, tokens]
    *_, found = top_detections(jax.tree.map(lambda x: x[-1], outputs.primary.matching), sizes, 300)
    assert np.asarray(found).sum() == tokens * tiny.CLASSES


def test_one_layer_of_a_stack():
    layers = tiny.detector().refiner.layers
    stacked, single = jax.tree.leaves(layers), jax.tree.leaves(layer(layers, 1))
    assert all(np.array_equal(a[1], b) for a, b in zip(stacked, single))


@pytest.mark.parametrize(
    ("folder", "table", "setting"),
    [
        ("backbones", build.BACKBONES, "model.backbone.kind"),
        ("queries", build.QUERIES, "model.queries.kind"),
        ("refiner", build.INTERACTIONS, "model.refiner.auxiliaries"),
    ],
)
def test_words_of_configs_are_names_of_files(folder, table, setting):
    assert set(table) == set(SETTINGS[setting].choices)
    for word, module in table.items():
        assert module.__module__ == f"hpr_jax.models.{folder}.{word}"


def test_choices_of_modules_are_those_of_settings():
    assert SETTINGS["model.backbone.norm"].choices == NORMS
    assert SETTINGS["model.refiner.merge"].choices == MERGES
    assert SETTINGS["model.refiner.merge_points"].choices == MERGE_POINTS


@pytest.mark.parametrize(("temperature", "offset"), [(20.0, 0.0), (10000.0, -0.5)])
def test_positions_of_tokens_are_encoded_as_configured(monkeypatch, temperature, offset):
    seen, encode = [], encoder.map_encoding

    def recording(*arguments, **settings):
        seen.append((settings["temperature"], settings["offset"]))
        return encode(*arguments, **settings)

    monkeypatch.setattr(encoder, "map_encoding", recording)
    config = tiny.config().model
    config.encoder.update(position_temperature=temperature, position_offset=offset)
    detector = abstract_detector(config, tiny.CLASSES)
    images = jax.ShapeDtypeStruct((1, tiny.SIDE, tiny.SIDE, 3), jnp.float32)
    jax.eval_shape(lambda d, x: d(x, jnp.array([[60, 50]])), detector, images)
    assert seen
    assert set(seen) == {(temperature, offset)}

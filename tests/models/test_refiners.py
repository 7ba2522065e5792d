"""Refiners as settings: every ablation of the paper builds, trains and evaluates; so do other choices and orders."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from hpr_jax.config import load_config
from hpr_jax.data.sources.coco import load_coco
from hpr_jax.errors import UserError
from hpr_jax.evaluation.evaluator import Evaluator
from hpr_jax.inference.detect import top_detections
from hpr_jax.losses.build import make_criterion
from hpr_jax.models import build
from hpr_jax.models.build import abstract_detector, build_detector
from hpr_jax.models.refiner.merge import Merge
from hpr_jax.ops.platform import programs_for
from hpr_jax.runtime.devices import replicate, shard
from hpr_jax.training.build import make_optimizer
from hpr_jax.training.state import TrainState
from hpr_jax.training.step import DeviceBatch, TrainStep

ABLATIONS = tiny.ROOT / "configs" / "ablations.py"
VARIANTS = re.findall(r'^    "(table\w+)":', ABLATIONS.read_text(), re.MULTILINE)
IMAGES = np.random.default_rng(0).integers(0, 255, (2, tiny.SIDE, tiny.SIDE, 3)).astype(np.uint8)


def shallow(**refiner):
    """Config of the tiny Deformable DETR with these refiner settings and one layer."""
    c = tiny.config(model="deformable_detr")
    c.model.refiner.update(refiner)
    c.model.refiner.layers = 1
    return c


class Patches(nnx.Module):
    """Stands for a backbone, of which there is little to compile: means of patches of 8 to 64 pixels a side."""

    def __init__(self, channels):
        self.channels = channels

    def __call__(self, images, sizes, keys):
        maps, strides, batch = [], (8, 16, 32, 64), len(images)
        for stride in strides:
            pad = [(0, 0), *((0, -side % stride) for side in images.shape[1:3]), (0, 0)]
            _, height, width, _ = (padded := jnp.pad(images, pad)).shape
            patches = padded.reshape(batch, height // stride, stride, width // stride, stride, 3).mean(axis=(2, 4))
            colours = np.random.default_rng(stride).normal(size=(3, self.channels)).astype(np.float32)
            maps.append(patches @ colours)
        return maps, [-(-sizes // stride) for stride in strides]


class Unchanged(nnx.Module):
    """Stands for neck and encoder."""

    def __call__(self, *inputs):
        return inputs if len(inputs) > 1 else inputs[0]


def random_weights(c):
    """A detector of a refiner on patches, with the weights of `tiny.fill`, split."""
    detector = abstract_detector(c.model, tiny.CLASSES, {"operations": "xla"})
    detector.backbone = Patches(c.model.channels)
    detector.neck, detector.encoder = Unchanged(), Unchanged()
    tiny.fill(detector)
    return tiny.split_parameters(detector)


@jax.jit
def detect(detector, images, sizes):
    outputs = detector(detector.normalize(images, sizes), sizes)
    return top_detections(jax.tree.map(lambda x: x[-1], outputs.primary.matching), sizes, 10)


def assert_learns(c, without_gradient=()):
    """Asserts that steps on one batch lower the loss, that all parts of the refiner but these have gradients, and that boxes
    are detected."""
    graph, params, frozen = random_weights(c)
    sizes = jnp.array([[64, 64], [48, 40]])

    def loss_of(params):
        detector = nnx.merge(graph, params, frozen)
        outputs = detector(detector.normalize(IMAGES, sizes), sizes, train=True)
        # How far all boxes are from one box, and all logits from one number: the losses of training take long to compile.
        branches = (outputs.primary, *outputs.branches.values())
        boxes = [jnp.mean(jnp.square(branch.matching.boxes - 0.3)) for branch in branches]
        logits = [jnp.mean(jnp.square(branch.matching.logits - 1.0)) for branch in branches]
        return sum(boxes + logits), top_detections(jax.tree.map(lambda x: x[-1], outputs.primary.matching), sizes, 10)

    learn, steps = jax.jit(jax.value_and_grad(loss_of, has_aux=True)), []
    for _ in range(4):
        steps.append(learn(params))
        # Steps of equal length, like Adam's first one, without another program to compile.
        params = jax.tree.map(lambda p, g: np.asarray(p) - 3e-3 * np.sign(np.asarray(g)), params, steps[-1][1])
    losses = [float(loss) for (loss, _), _ in steps]
    assert min(losses[1:]) < losses[0], losses
    gradients = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(steps[0][1])["refiner"])
    still = [jax.tree_util.keystr(path, simple=True, separator=".") for path, g in gradients if not np.asarray(g).any()]
    assert {".".join(name.split(".")[:3]) for name in still} == set(without_gradient)
    boxes, scores, labels, valid = steps[0][0][1]
    assert boxes.shape == (2, 10, 4)
    assert np.all(valid)
    assert np.all(np.isfinite(boxes))
    assert np.ptp(scores) > 0
    assert set(np.unique(labels)) <= set(range(tiny.CLASSES))


def assert_trains_and_evaluates(c, dataset):
    """Asserts that steps of training lower the loss and move every weight of the refiner, and that it can be evaluated."""
    graph, params, frozen = random_weights(c)
    before = jax.tree.map(np.array, nnx.to_pure_dict(params)["refiner"])
    optimizer = make_optimizer(c)
    step, losses = TrainStep(graph, make_criterion(c), optimizer, 0), []
    state = TrainState(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params))
    batch = DeviceBatch(jnp.asarray(IMAGES), tiny.targets([2, 1], 4, [[64, 64], [48, 40]]))
    state, batch = replicate(step.mesh, state), shard(step.mesh, jax.tree.map(lambda x: x[None], batch), axis=1)
    for _ in range(4):
        state, numbers = step(state, batch, 3e-3)
        losses.append(float(numbers["loss"]))
    assert min(losses[1:]) < losses[0], losses
    after = nnx.to_pure_dict(state.params)["refiner"]
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    still = [jax.tree_util.keystr(key) for key, value in jax.tree_util.tree_leaves_with_path(moved) if not value]
    assert not still, still
    result = Evaluator(c, dataset, graph).run(nnx.merge_state(state.params, state.frozen))
    assert 0 <= result.metrics["AP"] <= 1
    assert len(result.detections) == 10 * len(dataset)
    assert np.ptp([found["score"] for found in result.detections]) > 0
    assert np.all(np.isfinite([found["bbox"] for found in result.detections]))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three images of three classes."""
    directory = tiny.write_coco(tmp_path_factory.mktemp("coco"))
    return load_coco(directory, "val2017", "annotations/instances_val2017.json")


def test_the_ablations_are_the_rows_of_three_tables():
    assert [sum(name.startswith(f"table{number}") for name in VARIANTS) for number in (5, 6, 7)] == [6, 7, 6]


def row(variant):
    """The config of an ablation, shallow."""
    full = load_config(f"{ABLATIONS}:{variant}")
    assert full.model.queries.count == 300
    assert not full.augmentation.strong_views
    keys = ("primary", "auxiliaries", "merge", "merge_points", "merge_initial")
    return shallow(**{key: full.model.refiner[key] for key in keys})


# Each refiner alone, and all three with the published merge. Other rows combine the same parts.
ALWAYS = ("table5", "table6_attention_ffn", "table7_vector_2")
ROWS = [name if name.startswith(ALWAYS) else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]


@pytest.mark.parametrize("variant", ROWS)
def test_every_row_learns(variant):
    # Fully connected layers on a region replace the query: what they return depends on nothing that came before.
    before = ("layers.primary.attention", "layers.primary.norm1", "position.layers.0", "position.layers.1")
    assert_learns(row(variant), before if variant == "table5_region_fc" else ())


@pytest.mark.slow
def test_programs_for_gpus_compute_the_same():
    """On GPUs the numbers of queries and bins are filled up, here 8 + 1 to 16 and 9 to 16, and layers are no loop."""
    config = shallow(primary="deformable", auxiliaries=("regional_attention", "dynamic_conv", "region_fc"))
    config.model.refiner.layers, config.model.queries.count = 2, 9
    graph, params, frozen = random_weights(config)
    sizes = jnp.array([[64, 64], [48, 40]])

    def run(platform):
        def loss(params):
            detector = nnx.merge(graph, params, frozen)
            outputs = detector(detector.normalize(IMAGES, sizes), sizes, train=True)
            kept = outputs.primary, outputs.branches, outputs.intermediates.reference_boxes
            # Sines, so that each result has a different gradient.
            floats = [leaf for leaf in jax.tree.leaves(kept) if leaf.dtype == jnp.float32]
            return sum(jnp.mean(jnp.sin(leaf)) for leaf in floats), floats

        with programs_for(platform):
            return jax.jit(jax.grad(loss, has_aux=True))(params)

    for one, other in zip(jax.tree.leaves(run("cpu")), jax.tree.leaves(run("cuda")), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_all_refiners_at_once_in_another_order(dataset):
    """Each refiner but one is an auxiliary one of another primary refiner, with a branch of its own."""
    auxiliaries = ("point", "deformable", "region_fc", "regional_attention", "global_attention")
    assert_trains_and_evaluates(shallow(primary="dynamic_conv", auxiliaries=auxiliaries), dataset)


class Scale(nnx.Module):
    """An interaction with a setting of its own: multiplies the query."""

    needs_regions = False

    def __init__(self, shared, *, factor, rngs):
        self.given = factor
        self.factor = nnx.Param(jnp.full(shared.channels, factor))

    def __call__(self, query, position, surroundings):
        return query * self.factor


def test_a_new_refiner_needs_an_entry_alone(monkeypatch):
    monkeypatch.setitem(build.INTERACTIONS, "scale", Scale)
    config = shallow(primary="deformable", auxiliaries=("scale",)).model
    config.refiner.scale = {"factor": 3.0}
    detector = abstract_detector(config, tiny.CLASSES)
    (auxiliary,) = detector.refiner.layers.auxiliaries
    assert isinstance(auxiliary.interaction, Scale)
    assert (auxiliary.interaction.given, auxiliary.interaction.factor.shape) == (3.0, (1, 16))
    assert detector.refiner.branches == ("scale",)


@pytest.mark.parametrize("refiner", sorted(build.INTERACTIONS))
def test_padding_does_not_matter_to_any_refiner(refiner):
    graph, params, frozen = random_weights(shallow(primary=refiner, auxiliaries=()))
    detector = nnx.merge(graph, params, frozen)
    sizes = np.array([[48, 40]], np.int32)
    image = IMAGES[:1, :48, :40]
    alone = detect(detector, image, sizes)
    padded = np.full((1, 64, 96, 3), 7, np.uint8)
    padded[:, :48, :40] = image
    for a, b in zip(alone, detect(detector, padded, sizes)):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["fixed", "learned_scalar", "learned_vector"])
def test_initial_weights_of_merges(kind):
    merge = Merge(3, 4, kind, (2.0, 1.0, 0.5), rngs=nnx.Rngs(0))
    paths = [jnp.full((1, 2, 4), value) for value in (1.0, 10.0, 100.0)]
    np.testing.assert_allclose(merge(paths), np.full((1, 2, 4), 62.0))
    assert isinstance(merge.weights, nnx.Param) == (kind != "fixed")
    assert merge.weights.shape == ((4, 3) if kind == "learned_vector" else (3,))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"auxiliaries": ("dynamic_convolution",)}, "dynamic_convolution"),
        ({"primary": "deformabel"}, "deformabel"),
        ({"auxiliaries": ("deformable", "dynamic_conv")}, "twice"),
        ({"merge_initial": (1.0, 1.0)}, "merge_initial has 2 weights for 3 refiners"),
        ({"merge_initial": (1.0, 1.0, 1.0), "merge_xavier": True}, "merge_xavier=False"),
        ({"merge": "learned_vectr"}, "learned_vector"),
        ({"merge": "fixed", "merge_xavier": True}, "merge_xavier=False"),
        ({"merge_points": ("attention", "fnn")}, r"merge_points names 'fnn'; known are attention, interaction, ffn"),
        (
            {"primary": "global_attention", "global_attention": {"heads": 2, "level": 4, "temperature": 20.0}},
            "levels, 0 to 3",
        ),
    ],
)
def test_ill_formed_refiners_get_a_sentence(setting, sentence):
    config = tiny.config().model
    config.refiner.update(setting)
    with pytest.raises(UserError, match=sentence):
        nnx.eval_shape(lambda: build_detector(config, tiny.CLASSES, rngs=nnx.Rngs(0)))

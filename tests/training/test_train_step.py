"""The programs of a step against one program that does all of it at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from loss_terms import loss_terms

from hpr_jax.losses.build import make_criterion
from hpr_jax.losses.criterion import Criterion
from hpr_jax.losses.matching import Request
from hpr_jax.runtime.devices import replicate, shard
from hpr_jax.training.optimizer import Optimizer
from hpr_jax.training.pullback import Scalar, Variable, with_variables, without_variables
from hpr_jax.training.state import TrainState
from hpr_jax.training.step import DeviceBatch, TrainStep
from hpr_jax.types import BranchPredictions, DenoisingQueries, Outputs, Predictions

# That of tiny runs, so that the programs are theirs, and compiled once.
SEED = 0
CRITERION = make_criterion(tiny.config())


class Descent(Optimizer):
    """Plain gradient descent, so that the change of the parameters is the gradient."""

    def __init__(self):
        super().__init__(clip_norm=0.0, weight_decay=0.0, backbone_multiplier=1.0)

    def update(self, gradients, state, params, learning_rate):
        return jax.tree.map(lambda p, g: p - learning_rate * g, params, gradients), state


@functools.cache
def step():
    return TrainStep(nnx.split(tiny.detector())[0], CRITERION, Descent(), SEED)


def state_and_batch():
    """The same state before the first step, and the same batch of one view of two images, at every call."""
    params, frozen = nnx.split_state(nnx.state(tiny.detector()), nnx.Param, ...)
    # Copied, since a step donates its state.
    state = TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), frozen, ())
    images = np.random.default_rng(0).integers(0, 255, (2, tiny.SIDE, tiny.SIDE, 3)).astype(np.uint8)
    batch = DeviceBatch(jnp.asarray(images), tiny.targets([2, 1], 4, [[60, 50], [64, 64]]))
    batch = jax.tree.map(lambda x: x[None], batch)
    return replicate(step().mesh, state), shard(step().mesh, batch, axis=1)


@pytest.mark.slow
def test_the_programs_do_what_one_does():
    state, batch = state_and_batch()
    only_view = jax.tree.map(lambda x: x[0], batch)

    def at_once(params):
        detector, targets = nnx.merge(step().graph, params, state.frozen), only_view.targets
        draw_key, drop_key = jax.random.split(jax.random.fold_in(jax.random.key(SEED), state.step))
        denoising = detector.denoiser.draw(draw_key, targets)
        images = detector.normalize(only_view.images, targets.sizes)
        drop_keys = jax.random.split(drop_key, len(images))
        outputs = detector(images, targets.sizes, denoising=denoising, train=True, keys=drop_keys)
        terms = {name: jnp.sum(term) for name, term in loss_terms(CRITERION, outputs, targets, denoising).items()}
        return sum(terms.values()), terms

    (loss, terms), gradients = jax.jit(jax.value_and_grad(at_once, has_aux=True))(state.params)
    expected = jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * np.asarray(g), state.params, gradients)
    new, numbers = step()(state, batch, 0.1)
    np.testing.assert_allclose(numbers["loss"], loss, rtol=1e-5)
    assert terms.keys() == numbers.keys() - {"loss", "gradient_norm"}
    for name, term in terms.items():
        np.testing.assert_allclose(numbers[name], term, rtol=1e-4, atol=1e-5, err_msg=name)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(gradients))
    for ours, theirs in zip(jax.tree.leaves(new.params), jax.tree.leaves(expected)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)
    assert int(new.step) == 1


def test_one_compilation_serves_all_steps():
    state, batch = state_and_batch()
    for number in range(3):
        state, numbers = step()(state, batch, 1e-3 / (1 + number))
        assert np.isfinite(numbers["loss"])
    assert int(state.step) == 3
    assert step().compilations == 4


def test_memory_goes_back_before_the_backward_pass(monkeypatch):
    calls, compiled = [], step().backward

    def backward(*arguments):
        calls.append("backward")
        return compiled(*arguments)

    monkeypatch.setattr("hpr_jax.training.step.return_freed_memory", lambda: calls.append("memory"))
    monkeypatch.setattr(step(), "backward", backward)
    step()(*state_and_batch(), 0.1)
    assert calls == (["memory", "backward"] if step().on_cpu else ["backward"])


def test_what_is_saved_for_the_backward_pass():
    """No copy of a parameter. Nor does a program call the host: such programs are never kept in the compilation cache."""
    state, batch = state_and_batch()
    part = jnp.int32(0)
    forward = jax.eval_shape(step().forward, state, batch, part)
    saved = jax.tree.leaves(forward.pullback, is_leaf=lambda x: isinstance(x, Variable))
    kernels = {leaf.shape for leaf in jax.tree.leaves(state.params) if leaf.ndim >= 2 and leaf.size > 256}
    assert any(isinstance(leaf, Variable) for leaf in saved)
    assert kernels.isdisjoint(leaf.shape for leaf in saved if not isinstance(leaf, Variable))
    assert "callback" not in step().forward.lower(state, batch, part).as_text()
    cotangents = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, forward.outputs)
    assert "callback" not in step().backward.lower(state, forward.pullback, cotangents).as_text()


class Drawing(nnx.Module):
    """Takes the place of a detector: draws logits by the keys for drop path, and denoising queries by their key."""

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(1))
        self.denoiser = nnx.data(self.Denoiser())

    class Denoiser(nnx.Module):
        def draw(self, key, targets, views):
            noise = jax.random.uniform(key, targets.boxes.shape)
            kinds = dict.fromkeys(("labels", "target", "group", "used", "object", "positive"), targets.labels)
            return DenoisingQueries(boxes=noise, **kinds)

    def normalize(self, images, sizes):
        return images.astype(jnp.float32)

    def __call__(self, images, sizes, *, denoising, train, keys):
        drawn = jax.vmap(lambda key: jax.random.uniform(key, (2, 4)))(keys)
        found = Predictions(drawn * self.weight[0], images[:, :2, 0, :1] + jnp.zeros((1, 1, 4)), drawn[..., 0] > 0)
        layers = jax.tree.map(lambda x: x[None], found)
        nothing: Any = None
        return Outputs(BranchPredictions(layers, None, None), {}, found, None, intermediates=nothing)


class NoRequests(Criterion):
    """A criterion that has nothing to match."""

    def requests(self, outputs, targets):
        return []


@functools.cache
def drawing_step(seed, parts):
    return TrainStep(nnx.split(Drawing())[0], NoRequests(branch_weights=()), Descent(), seed, parts=parts)


class TestWhatIsRandom:
    """What steps draw for two views of three images."""

    def drawn(self, step=0, seed=SEED, parts=1):
        """The logits of each view of each image, and the noise of the denoising queries."""
        params, frozen = nnx.split_state(nnx.state(Drawing()), nnx.Param, ...)
        trained = drawing_step(seed, parts)
        batch = DeviceBatch(
            jnp.zeros((2, 3, 4, 4, 3), jnp.uint8),
            jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), tiny.targets([1] * 6, 2, [[4, 4]] * 6)),
        )
        found = [
            trained.outputs(TrainState(jnp.int32(step), params, frozen, None), batch, jnp.int32(part))
            for part in range(parts)
        ]
        logits = np.concatenate([np.asarray(one.outputs.proposals.logits) for one in found])
        return [tuple(row.ravel().tolist()) for row in logits], np.asarray(found[0].denoising.boxes)

    def test_every_view_of_every_image_draws_its_own(self):
        drawn, noise = self.drawn()
        assert len(set(drawn)) == 6
        assert len(np.unique(noise)) == noise.size

    def test_every_step_draws_anew(self):
        (first, noise), (second, other) = self.drawn(step=0), self.drawn(step=1)
        assert set(first).isdisjoint(second)
        assert not np.intersect1d(noise, other).size

    def test_another_seed_draws_others(self):
        (first, noise), (second, other) = self.drawn(), self.drawn(seed=SEED + 1)
        assert set(first).isdisjoint(second)
        assert not np.intersect1d(noise, other).size

    def test_the_same_step_draws_the_same_in_however_many_parts(self):
        (at_once, noise), (in_parts, again) = self.drawn(step=5), self.drawn(step=5, parts=3)
        assert at_once == in_parts
        np.testing.assert_array_equal(noise, again)


def test_a_kernel_solves_as_scipy_does():
    """The step's own problems, where queries do not count and an image has fewer boxes than there is room for."""
    rng = np.random.default_rng(0)
    valid, real = rng.random((3, 2, 12)) < 0.8, jnp.array([[True, True, True], [True, False, False]])
    requests = [
        Request(jnp.asarray(rng.normal(size=(3, 2, 3, 12)), jnp.float32), jnp.asarray(valid), repeats)
        for repeats in ((1, 2, 3), (4, 4, 4))
    ]
    graph = nnx.graphdef(Drawing())
    found = []
    for matching in ("scipy", "pallas"):
        step = TrainStep(graph, NoRequests(branch_weights=()), Descent(), 0, matching=matching)
        found.append(step.solve(requests, real))
        assert step.compilations == (matching == "pallas")
    for by_scipy, by_kernel in zip(*found):
        np.testing.assert_array_equal(by_scipy, by_kernel)
        assert np.max(by_scipy[:, 0]) == 2


def test_numbers_between_the_programs():
    """All that a device saves has an axis, at which it is joined with what the others save; numbers are given one."""
    weights = jnp.array([1.0, 2.0])
    _, pullback = jax.vjp(lambda weights: jnp.sum(jnp.sin(weights[0]) * weights), weights)
    saved = without_variables(pullback, [weights])
    assert all(leaf.ndim for leaf in jax.tree.leaves(saved))
    kinds = {type(leaf) for leaf in jax.tree.leaves(saved, is_leaf=lambda leaf: isinstance(leaf, Variable | Scalar))}
    assert {Scalar, Variable} <= kinds
    np.testing.assert_array_equal(with_variables(saved, [weights])(1.0)[0], pullback(1.0)[0])

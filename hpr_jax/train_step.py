"""One optimisation step, as two compiled programs with the solving of the matching problems between them.

A host callback inside one program would do, too, but programs with callbacks are never kept in the compilation cache, and
under several devices on few cores they can lock each other out.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hpr_jax.losses.assignment import Request, solve_on_host
from hpr_jax.losses.criterion import Criterion
from hpr_jax.optimizer import Optimizer, global_norm
from hpr_jax.types import DenoisingQueries, Outputs, Targets


@flax.struct.dataclass
class TrainState:
    """What a step changes, and the variables that it does not (`frozen`)."""

    step: jax.Array
    params: nnx.State
    frozen: nnx.State
    optimizer: Any


@flax.struct.dataclass
class DeviceBatch:
    """The part of a batch that a step reads: uint8 images `[B, H, W, 3]` and their targets."""

    images: jax.Array
    targets: Targets


StepNumbers = dict[str, jax.Array]


@flax.struct.dataclass
class ForwardPass:
    """What the first program hands to the host and to the second one.

    Attributes:
      outputs: of the detector, without intermediates.
      pullback: from gradients of the outputs' floats to those of the parameters; `Variable`s stand in for the state's.
      requests: the matching problems.
      denoising: the queries that were drawn, or None.
    """

    outputs: Outputs
    pullback: Any
    requests: list[Request]
    denoising: DenoisingQueries | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Variable:
    """Stands for a leaf of a tree that both programs have, by its number."""

    number: int


class TrainStep:
    """Takes a state, a batch and the learning rate; returns the new state (the old one is donated) and numbers: every loss
    term, `loss` and `gradient_norm`. Batches have `views` views of each image, all first views in front."""

    def __init__(self, graph: nnx.GraphDef, criterion: Criterion, optimizer: Optimizer, seed: int, views: int = 1):
        self.graph, self.criterion, self.optimizer, self.seed, self.views = graph, criterion, optimizer, seed, views
        self.forward = jax.jit(self._forward)
        self.backward = jax.jit(self._backward, donate_argnums=0)

    def __call__(self, state: TrainState, batch: DeviceBatch, learning_rate: float) -> tuple[TrainState, StepNumbers]:
        forward = self.forward(state, batch)
        return self.backward(state, batch, forward, solve(forward.requests, batch.targets.valid), learning_rate)

    def _forward(self, state: TrainState, batch: DeviceBatch) -> ForwardPass:
        draw_key, drop_key = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), state.step))
        detector, targets = nnx.merge(self.graph, state.params, state.frozen), batch.targets
        denoising = detector.denoiser.draw(draw_key, targets, self.views) if detector.denoiser is not None else None
        images = detector.normalize(batch.images, targets.sizes)

        def predict(params):
            detector = nnx.merge(self.graph, params, state.frozen)
            outputs = detector(images, targets.sizes, denoising=denoising, train=True, key=drop_key)
            return _split(outputs.replace(intermediates=None))

        floats, pullback, others = jax.vjp(predict, state.params, has_aux=True)
        outputs = _join(floats, others)
        requests = self.criterion.requests(outputs, targets)
        return ForwardPass(outputs, _without(pullback, state), requests, denoising)

    def _backward(
        self,
        state: TrainState,
        batch: DeviceBatch,
        forward: ForwardPass,
        assigned: list[jax.Array],
        learning_rate: jax.Array,
    ) -> tuple[TrainState, StepNumbers]:
        floats, others = _split(forward.outputs)

        def loss_of(floats):
            terms = self.criterion.terms(_join(floats, others), batch.targets, forward.denoising, assigned)
            terms = {name: jnp.sum(term) for name, term in terms.items()}
            return sum(terms.values()), terms

        (loss, terms), of_outputs = jax.value_and_grad(loss_of, has_aux=True)(floats)
        (gradients,) = _with(forward.pullback, state)(of_outputs)
        numbers = {**terms, "loss": loss, "gradient_norm": global_norm(gradients)}
        params, moments = self.optimizer.update(gradients, state.optimizer, state.params, learning_rate)
        return state.replace(step=state.step + 1, params=params, optimizer=moments), numbers


def solve(requests: list[Request], target_valid: jax.Array) -> list[np.ndarray]:
    """Waits for the costs and solves the problems: for each request the index of each query's box, or -1."""
    requests, target_valid = jax.device_get((requests, target_valid))
    return solve_on_host(
        [request.cost for request in requests],
        [request.query_valid for request in requests],
        target_valid,
        [request.repeats for request in requests],
    )


def _split(tree):
    """A tree's floats and its other leaves, None where the leaf is in the other tree."""
    is_float = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating), tree)
    return (
        jax.tree.map(lambda x, keep: x if keep else None, tree, is_float),
        jax.tree.map(lambda x, keep: None if keep else x, tree, is_float),
    )


def _join(floats, others):
    return jax.tree.map(lambda a, b: b if a is None else a, floats, others, is_leaf=lambda x: x is None)


def _without(tree, state):
    """The tree with a `Variable` for each leaf that is one of the state's: the second program has the state anyhow, and may
    overwrite its memory only if nothing else refers to it."""
    numbers = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(state))}
    return jax.tree.map(lambda leaf: Variable(numbers[id(leaf)]) if id(leaf) in numbers else leaf, tree)


def _with(tree, state):
    leaves = jax.tree.leaves(state)

    def known(x):
        return isinstance(x, Variable)

    return jax.tree.map(lambda x: leaves[x.number] if known(x) else x, tree, is_leaf=known)

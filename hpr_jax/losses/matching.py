"""Bipartite matching: costs on the device, one host call a step, SciPy's solver on the host."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from hpr_jax.ops.boxes import cxcywh_to_xyxy, generalized_iou, whwh
from hpr_jax.types import Predictions, Targets


@flax.struct.dataclass
class Request:
    """Matching problems of one shape: P problems (layers, branches) for each image.

    Attributes:
      cost: `[P, B, Q, N]`.
      query_valid: bool `[P, B, Q]`; other queries stay unmatched.
      repeats: static, for each problem: a box is matched with this many queries, or with as many as the queries suffice
        for.
    """

    cost: jax.Array
    query_valid: jax.Array
    repeats: tuple[int, ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class CostWeights:
    """Weights of the parts of a matching cost."""

    classes: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


def focal_cost(logits: jax.Array, labels: jax.Array, *, alpha: float = 0.25, gamma: float = 2.0) -> jax.Array:
    """Focal loss as the positive minus as the negative of each label: `[..., Q, K]`, `[..., N]` -> `[..., Q, N]`."""
    probability = jax.nn.sigmoid(logits)
    # The official code adds 1e-12 in the logarithms. XLA would fold that into the 1 of the first, where float32 loses it.
    negative = -jnp.log(jnp.maximum(1 - probability, 1e-12)) * (1 - alpha) * probability**gamma
    positive = -jnp.log(probability + 1e-12) * alpha * (1 - probability) ** gamma
    labels = jnp.broadcast_to(labels[..., None, :], (*logits.shape[:-1], labels.shape[-1]))
    return jnp.take_along_axis(positive - negative, labels, axis=-1)


def matching_cost(predictions: Predictions, targets: Targets, weights: CostWeights) -> jax.Array:
    """DETR's matching cost with focal class cost, L1 on cxcywh: `[P, B, Q, ...]`, `[B, N, ...]` -> `[P, B, Q, N]`."""
    cost = weights.classes * focal_cost(predictions.logits, _per_problem(predictions, targets.labels))
    cost += weights.l1 * _l1_cost(predictions.boxes, targets.boxes)
    return cost + weights.giou * _giou_cost(predictions.boxes, targets)


def dense_cost(predictions: Predictions, targets: Targets, weights: CostWeights) -> jax.Array:
    """DDQ's cost for dense queries. As published it applies the sigmoid twice, and takes L1 on xyxy."""
    probability = jax.nn.sigmoid(predictions.logits)
    cost = weights.classes * focal_cost(probability, _per_problem(predictions, targets.labels))
    cost += weights.l1 * _l1_cost(cxcywh_to_xyxy(predictions.boxes), cxcywh_to_xyxy(targets.boxes))
    return cost + weights.giou * _giou_cost(predictions.boxes, targets)


def _per_problem(predictions, labels):
    return jnp.broadcast_to(labels, (len(predictions.logits), *labels.shape))


def _l1_cost(boxes, targets):
    return jnp.sum(jnp.abs(boxes[..., :, None, :] - targets[:, None, :, :]), axis=-1)


def _giou_cost(boxes, targets):
    scale = whwh(targets.sizes)[:, None, None]
    return -generalized_iou(
        cxcywh_to_xyxy(boxes)[..., :, None, :] * scale, cxcywh_to_xyxy(targets.boxes)[:, None, :, :] * scale
    )


def assign(requests: Sequence[Request], target_valid: jax.Array) -> list[jax.Array]:
    """Solves all problems of a step in one host call.

    Args:
      target_valid: bool `[B, N]`, the real boxes of each image first.

    Returns:
      For each request the index of each query's box, or -1: int32 `[P, B, Q]`.
    """
    costs = [jax.lax.stop_gradient(request.cost) for request in requests]
    shapes = [jax.ShapeDtypeStruct(cost.shape[:3], jnp.int32) for cost in costs]
    repeats = tuple(request.repeats for request in requests)

    def solve(costs, query_valid, target_valid):
        return solve_on_host(
            [np.asarray(cost) for cost in costs],
            [np.asarray(valid) for valid in query_valid],
            np.asarray(target_valid),
            repeats,
        )

    return jax.pure_callback(solve, shapes, costs, [request.query_valid for request in requests], target_valid)


def solve_on_host(
    costs: Sequence[np.ndarray],
    query_valid: Sequence[np.ndarray],
    target_valid: np.ndarray,
    repeats: Sequence[Sequence[int]],
) -> list[np.ndarray]:
    """Solves all problems with NumPy and SciPy; uses no JAX, so that callbacks may call it. See `assign`."""
    counts = target_valid.sum(axis=1)
    results = [np.full(cost.shape[:3], -1, np.int32) for cost in costs]
    problems = [
        (request, problem, image)
        for request, cost in enumerate(costs)
        for problem in range(cost.shape[0])
        for image in range(cost.shape[1])
        if counts[image]
    ]

    def solve(where):
        request, problem, image = where
        queries = np.flatnonzero(query_valid[request][problem, image])
        cost = costs[request][problem, image][queries, : counts[image]]
        if not np.isfinite(cost).all():
            # For the loss check to report; the solver would raise.
            cost = np.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6)
        copies = max(min(repeats[request][problem], len(queries) // int(counts[image])), 1)
        rows, columns = linear_sum_assignment(np.repeat(cost, copies, axis=1) if copies > 1 else cost)
        results[request][problem, image, queries[rows]] = columns // copies

    list(_pool().map(solve, problems))
    return results


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="matching")

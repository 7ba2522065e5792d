"""Bipartite matching of queries with boxes: costs are computed on the device; SciPy solves all problems on the host, or a
kernel on the device. Both find the assignment with the smallest sum of costs, so that it makes no difference which."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from hpr_jax.kernels import assignment
from hpr_jax.ops.boxes import cxcywh_to_xyxy, generalized_iou, whwh
from hpr_jax.types import Predictions, Targets

# What a cost counts that is infinite or no number. SciPy would raise an error. The loss will not be finite either, which is
# what ends the run.
HUGE = 1e6


@flax.struct.dataclass
class Request:
    """Matching problems of one shape: P problems, which are layers of branches, for each image.

    Attributes:
      cost: cost of matching a box with a query, `[P, B, N, Q]`.
      query_valid: bool `[P, B, Q]`; other queries stay unmatched.
      repeats: static, for each problem the number of queries that are matched with one box. It is lower if there are too few
        queries for all boxes, but at least 1.
    """

    cost: jax.Array
    query_valid: jax.Array
    repeats: tuple[int, ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class CostWeights:
    """Weights of the three parts of a matching cost."""

    classes: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


def focal_cost(logits: jax.Array, labels: jax.Array, *, alpha: float = 0.25, gamma: float = 2.0) -> jax.Array:
    """The class cost of Deformable DETR: focal loss of a query as a positive of a label, minus that as a negative.

    Args:
      logits: `[..., Q, K]`.
      labels: classes of the boxes, int32 `[..., N]`.

    Returns:
      `[..., N, Q]`.
    """
    probability = jax.nn.sigmoid(logits)
    # The official code adds 1e-12 in the logarithms. XLA would fold that into the 1 of the first, where float32 loses it.
    negative = -jnp.log(jnp.maximum(1 - probability, 1e-12)) * (1 - alpha) * probability**gamma
    positive = -jnp.log(probability + 1e-12) * alpha * (1 - probability) ** gamma
    return jnp.take_along_axis(jnp.swapaxes(positive - negative, -1, -2), labels[..., None], axis=-2)


def matching_cost(predictions: Predictions, targets: Targets, weights: CostWeights) -> jax.Array:
    """The matching cost of Deformable DETR: class cost, L1 distance of normalised cxcywh, generalised IoU in pixels.

    Args:
      predictions: `[P, B, Q, ...]`.
      targets: `[B, N, ...]`.

    Returns:
      `[P, B, N, Q]`.
    """
    cost = weights.classes * focal_cost(predictions.logits, _per_problem(predictions, targets.labels))
    cost += weights.l1 * _l1_cost(predictions.boxes, targets.boxes)
    return cost + weights.giou * _giou_cost(predictions.boxes, targets)


def dense_cost(predictions: Predictions, targets: Targets, weights: CostWeights) -> jax.Array:
    """DDQ's matching cost of dense queries. Shapes are those of `matching_cost`.

    As published, the class cost applies the sigmoid twice, and the L1 distance is that of xyxy.
    """
    probability = jax.nn.sigmoid(predictions.logits)
    cost = weights.classes * focal_cost(probability, _per_problem(predictions, targets.labels))
    cost += weights.l1 * _l1_cost(cxcywh_to_xyxy(predictions.boxes), cxcywh_to_xyxy(targets.boxes))
    return cost + weights.giou * _giou_cost(predictions.boxes, targets)


def _per_problem(predictions: Predictions, labels: jax.Array) -> jax.Array:
    """The labels `[B, N]` for each problem: `[P, B, N]`."""
    return jnp.broadcast_to(labels, (len(predictions.logits), *labels.shape))


def _l1_cost(boxes: jax.Array, targets: jax.Array) -> jax.Array:
    """L1 distance of `[P, B, Q, 4]` and `[B, N, 4]`: `[P, B, N, Q]`."""
    return jnp.sum(jnp.abs(boxes[..., None, :, :] - targets[:, :, None, :]), axis=-1)


def _giou_cost(boxes: jax.Array, targets: Targets) -> jax.Array:
    """Negative generalised IoU, in pixels, of cxcywh `[P, B, Q, 4]` with the boxes of the targets: `[P, B, N, Q]`."""
    scale = whwh(targets.sizes)[:, None, None]
    return -generalized_iou(
        cxcywh_to_xyxy(boxes)[..., None, :, :] * scale, cxcywh_to_xyxy(targets.boxes)[:, :, None, :] * scale
    )


def solve_on_host(
    costs: Sequence[np.ndarray],
    query_valid: Sequence[np.ndarray],
    target_valid: np.ndarray,
    repeats: Sequence[Sequence[int]],
) -> list[np.ndarray]:
    """Solves all problems of a step, on threads. It uses no JAX, so that a callback from a device may call it.

    Args:
      costs: for each request the costs, `[P, B, N, Q]`.
      query_valid: for each request, bool `[P, B, Q]`; other queries stay unmatched.
      target_valid: bool `[B, N]`; the real boxes of an image come first.
      repeats: for each request and problem the number of queries that are matched with one box; see `Request`.

    Returns:
      For each request the index of each query's box, or -1: int32 `[P, B, Q]`.
    """
    counts = target_valid.sum(axis=1)
    results = [np.full(valid.shape, -1, np.int32) for valid in query_valid]
    problems = [
        (request, problem, image)
        for request, cost in enumerate(costs)
        for problem in range(cost.shape[0])
        for image in range(cost.shape[1])
        if counts[image]
    ]

    def solve(where: tuple[int, int, int]) -> None:
        request, problem, image = where
        queries = np.flatnonzero(query_valid[request][problem, image])
        cost = costs[request][problem, image][: counts[image], queries]
        if not np.isfinite(cost).all():
            cost = np.nan_to_num(cost, nan=HUGE, posinf=HUGE, neginf=-HUGE)
        copies = max(min(repeats[request][problem], len(queries) // int(counts[image])), 1)
        rows, columns = linear_sum_assignment(np.repeat(cost, copies, axis=0) if copies > 1 else cost)
        results[request][problem, image, queries[columns]] = rows // copies

    list(_pool().map(solve, problems))
    return results


def solve_on_device(requests: Sequence[Request], target_valid: jax.Array, *, interpret: bool = False) -> list[jax.Array]:
    """Solves all problems of a step by a kernel, without waiting for the host.

    Args:
      requests: the problems.
      target_valid: bool `[B, N]`; the real boxes of an image come first.
      interpret: whether the kernel is interpreted, on any platform.

    Returns:
      For each request the index of each query's box, or -1: int32 `[P, B, Q]`.
    """
    counts = jnp.sum(target_valid, axis=1, dtype=jnp.int32)
    return [
        assignment.solve(
            jnp.nan_to_num(request.cost, nan=HUGE, posinf=HUGE, neginf=-HUGE),
            request.query_valid,
            counts,
            jnp.array(request.repeats, jnp.int32),
            interpret=interpret,
        )
        for request in requests
    ]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="matching")

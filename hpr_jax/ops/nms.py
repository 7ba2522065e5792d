"""Greedy non-maximum suppression with static shapes.

Boxes are visited by falling score, and by rising index among equal scores. A box survives if it is not suppressed, that is
if its IoU with every survivor visited before is at most the threshold.
"""

from functools import partial

import jax
import jax.numpy as jnp

from hpr_jax.kernels import nms as kernel
from hpr_jax.ops.boxes import intersection_and_union
from hpr_jax.ops.dispatch import dispatch

# Number of boxes that `nms_first` compares at a time.
BLOCK = 512


def _overlaps_more(a: jax.Array, b: jax.Array, threshold: float) -> jax.Array:
    """Whether the IoU of xyxy boxes is above the threshold, broadcast over the leading axes of a and b."""
    # Compared without a division, so that two empty boxes do not suppress each other.
    intersection, union = intersection_and_union(a, b)
    return intersection > threshold * union


def nms_first(
    boxes: jax.Array,
    scores: jax.Array,
    candidates: jax.Array,
    count: int,
    threshold: float,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The best `count` survivors among many boxes.

    Args:
      boxes: xyxy `[M, 4]`.
      scores: `[M]`, finite.
      candidates: bool `[M]`; other boxes neither survive nor suppress.
      count: how many survivors are wanted, static.
      threshold: IoU above which a box suppresses a worse one, static.
      implementation: see `dispatch`.

    Returns:
      Indices of the survivors, int32 `[count]`, by falling score, and bool `[count]`, false where there were no more (the
      index is 0 there).
    """
    order = _by_falling_score(scores, candidates)
    xla = partial(_survivors_by_blocks, count=count, threshold=threshold)
    pallas = partial(kernel.survivors, count=count, threshold=threshold)
    total = jnp.sum(candidates, dtype=jnp.int32)
    index, number = dispatch("NMS", implementation, xla, pallas, boxes[order], total)
    found = jnp.arange(count) < number
    return jnp.where(found, order[jnp.where(found, index, 0)], 0), found


def _by_falling_score(scores: jax.Array, candidates: jax.Array) -> jax.Array:
    """Indices of the candidates by falling score, and by rising index among equals; then those of the other boxes."""
    numbers = jnp.arange(len(scores), dtype=jnp.int32)
    return jax.lax.sort((jnp.where(candidates, -scores, jnp.inf), numbers), num_keys=1, is_stable=True)[1]


def _survivors_by_blocks(boxes: jax.Array, total: jax.Array, *, count: int, threshold: float) -> tuple[jax.Array, jax.Array]:
    """See `kernels.nms.survivors`.

    The boxes are compared block by block until there are enough survivors. That takes a few rounds of wide operations, where
    `count` rounds would find one survivor each, and the full matrix has `M * M` overlaps.
    """
    boxes = jnp.pad(boxes, ((0, -len(boxes) % BLOCK), (0, 0)))

    def more(state):
        start, _, found, _ = state
        return (start < total) & (found < count)

    def next_block(state):
        start, chosen, found, chosen_boxes = state
        block = jax.lax.dynamic_slice(boxes, (start, 0), (BLOCK, 4))
        before = jnp.arange(count) < found
        suppressed = jnp.any(_overlaps_more(chosen_boxes[:, None], block, threshold) & before[:, None], axis=0)
        candidates = (start + jnp.arange(BLOCK) < total) & ~suppressed
        earlier = jnp.arange(BLOCK)[:, None] < jnp.arange(BLOCK)
        survivors = _greedy(earlier & _overlaps_more(block[:, None], block, threshold), candidates)
        # Survivors beyond `count` get a place outside of the array, and are dropped.
        place = jnp.where(survivors, found + jnp.cumsum(survivors) - 1, count)
        return (
            start + BLOCK,
            chosen.at[place].set(start + jnp.arange(BLOCK, dtype=jnp.int32), mode="drop"),
            found + jnp.sum(survivors),
            chosen_boxes.at[place].set(block, mode="drop"),
        )

    nothing = (0, jnp.zeros(count, jnp.int32), jnp.int32(0), jnp.zeros((count, 4), boxes.dtype))
    _, chosen, found, _ = jax.lax.while_loop(more, next_block, nothing)
    return chosen, found


def nms_mask(
    boxes: jax.Array, scores: jax.Array, candidates: jax.Array, threshold: float, *, implementation: str | None = None
) -> jax.Array:
    """Which boxes survive. As XLA operations it is computed from the overlaps of all pairs: for few boxes.

    Args:
      boxes: xyxy `[M, 4]`.
      scores: `[M]`.
      candidates: bool `[M]`; other boxes neither survive nor suppress.
      threshold: IoU above which a box suppresses a worse one, static.
      implementation: see `dispatch`.

    Returns:
      bool `[M]`.
    """
    xla, pallas = partial(_mask_by_pairs, threshold=threshold), partial(_mask_by_kernel, threshold=threshold)
    return dispatch("NMS", implementation, xla, pallas, boxes, scores, candidates)


def _mask_by_kernel(
    boxes: jax.Array, scores: jax.Array, candidates: jax.Array, *, threshold: float, interpret: bool
) -> jax.Array:
    order, total, count = _by_falling_score(scores, candidates), jnp.sum(candidates, dtype=jnp.int32), len(scores)
    index, number = kernel.survivors(boxes[order], total, count, threshold, interpret=interpret)
    # Places behind the last survivor lie outside of the mask, and are dropped.
    place = jnp.where(jnp.arange(count) < number, order[jnp.clip(index, 0, count - 1)], count)
    return jnp.zeros(count, bool).at[place].set(True, mode="drop")


def _mask_by_pairs(boxes: jax.Array, scores: jax.Array, candidates: jax.Array, *, threshold: float) -> jax.Array:
    index = jnp.arange(len(scores))
    better = scores[:, None] > scores[None, :]
    first = (scores[:, None] == scores[None, :]) & (index[:, None] < index[None, :])
    return _greedy((better | first) & _overlaps_more(boxes[:, None], boxes[None, :], threshold), candidates)


def _greedy(suppresses: jax.Array, candidates: jax.Array) -> jax.Array:
    """The survivors, bool `[M]`.

    It repeats `survivors = candidates that no survivor suppresses` until nothing changes. That fixed point is the greedy
    result, and takes as many rounds as the longest chain of suppressions is long.

    Args:
      suppresses: bool `[M, M]`, whether box i, if it survives, suppresses box j.
      candidates: bool `[M]`.
    """

    def step(state):
        survivors, _ = state
        new = candidates & ~jnp.any(suppresses & survivors[:, None], axis=0)
        return new, jnp.any(new != survivors)

    return jax.lax.while_loop(lambda state: state[1], step, (candidates, jnp.bool_(True)))[0]

"""Greedy non-maximum suppression with static shapes.

Boxes are visited by falling score, equal scores by rising index; a box is suppressed when its IoU with an already kept
one is greater than the threshold.
"""

import jax
import jax.numpy as jnp

from hpr_jax.ops.boxes import intersection_and_union


def _overlaps_more(a: jax.Array, b: jax.Array, threshold: float) -> jax.Array:
    # Without the division two empty boxes do not suppress one another.
    intersection, union = intersection_and_union(a, b)
    return intersection > threshold * union


def nms_first(
    boxes: jax.Array, scores: jax.Array, candidates: jax.Array, count: int, threshold: float
) -> tuple[jax.Array, jax.Array]:
    """The first `count` survivors among many boxes.

    One sweep over all boxes per survivor, `count * M` overlaps in all instead of the `M * M` of the full matrix.

    Args:
      boxes: xyxy `[M, 4]`.
      scores: `[M]`, finite.
      candidates: bool `[M]`; the others neither survive nor suppress.

    Returns:
      indices int32 `[count]` by falling score, and bool `[count]`, false where survivors ran out (index 0 there).
    """

    def pick(remaining, _):
        index = jnp.argmax(jnp.where(remaining, scores, -jnp.inf))
        found = remaining[index]
        remaining &= ~_overlaps_more(boxes[index], boxes, threshold)
        # Its own overlap is not above the threshold when the box is empty.
        remaining = remaining.at[index].set(False)
        return remaining, (jnp.where(found, index, 0).astype(jnp.int32), found)

    return jax.lax.scan(pick, candidates, length=count)[1]


def nms_mask(boxes: jax.Array, scores: jax.Array, candidates: jax.Array, threshold: float) -> jax.Array:
    """Which of few boxes survive.

    Iterates `keep = candidates without those that a kept box suppresses` on the suppression matrix; the fixed point is
    the greedy result, reached after as many rounds as the longest chain of suppressions.

    Args:
      boxes: xyxy `[M, 4]`.
      scores: `[M]`.
      candidates: bool `[M]`; the others neither survive nor suppress.

    Returns:
      bool `[M]`.
    """
    index = jnp.arange(len(scores))
    better = scores[:, None] > scores[None, :]
    first = (scores[:, None] == scores[None, :]) & (index[:, None] < index[None, :])
    suppresses = (better | first) & _overlaps_more(boxes[:, None], boxes[None, :], threshold)
    suppresses &= candidates[:, None]

    def step(state):
        keep, _ = state
        new = candidates & ~jnp.any(suppresses & keep[:, None], axis=0)
        return new, jnp.any(new != keep)

    return jax.lax.while_loop(lambda state: state[1], step, (candidates, jnp.bool_(True)))[0]

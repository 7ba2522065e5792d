"""Greedy non-maximum suppression with static shapes.

Boxes are visited by falling score, equal scores by rising index; a box is suppressed when its IoU with an already kept
one is greater than the threshold.
"""

import jax
import jax.numpy as jnp

from hpr_jax.ops.boxes import intersection_and_union

# Boxes that `nms_first` looks at at a time.
BLOCK = 512


def _overlaps_more(a: jax.Array, b: jax.Array, threshold: float) -> jax.Array:
    # Without the division two empty boxes do not suppress one another.
    intersection, union = intersection_and_union(a, b)
    return intersection > threshold * union


def nms_first(
    boxes: jax.Array, scores: jax.Array, candidates: jax.Array, count: int, threshold: float
) -> tuple[jax.Array, jax.Array]:
    """The first `count` survivors among many boxes.

    Sorts, then goes from block to block of the best until there are enough survivors: a few rounds of wide operations, as
    against `count` rounds of one survivor each, or the `M * M` overlaps of the full matrix.

    Args:
      boxes: xyxy `[M, 4]`.
      scores: `[M]`, finite.
      candidates: bool `[M]`; the others neither survive nor suppress.

    Returns:
      indices int32 `[count]` by falling score, and bool `[count]`, false where survivors ran out (index 0 there).
    """
    total = jnp.sum(candidates)
    numbers = jnp.arange(len(scores), dtype=jnp.int32)
    _, order = jax.lax.sort((jnp.where(candidates, -scores, jnp.inf), numbers), num_keys=1, is_stable=True)
    order = jnp.pad(order, (0, -len(scores) % BLOCK))

    def more(state):
        start, _, found, _ = state
        return (start < total) & (found < count)

    def next_block(state):
        start, chosen, found, chosen_boxes = state
        index = jax.lax.dynamic_slice(order, (start,), (BLOCK,))
        block = boxes[index]
        before = jnp.arange(count) < found
        suppressed = jnp.any(_overlaps_more(chosen_boxes[:, None], block, threshold) & before[:, None], axis=0)
        candidates = (start + jnp.arange(BLOCK) < total) & ~suppressed
        earlier = jnp.arange(BLOCK)[:, None] < jnp.arange(BLOCK)
        keep = _greedy(earlier & _overlaps_more(block[:, None], block, threshold), candidates)
        # Survivors beyond `count` find no place.
        place = jnp.where(keep, found + jnp.cumsum(keep) - 1, count)
        return (
            start + BLOCK,
            chosen.at[place].set(index, mode="drop"),
            found + jnp.sum(keep),
            chosen_boxes.at[place].set(block, mode="drop"),
        )

    nothing = (0, jnp.zeros(count, jnp.int32), 0, jnp.zeros((count, 4), boxes.dtype))
    _, chosen, found, _ = jax.lax.while_loop(more, next_block, nothing)
    return chosen, jnp.arange(count) < found


def nms_mask(boxes: jax.Array, scores: jax.Array, candidates: jax.Array, threshold: float) -> jax.Array:
    """Which of few boxes survive.

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
    return _greedy((better | first) & _overlaps_more(boxes[:, None], boxes[None, :], threshold), candidates)


def _greedy(suppresses: jax.Array, candidates: jax.Array) -> jax.Array:
    """Survivors, given who would suppress whom, bool `[M, M]`.

    Iterates `keep = candidates without those that a kept box suppresses`; the fixed point is the greedy result, reached
    after as many rounds as the longest chain of suppressions.
    """

    def step(state):
        keep, _ = state
        new = candidates & ~jnp.any(suppresses & keep[:, None], axis=0)
        return new, jnp.any(new != keep)

    return jax.lax.while_loop(lambda state: state[1], step, (candidates, jnp.bool_(True)))[0]

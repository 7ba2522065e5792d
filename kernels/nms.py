"""Greedy non-maximum suppression of sorted boxes, with its loops inside one program for each image.

As XLA operations the loops would be run by the host, which waits for the device in each round to learn whether there is
another one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hpr_jax.kernels.launch import Launch, pallas_call

# Number of boxes that are compared with one another, and with as many survivors, at a time: a power of two.
BLOCK = 64
LAUNCH = Launch(num_warps=16, elements=BLOCK * BLOCK // (32 * 16))


def survivors(
    boxes: jax.Array, total: jax.Array, count: int, threshold: float, *, launch: Launch = LAUNCH, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The first `count` survivors: boxes whose IoU with every survivor before them is at most the threshold.

    Args:
      boxes: xyxy `[M, 4]`, float32, the best ones first.
      total: int32 `[]`; boxes from this number on neither survive nor suppress.
      count: static.
      threshold: static.

    Returns:
      Indices of the survivors, int32 `[count]`, with anything behind the last one, and their number, int32 `[]`.
    """
    index, found = pallas_call(
        functools.partial(_survivors, count=count, threshold=threshold, interpret=interpret),
        out_shape=[((count,), jnp.int32), ((1,), jnp.int32)],
        grid=(1,),
        launch=launch,
        interpret=interpret,
        name="nms",
    )(boxes, total[None])
    return index, found[0]


def _survivors(boxes, total, index, found, *, count, threshold, interpret):
    total = plt.load(total.at[pl.program_id(0)])
    place = jnp.arange(BLOCK, dtype=jnp.int32)
    earlier = place[:, None] < place[None, :]

    def load(row, mask):
        """The four coordinates of these boxes, each `[BLOCK]`."""
        return [plt.load(boxes.at[row, coordinate], mask=mask, other=0.0) for coordinate in range(4)]

    def any_suppresses(suppresses, alive):
        """bool `[BLOCK]`: whether any of the boxes that are alive suppresses this one; `suppresses` is `[BLOCK, BLOCK]`."""
        return jnp.max((suppresses & alive[:, None]).astype(jnp.int32), axis=0) > 0

    def more(state):
        start, number = state
        return (start < total) & (number < count)

    def next_block(state):
        start, number = state
        row = start + place
        exists = row < total
        block = load(row, exists)

        def compare_survivors(first, suppressed):
            slot = first * BLOCK + place
            real = slot < number
            survivor = load(plt.load(index.at[slot], mask=real, other=0), real)
            return suppressed | any_suppresses(_overlaps_more(survivor, block, threshold), real)

        chunks = (number + BLOCK - 1) // BLOCK
        suppressed = jax.lax.fori_loop(0, chunks, compare_survivors, jnp.zeros(BLOCK, jnp.bool_))
        candidates = exists & ~suppressed
        # The fixed point of this is the greedy result; it takes as many rounds as the longest chain of suppressions is long.
        suppresses = earlier & _overlaps_more(block, block, threshold)

        def settle(state):
            alive, _ = state
            new = candidates & ~any_suppresses(suppresses, alive)
            return new, jnp.max((new != alive).astype(jnp.int32))

        alive, _ = jax.lax.while_loop(lambda state: state[1] > 0, settle, (candidates, jnp.int32(1)))
        slot = number + jnp.sum((earlier & alive[:, None]).astype(jnp.int32), axis=0)
        plt.store(index.at[slot], row, mask=alive & (slot < count))
        if not interpret:
            # Other threads of the program read these indices in the next round.
            plt.debug_barrier()
        return start + BLOCK, number + jnp.sum(alive.astype(jnp.int32))

    _, number = jax.lax.while_loop(more, next_block, (jnp.int32(0), jnp.int32(0)))
    plt.store(found.at[pl.program_id(0)], jnp.minimum(number, count))


def _overlaps_more(a, b, threshold):
    """Whether the IoU of boxes a and b is above the threshold: coordinates `[N]` and `[M]` each -> bool `[N, M]`."""
    (left, top, right, bottom), (left_b, top_b, right_b, bottom_b) = [x[:, None] for x in a], [x[None, :] for x in b]
    width = jnp.maximum(jnp.minimum(right, right_b) - jnp.maximum(left, left_b), 0.0)
    height = jnp.maximum(jnp.minimum(bottom, bottom_b) - jnp.maximum(top, top_b), 0.0)
    intersection = width * height
    union = (right - left) * (bottom - top) + (right_b - left_b) * (bottom_b - top_b) - intersection
    # Compared without a division, so that two empty boxes do not suppress each other.
    return intersection > threshold * union

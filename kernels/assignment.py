"""Minimum-cost assignment of queries to boxes, with one program for each problem.

It is the method of shortest augmenting paths (Jonker and Volgenant 1987; Crouse 2016), which SciPy's solver uses, too. Boxes
are assigned one after the other. A Dijkstra search over the queries finds the cheapest chain of reassignments that ends at a
free query, and the prices of the queries it has passed change so that reduced costs stay non-negative. Each round of the
search is a few operations on the vector of all queries, which is what a program has threads for.

Sums are in float64, as in SciPy, because two assignments can differ by less than a rounding error of float32. Several
queries for one box are no repeated rows, but a capacity: all queries of a box have the reduced cost zero, so that the search
passes them at once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hpr_jax.kernels.launch import Launch, pallas_call, power_of_two

# Queries that a thread handles, and the largest numbers of warps of a program and of queries, which fit its registers.
QUERIES_A_THREAD = 4
MOST_WARPS = 32
MOST_QUERIES = 32 * MOST_WARPS * QUERIES_A_THREAD


def solve(cost: jax.Array, usable: jax.Array, boxes: jax.Array, repeats: jax.Array, *, interpret: bool = False) -> jax.Array:
    """The assignment of each problem that has the smallest sum of costs.

    Args:
      cost: `[P, B, N, Q]`, finite, float32.
      usable: whether a query may be assigned, bool `[P, B, Q]`.
      boxes: how many boxes an image has, int32 `[B]`; they come first.
      repeats: how many queries each box gets, int32 `[P]`. It is lower if there are too few queries for all boxes, but at
        least 1; and if there are fewer queries than boxes, each query gets a box.

    Returns:
      The index of the box that each query is assigned to, or -1: int32 `[P, B, Q]`.
    """
    problems, images, _, queries = cost.shape
    width = power_of_two(queries)
    warps = min(max(width // (32 * QUERIES_A_THREAD), 1), MOST_WARPS)
    # Only in this context does JAX know float64. The arguments and the result have types that it always knows.
    with jax.enable_x64(True):
        (assigned,) = pallas_call(
            functools.partial(_solve, width=width),
            out_shape=[((problems, images, queries), jnp.int32)],
            grid=(problems, images),
            launch=Launch(num_warps=warps, elements=QUERIES_A_THREAD),
            interpret=interpret,
            name="assignment",
        )(cost, usable.astype(jnp.int32), boxes, repeats)
    return assigned


def _solve(cost, usable, boxes, repeats, out, *, width):
    problem, image, queries = pl.program_id(0), pl.program_id(1), cost.shape[3]
    column = jnp.arange(width, dtype=jnp.int32)
    exists = column < queries
    usable = plt.load(usable.at[problem, image, column], mask=exists, other=0) != 0
    boxes = plt.load(boxes.at[image])
    available = jnp.sum(usable.astype(jnp.int32), dtype=jnp.int32)
    wanted = jnp.minimum(plt.load(repeats.at[problem]), available // jnp.maximum(boxes, 1))
    copies = jnp.maximum(wanted, 1)

    def costs_of(box):
        row = plt.load(cost.at[problem, image, box, column], mask=exists, other=0)
        return row.astype(jnp.float64)

    def at(values, index):
        """One number of a vector."""
        return jnp.sum(jnp.where(column == index, values, 0), dtype=values.dtype)

    def assign(state):
        number, price, owner = state
        box = number // copies
        # Without a free query, a box that has one must give it up: the search then ends where that costs least.
        full = number >= available
        end, least, passed, distance, parent = _search(box, full, costs_of, at, column, usable, price, owner)
        price = jnp.where(passed & usable, price + distance - least, price)
        _, owner = jax.lax.while_loop(
            lambda state: state[0] >= 0, functools.partial(_reassign, box, at, column, parent), (end, owner)
        )
        return number + 1, price, owner

    start = (jnp.int32(0), jnp.zeros(width, jnp.float64), jnp.full(width, -1, jnp.int32))
    _, _, owner = jax.lax.while_loop(lambda state: state[0] < boxes * copies, assign, start)
    plt.store(out.at[problem, image, column], owner, mask=exists)


def _search(box, full, costs_of, at, column, usable, price, owner):
    """The cheapest chain of reassignments that gives `box` one query more.

    Args:
      full: whether no query is free. The chain then ends at the query that is taken from its box for good.
      costs_of: function of a box -> its costs, float64 `[width]`.
      at: function of a vector and an index -> the number there.
      column: the indices of the queries, `[width]`.
      usable, price, owner: of each query whether it may be assigned, its price, and its box or -1.

    Returns:
      The last query of the chain, or -1 if it is `box` that stays without a query; the cost of the chain; and for each query
      whether the search has passed it, its distance, and the query before it in the chain, or -1 for the first one.
    """
    distance = costs_of(box) - price
    passed = ~usable | (owner == box)
    parent = jnp.full(column.shape, -1, jnp.int32)
    width = jnp.int32(len(column))
    nowhere = 2 * width

    def nearest(distance, passed):
        """The smallest distance of a query that was not passed, and that query, a free one if there is a choice.

        The query is given as its index, to which `width` is added if it has a box; it is `nowhere` if all were passed.
        """
        least = jnp.min(jnp.where(passed, jnp.inf, distance))
        place = jnp.where(owner < 0, column, column + width)
        return least, jnp.min(jnp.where(~passed & (distance == least), place, nowhere))

    def more(state):
        place = state[1]
        return (place >= width) & (place < nowhere)

    def step(state):
        least, place, distance, passed, parent, cheapest, loser = state
        query = place - width
        other = at(owner, query)
        reduced = costs_of(other) - price
        dual = at(reduced, query)
        own = owner == other
        through = least + (reduced - dual)
        shorter = ~passed & ~own & (through < distance)
        distance = jnp.where(own & ~passed, least, jnp.where(shorter, through, distance))
        parent = jnp.where(shorter, query, parent)
        # What it costs if the chain ends here, with `other` going without this query.
        loss = least - dual
        loser = jnp.where(loss < cheapest, query, loser)
        cheapest = jnp.minimum(loss, cheapest)
        passed = passed | own
        return *nearest(distance, passed), distance, passed, parent, cheapest, loser

    # The first candidate to stay without a query is `box` itself.
    state = (*nearest(distance, passed), distance, passed, parent, jnp.float64(0), jnp.int32(-1))
    least, place, distance, passed, parent, cheapest, loser = jax.lax.while_loop(more, step, state)
    return jnp.where(full, loser, place), jnp.where(full, cheapest, least), passed, distance, parent


def _reassign(box, at, column, parent, state):
    """One step from the end of a chain to its start: a query gets the box of the one before it, the first one gets `box`."""
    query, owner = state
    before = at(parent, query)
    new = jnp.where(before < 0, box, at(owner, jnp.maximum(before, 0)))
    return before, jnp.where(column == query, new, owner)

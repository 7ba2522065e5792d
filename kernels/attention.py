"""Masked dot-product attention that keeps no probabilities in memory (FlashAttention, Dao et al. 2022), and its gradients.

A program of the forward kernel has a block of queries, and goes through the keys block by block with a running maximum and
sum of the exponentials. The backward pass computes the probabilities again from these two: for blocks of queries, whose
gradients are sums over keys, and for blocks of keys, whose gradients are sums over queries. Products are those of the
arguments' type, summed in float32.

A query's gradient needs the mean of the gradients of its probabilities. FlashAttention takes the product of the result and
its gradient for it, which is the same but for the rounding of the result: where values are far from zero, the error exceeds
the gradient. So the mean is computed here, in a loop of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hpr_jax.kernels.launch import Launch, pallas_call, power_of_two

# Numbers of queries and of keys of a block, and the smallest side of a matrix that Triton multiplies.
BLOCK, SMALLEST = 64, 16
LAUNCH = Launch(num_warps=4, elements=BLOCK * BLOCK // (32 * 4))


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    masked: float,
    launch: Launch = LAUNCH,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """softmax(query key^T / sqrt(D)) value.

    Args:
      query: `[B, Q, H, D]`.
      key, value: `[B, K, H, D]`, of the type of `query`.
      mask: bool `[B or 1, Q or 1, K]`, true: may see.
      masked: the finite logit of a key that a query may not see.

    Returns:
      The result in the type of `value`, `[B, Q, H, D]`; and for each query and head the largest logit, and the sum of the
      exponentials of logits less that, float32 `[B, H, Q]`.
    """
    batch, queries, heads, _ = query.shape
    numbers = (batch, heads, queries), jnp.float32
    out, largest, total = pallas_call(
        functools.partial(_forward, masked=masked),
        out_shape=[(query.shape, value.dtype), numbers, numbers],
        grid=(pl.cdiv(queries, BLOCK), heads, batch),
        launch=launch,
        interpret=interpret,
        name="attention_forward",
        flops=2 * _product_flops(query, key),
    )(query, key, value, mask.astype(jnp.int8))
    return out, largest, total


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    largest: jax.Array,
    total: jax.Array,
    gradient: jax.Array,
    *,
    masked: float,
    launch: Launch = LAUNCH,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, in their types.

    Args:
      query, key, value, mask, masked: arguments of `forward`.
      largest, total: its results.
      gradient: that of its result.
    """
    batch, queries, heads, _ = query.shape
    arguments = query, key, value, mask.astype(jnp.int8), gradient.astype(query.dtype), largest, total
    call = functools.partial(pallas_call, launch=launch, interpret=interpret)
    query_gradient, mean = call(
        functools.partial(_backward_query, masked=masked),
        out_shape=[(query.shape, query.dtype), (largest.shape, jnp.float32)],
        grid=(pl.cdiv(queries, BLOCK), heads, batch),
        name="attention_backward_query",
        # Two products in the loop over keys for the means, three in the one for the gradient.
        flops=5 * _product_flops(query, key),
    )(*arguments)
    key_gradient, value_gradient = call(
        functools.partial(_backward_key, masked=masked),
        out_shape=[(key.shape, key.dtype), (value.shape, value.dtype)],
        grid=(pl.cdiv(key.shape[1], BLOCK), heads, batch),
        name="attention_backward_key",
        flops=4 * _product_flops(query, key),
    )(*arguments, mean)
    return query_gradient, key_gradient, value_gradient


def _product_flops(query, key):
    """Twice the multiply-adds of a product of all queries with all keys."""
    batch, queries, heads, width = query.shape
    return 2 * batch * heads * queries * key.shape[1] * width


class _Problem:
    """One head of one image inside a kernel: loads blocks of its arrays, and computes blocks of its logits."""

    def __init__(self, query, key, mask, masked):
        self.head, self.image = pl.program_id(1), pl.program_id(2)
        self.query, self.key, self.mask, self.masked = query, key, mask, masked
        self.queries, self.keys, self.width = query.shape[1], key.shape[1], query.shape[3]
        self.channel = jnp.arange(max(power_of_two(self.width), SMALLEST))
        self.scale = self.width**-0.5

    def place(self, row):
        """Where rows of an array `[B, N, H, D]` are."""
        return self.image, row[:, None], self.head, self.channel[None, :]

    def exists(self, array, row):
        """Which pairs of row and channel of an array `[B, N, H, D]` exist: bool `[block, D]`."""
        return (row < array.shape[1])[:, None] & (self.channel < self.width)[None, :]

    def load(self, array, row):
        """Rows of an array `[B, N, H, D]`, zero where there are none: `[block, D]`."""
        return plt.load(array.at[self.place(row)], mask=self.exists(array, row), other=0)

    def store(self, array, row, values):
        plt.store(array.at[self.place(row)], values.astype(array.dtype), mask=self.exists(array, row))

    def numbers(self, array, row, other):
        """Numbers of an array `[B, H, Q]`: `[block]`, `other` where there are none."""
        return plt.load(array.at[self.image, self.head, row], mask=row < self.queries, other=other)

    def logits(self, query_block, key_block, query_row, key_row):
        """Logits of a block, `[queries, keys]`, and whether each key may be seen."""
        image, row = self.image if self.mask.shape[0] > 1 else 0, query_row if self.mask.shape[1] > 1 else query_row * 0
        exists = (key_row < self.keys)[None, :] & (query_row < self.queries)[:, None]
        seen = plt.load(self.mask.at[image, row[:, None], key_row[None, :]], mask=exists, other=0) != 0
        logits = jnp.where(seen, _product(query_block, key_block, transpose_right=True) * self.scale, self.masked)
        return jnp.where((key_row < self.keys)[None, :], logits, -jnp.inf), seen


def _product(left, right, *, transpose_left=False, transpose_right=False):
    """Matrix product, summed in float32; its factors have the same type."""
    axes = (((0 if transpose_left else 1,), (1 if transpose_right else 0,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _rows(number):
    return number * BLOCK + jnp.arange(BLOCK)


def _forward(query, key, value, mask, out, largest, total, *, masked):
    problem, query_row = _Problem(query, key, mask, masked), _rows(pl.program_id(0))
    query_block = problem.load(query, query_row)

    def add_block(number, state):
        result, most, sums = state
        key_row = _rows(number)
        logits, _ = problem.logits(query_block, problem.load(key, key_row), query_row, key_row)
        new = jnp.maximum(most, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp(logits - new[:, None]), jnp.exp(most - new)
        added = _product(weights.astype(value.dtype), problem.load(value, key_row))
        return result * shrink[:, None] + added, new, sums * shrink + jnp.sum(weights, axis=1)

    blocks = pl.cdiv(problem.keys, BLOCK)
    start = jnp.zeros((BLOCK, len(problem.channel))), jnp.full(BLOCK, -jnp.inf), jnp.zeros(BLOCK)
    result, most, sums = jax.lax.fori_loop(0, blocks, add_block, start)
    problem.store(out, query_row, result / sums[:, None])
    for array, numbers in ((largest, most), (total, sums)):
        plt.store(array.at[problem.image, problem.head, query_row], numbers, mask=query_row < problem.queries)


def _probabilities(problem, blocks, rows, numbers, value_block):
    """Probabilities of a block, their gradients, and whether each key may be seen, `[queries, keys]` each.

    Args:
      blocks: query, key and gradient, `[block, D]` each.
      rows: of queries and of keys.
      numbers: largest logit and total of the queries.
    """
    (query_block, key_block, gradient_block), (most, sums) = blocks, numbers
    logits, seen = problem.logits(query_block, key_block, *rows)
    weights = jnp.exp(logits - most[:, None]) / sums[:, None]
    return weights, _product(gradient_block, value_block, transpose_right=True), seen


def _backward_query(query, key, value, mask, gradient, largest, total, query_gradient, mean, *, masked):
    problem, query_row = _Problem(query, key, mask, masked), _rows(pl.program_id(0))
    query_block, gradient_block = problem.load(query, query_row), problem.load(gradient, query_row)
    numbers = problem.numbers(largest, query_row, 0.0), problem.numbers(total, query_row, 1.0)

    def compute(number):
        key_row = _rows(number)
        key_block = problem.load(key, key_row)
        blocks, rows = (query_block, key_block, gradient_block), (query_row, key_row)
        return key_block, *_probabilities(problem, blocks, rows, numbers, problem.load(value, key_row))

    def add_to_mean(number, sums):
        _, weights, weights_gradient, _ = compute(number)
        return sums + jnp.sum(weights * weights_gradient, axis=1)

    def add_to_gradient(number, result):
        key_block, weights, weights_gradient, seen = compute(number)
        logits_gradient = jnp.where(seen, weights * (weights_gradient - means[:, None]) * problem.scale, 0.0)
        return result + _product(logits_gradient.astype(key.dtype), key_block)

    blocks = pl.cdiv(problem.keys, BLOCK)
    means = jax.lax.fori_loop(0, blocks, add_to_mean, jnp.zeros(BLOCK))
    result = jax.lax.fori_loop(0, blocks, add_to_gradient, jnp.zeros((BLOCK, len(problem.channel))))
    problem.store(query_gradient, query_row, result)
    plt.store(mean.at[problem.image, problem.head, query_row], means, mask=query_row < problem.queries)


def _backward_key(query, key, value, mask, gradient, largest, total, mean, key_gradient, value_gradient, *, masked):
    problem, key_row = _Problem(query, key, mask, masked), _rows(pl.program_id(0))
    key_block, value_block = problem.load(key, key_row), problem.load(value, key_row)

    def add_block(number, results):
        of_key, of_value = results
        query_row = _rows(number)
        query_block, gradient_block = problem.load(query, query_row), problem.load(gradient, query_row)
        numbers = problem.numbers(largest, query_row, 0.0), problem.numbers(total, query_row, 1.0)
        blocks, rows = (query_block, key_block, gradient_block), (query_row, key_row)
        weights, weights_gradient, seen = _probabilities(problem, blocks, rows, numbers, value_block)
        means = problem.numbers(mean, query_row, 0.0)
        # Queries beyond the last one have a gradient of zero, and add nothing.
        logits_gradient = jnp.where(seen, weights * (weights_gradient - means[:, None]) * problem.scale, 0.0)
        of_value += _product(weights.astype(value.dtype), gradient_block, transpose_left=True)
        return of_key + _product(logits_gradient.astype(query.dtype), query_block, transpose_left=True), of_value

    nothing = jnp.zeros((BLOCK, len(problem.channel)))
    results = jax.lax.fori_loop(0, pl.cdiv(problem.queries, BLOCK), add_block, (nothing, nothing))
    for array, result in zip((key_gradient, value_gradient), results):
        problem.store(array, key_row, result)

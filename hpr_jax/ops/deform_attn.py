"""Multi-scale deformable sampling (Deformable DETR, Zhu et al. 2021, equation 3, without its projections)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("xla",)


def deformable_sampling(
    value: jax.Array,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Weighted sums of bilinearly interpolated values; outside a level's map everything is zero.

    Args:
      value: `[B, S, H, D]`, the levels' maps flattened row by row and concatenated.
      spatial_shapes: static (height, width) of each level; their products sum to S.
      sampling_locations: `[B, Q, H, L, P, 2]`, (x, y) in [0, 1] over each level's map, corners at the pixels' edges.
      attention_weights: `[B, Q, H, L, P]`.
      implementation: `"xla"`, or None for the best one that runs on the platform.

    Returns:
      `[B, Q, H * D]` in the type of `value`.

    Raises:
      ValueError: an unknown implementation, or shapes that do not fit one another.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"deformable_sampling has no implementation {implementation!r}; choose one of {IMPLEMENTATIONS}.")
    batch, tokens, heads, width = value.shape
    _, queries, _, levels, points, _ = sampling_locations.shape
    if tokens != sum(h * w for h, w in spatial_shapes) or levels != len(spatial_shapes):
        raise ValueError(f"value has {tokens} tokens and locations {levels} levels, but the maps are {spatial_shapes}.")

    # One (image, head) at a time: its table [S, D] stays in cache, and only one table of indices exists at once.
    def per_head(array):
        return jnp.moveaxis(array, 2, 1).reshape(batch * heads, *array.shape[1:2], *array.shape[3:])

    @jax.checkpoint
    def sample_head(args):
        table, locations, weights = args
        index, weight = _corners(spatial_shapes, locations.astype(jnp.float32), weights.astype(jnp.float32))
        return weighted_rows(table, index, weight)

    out = jax.lax.map(sample_head, (per_head(value), per_head(sampling_locations), per_head(attention_weights)))
    return jnp.moveaxis(out.reshape(batch, heads, queries, width), 1, 2).reshape(batch, queries, heads * width)


def weighted_rows(table: jax.Array, index: jax.Array, weight: jax.Array) -> jax.Array:
    """`out[n] = sum_k weight[n, k] * table[index[n, k]]`: table `[S, D]`, index and weight `[N, K]` -> `[N, D]`."""
    rows = table.at[index].get(mode="promise_in_bounds")
    return jnp.einsum("nk,nkd->nd", weight.astype(table.dtype), rows, preferred_element_type=jnp.float32).astype(table.dtype)


def _corners(spatial_shapes, locations, weights):
    """Rows of the value table and their weights: `[Q, L, P, 2]`, `[Q, L, P]` -> int32 and float `[Q, L * P * 4]`."""
    indices, corner_weights = [], []
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        x = locations[:, level, :, 0] * width - 0.5
        y = locations[:, level, :, 1] * height - 0.5
        x0, y0 = jnp.floor(x), jnp.floor(y)
        for dx, wx in ((0, 1.0 - (x - x0)), (1, x - x0)):
            for dy, wy in ((0, 1.0 - (y - y0)), (1, y - y0)):
                column, row = x0 + dx, y0 + dy
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                column, row = jnp.clip(column, 0, width - 1), jnp.clip(row, 0, height - 1)
                indices.append(start + (row * width + column).astype(jnp.int32))
                corner_weights.append(jnp.where(inside, wx * wy * weights[:, level], 0.0))
        start += height * width
    return jnp.concatenate(indices, axis=-1), jnp.concatenate(corner_weights, axis=-1)

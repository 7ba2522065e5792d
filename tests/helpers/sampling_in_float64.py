"""Deformable sampling and its gradients as plain loops in float64, and inputs for it."""

import jax.numpy as jnp
import numpy as np

SHAPES = ((5, 7), (3, 4), (1, 2))


def sample_in_float64(value, shapes, locations, weights, gradient):
    """Output and the gradients of value, locations and weights, one corner of one sampling point after the other."""
    value, locations, weights, gradient = (np.asarray(x, np.float64) for x in (value, locations, weights, gradient))
    batch, queries, heads, levels, points, _ = locations.shape
    out = np.zeros((batch, queries, heads, value.shape[-1]))
    of_value, of_locations, of_weights = np.zeros_like(value), np.zeros_like(locations), np.zeros_like(weights)
    starts = np.cumsum([0, *(h * w for h, w in shapes)])
    for b, q, h, level, p in np.ndindex(batch, queries, heads, levels, points):
        height, width = shapes[level]
        weight = weights[b, q, h, level, p]
        x, y = locations[b, q, h, level, p] * (width, height) - 0.5
        x0, y0 = int(np.floor(x)), int(np.floor(y))
        for column in (x0, x0 + 1):
            for row in (y0, y0 + 1):
                if not (0 <= column < width and 0 <= row < height):
                    continue
                token = starts[level] + row * width + column
                weight_x, weight_y = 1 - abs(x - column), 1 - abs(y - row)
                out[b, q, h] += weight * weight_x * weight_y * value[b, token, h]
                of_value[b, token, h] += weight * weight_x * weight_y * gradient[b, q, h]
                product = value[b, token, h] @ gradient[b, q, h]
                of_weights[b, q, h, level, p] += weight_x * weight_y * product
                sign = np.array([1 if column > x0 else -1, 1 if row > y0 else -1])
                of_locations[b, q, h, level, p] += sign * (weight_y, weight_x) * (width, height) * weight * product
    return out, of_value, of_locations, of_weights


def inputs(rng, *, shapes=SHAPES, batch=2, queries=5, heads=2, width=8, points=2, dtype=jnp.float32):
    tokens, levels = sum(h * w for h, w in shapes), len(shapes)
    value = jnp.asarray(rng.normal(size=(batch, tokens, heads, width)), dtype)
    # Many of them at the borders and outside.
    locations = jnp.asarray(rng.uniform(-0.4, 1.4, (batch, queries, heads, levels, points, 2)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(batch, queries, heads, levels, points)), jnp.float32)
    gradient = jnp.asarray(rng.normal(size=(batch, queries, heads, width)), dtype)
    return value, locations, weights, gradient

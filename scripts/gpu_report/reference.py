"""Deformable sampling and RoIAlign in float64 with NumPy and SciPy, fast enough for a detector's sizes.

Both are products with a sparse matrix, which has a row for each sum and a column for each token.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import sparse

Levels = Sequence[tuple[int, int]]


def deformable_sampling(
    value: np.ndarray, levels: Levels, locations: np.ndarray, weights: np.ndarray, gradient: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Deformable sampling: output, and gradients of value, locations and weights.

    Args:
      value: `[B, S, H, D]`.
      levels: (height, width) of each of the L levels.
      locations: `[B, Q, H, L, P, 2]`.
      weights: `[B, Q, H, L, P]`.
      gradient: of the output, `[B, Q, H, D]`.
    """
    value, locations, weights, gradient = (np.asarray(x, np.float64) for x in (value, locations, weights, gradient))
    out, of_value = np.zeros(gradient.shape), np.zeros(value.shape)
    of_locations, of_weights = np.zeros(locations.shape), np.zeros(weights.shape)

    def of_head(place: tuple[int, int]) -> None:
        image, head = place
        found = _head(
            value[image, :, head], levels, locations[image, :, head], weights[image, :, head], gradient[image, :, head]
        )
        for whole, part in zip((out, of_value, of_locations, of_weights), found):
            whole[image, :, head] = part

    with ThreadPoolExecutor() as pool:
        list(pool.map(of_head, np.ndindex(value.shape[0], value.shape[2])))
    return out, of_value, of_locations, of_weights


def _head(
    value: np.ndarray, levels: Levels, locations: np.ndarray, weights: np.ndarray, gradient: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same for one head of one image: `[S, D]`, `[Q, L, P, 2]`, `[Q, L, P]`, `[Q, D]`."""
    sizes = np.array([(width, height) for height, width in levels], np.float64)[:, None]
    starts = np.cumsum([0, *(height * width for height, width in levels)])[:-1, None]
    query = np.broadcast_to(np.arange(len(weights))[:, None, None], weights.shape)
    # Locations that are not finite count as outside.
    pixels = np.nan_to_num(locations * sizes - 0.5, nan=-9.0, posinf=-9.0, neginf=-9.0)
    base = np.floor(pixels)
    fraction = pixels - base
    matrix = sparse.csr_matrix((len(weights), len(value)))
    of_locations, of_weights = np.zeros(locations.shape), np.zeros(weights.shape)
    for step in np.ndindex(2, 2):
        corner = base + step
        inside = ((corner >= 0) & (corner < sizes)).all(-1)
        share = np.where(step, fraction, 1 - fraction)
        token = np.where(inside, starts + corner[..., 1] * sizes[..., 0] + corner[..., 0], 0).astype(np.int64)
        entries = np.where(inside, weights * share.prod(-1), 0.0)
        matrix += sparse.csr_matrix((entries.ravel(), (query.ravel(), token.ravel())), matrix.shape)
        product = np.where(inside, np.einsum("qlpd,qd->qlp", value[token], gradient), 0.0)
        of_weights += share.prod(-1) * product
        sign = np.where(step, 1.0, -1.0)
        of_locations += sign * share[..., ::-1] * sizes * (weights * product)[..., None]
    return matrix @ value, matrix.T @ gradient, of_locations, of_weights


def roi_align(
    features: np.ndarray,
    levels: Levels,
    valid: np.ndarray,
    boxes: np.ndarray,
    gradient: np.ndarray,
    *,
    strides: Sequence[int],
    bins: int,
    ratio: int,
    finest_scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    """RoIAlign: output `[B, Q, bins ** 2, C]`, and the gradient of the features.

    Args:
      features: `[B, S, C]`.
      levels: (height, width) of each of the L levels.
      valid: (height, width) without padding, `[B, L, 2]`.
      boxes: xyxy in pixels of the image, `[B, Q, 4]`.
      gradient: of the output, in its shape.
      strides, bins, ratio, finest_scale: as `hpr_jax.ops.roi_align.roi_align` takes them.
    """
    features, gradient = np.asarray(features, np.float64), np.asarray(gradient, np.float64)
    found = [
        _align_image(*image, levels, strides, bins, ratio, finest_scale) for image in zip(features, valid, boxes, gradient)
    ]
    return np.stack([out for out, _ in found]), np.stack([of_features for _, of_features in found])


def _align_image(
    features: np.ndarray,
    valid: np.ndarray,
    boxes: np.ndarray,
    gradient: np.ndarray,
    levels: Levels,
    strides: Sequence[int],
    bins: int,
    ratio: int,
    finest_scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    boxes = np.asarray(boxes, np.float64)
    size = np.sqrt(np.maximum((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), 0))
    level = np.clip(np.floor(np.log2(size / finest_scale + 1e-6)), 0, len(levels) - 1).astype(int)
    starts = np.cumsum([0, *(height * width for height, width in levels)])[level]
    stride, width = np.array(strides)[level], np.array([w for _, w in levels])[level]
    steps = (np.arange(bins * ratio) + 0.5) / (bins * ratio)

    def axis(low: np.ndarray, high: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels on both sides of each sample along an axis and their shares: `[R, bins * ratio, 2]`."""
        position = (low / stride - 0.5)[:, None] + steps * ((high - low) / stride)[:, None]
        inside = (position >= -1) & (position <= size[:, None])
        position = np.clip(position, 0, size[:, None] - 1)
        lower = np.floor(position)
        pixels = np.stack([lower, np.minimum(lower + 1, size[:, None] - 1)], -1)
        fraction = position - lower
        return pixels, np.where(inside[..., None], np.stack([1 - fraction, fraction], -1), 0.0) / ratio

    columns, across = axis(boxes[:, 0], boxes[:, 2], np.asarray(valid)[level, 1])
    rows, down = axis(boxes[:, 1], boxes[:, 3], np.asarray(valid)[level, 0])
    samples = bins * ratio
    token = starts[:, None, None, None, None] + rows[:, :, None, :, None] * width[:, None, None, None, None]
    token = token + columns[:, None, :, None, :]
    share = down[:, :, None, :, None] * across[:, None, :, None, :]
    bin_of_sample = np.arange(samples) // ratio
    cell = np.arange(len(boxes))[:, None, None] * bins**2 + bin_of_sample[:, None] * bins + bin_of_sample
    cell = np.broadcast_to(cell[..., None, None], token.shape)
    shape = (len(boxes) * bins**2, len(features))
    matrix = sparse.csr_matrix((share.ravel(), (cell.ravel(), token.ravel().astype(np.int64))), shape)
    out = (matrix @ features).reshape(len(boxes), bins**2, -1)
    return out, matrix.T @ gradient.reshape(shape[0], -1)

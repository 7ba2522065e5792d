"""Swin Transformer's attention within plain or shifted windows of a map (Liu et al. 2021, section 3.2), padding-invariant.

The official network pads each map with zeros to whole windows, behind the norm, and lets these zeros take part in the
attention. Here every image of a batch has these zeros around its own valid area, as if it were alone; what lies beyond them
is seen by nothing else.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hpr_jax.models.layers import Linear
from hpr_jax.ops.padding import valid_mask, zero_padding


def swin_linear(inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs) -> Linear:
    """Linear layer, initialised as in the official Swin Transformer."""
    return Linear(inputs, outputs, use_bias=bias, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)


def pad_to_multiple(x: jax.Array, multiple: int) -> jax.Array:
    """Adds zeros at the bottom and at the right of `[B, h, w, C]`, until both sides are multiples of `multiple`."""
    _, height, width, _ = x.shape
    return jnp.pad(x, ((0, 0), (0, -height % multiple), (0, -width % multiple), (0, 0)))


def relative_positions(window: int) -> np.ndarray:
    """Rows of the table of position biases, for each pair of query and key in a window: `[window^2, window^2]`."""
    row, column = np.divmod(np.arange(window**2), window)
    rows, columns = row[:, None] - row[None], column[:, None] - column[None]
    return (rows + window - 1) * (2 * window - 1) + columns + window - 1


def _to_windows(x: jax.Array, window: int, shift: int) -> jax.Array:
    """Cuts a map `[B, h, w, C]` into windows `[B * windows, window^2, C]`, after rolling it up and left by `shift`."""
    batch, height, width, channels = x.shape
    if shift:
        x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
    x = x.reshape(batch, height // window, window, width // window, window, channels).swapaxes(2, 3)
    return x.reshape(-1, window**2, channels)


def _from_windows(x: jax.Array, height: int, width: int, window: int, shift: int) -> jax.Array:
    """The inverse of `_to_windows`."""
    channels = x.shape[-1]
    x = x.reshape(-1, height // window, width // window, window, window, channels).swapaxes(2, 3)
    x = x.reshape(-1, height, width, channels)
    return jnp.roll(x, (shift, shift), axis=(1, 2)) if shift else x


def window_regions(sizes: jax.Array, height: int, width: int, window: int, shift: int) -> jax.Array:
    """Numbers of the tokens in each window. Tokens of a window see each other if they have the same number.

    Args:
      sizes: int32 `[B, 2]`, valid (height, width) of the maps.
      height, width: of the maps, before they are padded to whole windows.
      window: side of the windows, in tokens.
      shift: how far the windows are shifted, in tokens.

    Returns:
      int32 `[B * windows, window^2]`.
    """
    height, width = height + -height % window, width + -width % window
    # Rolling moves the first rows and columns to the far side, where their new neighbours must not see them. In an image
    # alone they would be right behind its last whole window; here they may be further away, but are arranged alike.
    wrapped = 2 * (jnp.arange(height) < shift)[:, None] + (jnp.arange(width) < shift)[None]
    attended = valid_mask(-(-sizes // window) * window, height, width)
    # Tokens beyond the image's own whole windows see one another, so that every query has keys.
    return _to_windows(jnp.where(attended, wrapped[..., None], -1), window, shift)[..., 0]


class WindowAttention(nnx.Module):
    """Multi-head self-attention within windows, with a learned bias for each relative position.

    Args:
      window: side of the windows, in tokens.
      shift: how far the windows are shifted, in tokens.
    """

    def __init__(self, channels: int, heads: int, window: int, shift: int, *, rngs: nnx.Rngs):
        self.qkv = swin_linear(channels, 3 * channels, rngs=rngs)
        self.project = swin_linear(channels, channels, rngs=rngs)
        self.position_bias = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), ((2 * window - 1) ** 2, heads)))
        self.heads, self.window, self.shift = heads, window, shift

    def __call__(self, x: jax.Array, sizes: jax.Array, regions: jax.Array) -> jax.Array:
        """Attention of each token to its window.

        Args:
          x: `[B, h, w, C]`.
          sizes: its valid sizes `[B, 2]`.
          regions: `window_regions` of these.

        Returns:
          `[B, h, w, C]`.
        """
        _, height, width, channels = x.shape
        # Queries, keys and values of the padding are those of zeros, that is the bias. It is added last, so that the padding
        # need not be projected.
        qkv = zero_padding(x @ self.qkv.kernel.get_value().astype(x.dtype), sizes)
        assert self.qkv.bias is not None
        qkv = pad_to_multiple(qkv, self.window) + self.qkv.bias.get_value().astype(x.dtype)
        padded_height, padded_width = qkv.shape[1:3]
        qkv = _to_windows(qkv, self.window, self.shift)
        query, key, value = (part.reshape(*part.shape[:2], self.heads, -1) for part in jnp.split(qkv, 3, axis=-1))
        bias = self.position_bias.get_value()[relative_positions(self.window)].transpose(2, 0, 1)
        mask = regions[:, None, :, None] == regions[:, None, None, :]
        out = jax.nn.dot_product_attention(query, key, value, bias=bias[None], mask=mask)
        out = out.reshape(*qkv.shape[:2], channels)
        out = _from_windows(out, padded_height, padded_width, self.window, self.shift)[:, :height, :width]
        return self.project(out)

"""The refiner `dynamic_conv`: each query filters its own region."""

import jax
from flax import nnx

from hpr_jax.models.layers import layer_norm, xavier_linear
from hpr_jax.models.refiner.interaction import SharedSettings, Surroundings, map_regions
from hpr_jax.ops.linear import affine


class DynamicConv(nnx.Module):
    """Each query generates two 1x1 kernels, which are applied to its region (Sparse R-CNN, Sun et al. 2021, section 3.2).

    Args:
      hidden: number of channels between the two kernels.
    """

    needs_regions = True

    def __init__(self, shared: SharedSettings, *, hidden: int, rngs: nnx.Rngs):
        channels = shared.channels
        self.generator = xavier_linear(channels, 2 * channels * hidden, rngs=rngs)
        self.norm1 = layer_norm(hidden, rngs=rngs)
        self.norm2 = layer_norm(channels, rngs=rngs)
        self.project = xavier_linear(shared.region_size**2 * channels, channels, rngs=rngs)
        self.norm3 = layer_norm(channels, rngs=rngs)
        self.hidden, self.region_size = hidden, shared.region_size

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        """Queries `[B, Q, C]` -> `[B, Q, C]`, the residual included; `position` is not read."""
        channels = query.shape[-1]
        half, bins = channels * self.hidden, self.region_size**2
        assert self.generator.bias is not None
        kernel, bias = self.generator.kernel[...], self.generator.bias[...]
        # The generator is applied as two products: their gradients need not be concatenated.
        to_squeeze, to_expand = (kernel[:, :half], bias[:half]), (kernel[:, half:], bias[half:])

        def filtered(query, regions):
            with jax.named_scope("generator"):
                squeeze = affine(query, *to_squeeze).reshape(-1, channels, self.hidden)
                expand = affine(query, *to_expand).reshape(-1, self.hidden, channels)
            x = jax.nn.relu(jax.named_scope("norm1")(self.norm1)(regions @ squeeze))
            x = jax.nn.relu(jax.named_scope("norm2")(self.norm2)(x @ expand))
            return jax.named_scope("project")(self.project)(x[:, :bins].reshape(query.shape[0], -1))

        return query + jax.nn.relu(jax.named_scope("norm3")(self.norm3)(map_regions(filtered, query, surroundings)))

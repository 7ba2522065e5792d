"""Prediction heads: class logits and box offsets, in float32 whatever the type of the features."""

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.layers import MLP, linear
from hpr_jax.ops.boxes import inverse_sigmoid

# Initial probability of every class is 0.01 (RetinaNet, Lin et al. 2017).
CLASS_BIAS = -4.59511985013459


class PredictionHead(nnx.Module):
    """Class layer and three-layer box MLP, whose last layer starts at zero.

    A half-precision offset would move the side of a large box by pixels.
    """

    def __init__(self, channels: int, num_classes: int, *, rngs: nnx.Rngs):
        self.classes = linear(channels, num_classes, rngs=rngs)
        self.classes.bias = nnx.Param(jnp.full(num_classes, CLASS_BIAS, jnp.float32))
        self.boxes = MLP(channels, channels, channels, 4, rngs=rngs)
        last = self.boxes.layers[-1]
        last.kernel = nnx.Param(jnp.zeros_like(last.kernel.get_value()))
        last.bias = nnx.Param(jnp.zeros_like(last.bias.get_value()))

    def logits(self, x: jax.Array) -> jax.Array:
        """`[..., C]` -> `[..., K]`."""
        return self.classes(x.astype(jnp.float32))

    def offsets(self, x: jax.Array) -> jax.Array:
        """`[..., C]` -> `[..., 4]`, in front of the sigmoid."""
        return self.boxes(x.astype(jnp.float32))


def copies(head: PredictionHead, count: int) -> PredictionHead:
    """A stack of `count` copies that start equal."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], count, axis=0), head)


class DecoderHeads(nnx.Module):
    """One head per decoder layer, and another per layer for dense queries, which come last, where there are such.

    Both are stacks: variables have a leading layer axis, and `jax.lax.scan` over this module gives each layer its own.
    """

    def __init__(self, head: PredictionHead, layers: int, *, with_dense: bool):
        self.matching = copies(head, layers)
        self.dense = copies(head, layers) if with_dense else nnx.data(None)

    def offsets(self, x: jax.Array, num_dense: int) -> jax.Array:
        """Box offsets of one layer: `[B, Q, C]` -> `[B, Q, 4]`."""
        if not num_dense:
            return self.matching.offsets(x)
        return jnp.concatenate([self.matching.offsets(x[:, :-num_dense]), self.dense.offsets(x[:, -num_dense:])], axis=1)

    def logits(self, x: jax.Array, num_dense: int) -> jax.Array:
        """Class logits of one layer: `[B, Q, C]` -> `[B, Q, K]`."""
        if not num_dense:
            return self.matching.logits(x)
        return jnp.concatenate([self.matching.logits(x[:, :-num_dense]), self.dense.logits(x[:, -num_dense:])], axis=1)

    def predict(self, hidden: jax.Array, references: jax.Array, num_dense: int) -> tuple[jax.Array, jax.Array]:
        """Predictions of all layers.

        Args:
          hidden: normed hidden states `[layers, B, Q, C]`.
          references: the boxes that each layer started from, `[layers, B, Q, 4]`; gradients flow into them
            ("look forward twice", DINO section 3.5).

        Returns:
          logits `[layers, B, Q, K]` and boxes `[layers, B, Q, 4]`.
        """

        def one(heads, x, reference):
            boxes = jax.nn.sigmoid(heads.offsets(x, num_dense) + inverse_sigmoid(reference, 1e-5))
            return heads.logits(x, num_dense), boxes

        return jax.vmap(one)(self, hidden, references)

"""Prediction heads: class logits and box offsets, in float32 whatever the type of the features.

In half precision, rounding an offset would move the side of a large box by pixels. Products are exact on every machine,
since queries are chosen by the ranks of their scores; see `ops.precision`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.layers import MLP, linear
from hpr_jax.ops.boxes import inverse_sigmoid
from hpr_jax.ops.precision import exact

# Initial bias of the class layer, with which every class has the probability 0.01 (RetinaNet, Lin et al. 2017).
CLASS_BIAS = -4.59511985013459


class PredictionHead(nnx.Module):
    """A linear layer for the classes, and for the boxes an MLP of three layers, the last of which starts at zero."""

    def __init__(self, channels: int, num_classes: int, *, rngs: nnx.Rngs):
        self.classes = linear(channels, num_classes, rngs=rngs)
        self.classes.bias = nnx.Param(jnp.full(num_classes, CLASS_BIAS, jnp.float32))
        self.boxes = MLP(channels, channels, channels, 4, rngs=rngs)
        last = self.boxes.layers[-1]
        last.kernel = nnx.Param(jnp.zeros_like(last.kernel.get_value()))
        assert last.bias is not None
        last.bias = nnx.Param(jnp.zeros_like(last.bias.get_value()))

    def logits(self, x: jax.Array) -> jax.Array:
        """Class logits: `[..., C]` -> `[..., K]`."""
        with exact():
            return jax.named_scope("classes")(self.classes)(x.astype(jnp.float32))

    def offsets(self, x: jax.Array) -> jax.Array:
        """Box offsets, which are added to a box in front of the sigmoid: `[..., C]` -> `[..., 4]`."""
        with exact():
            return jax.named_scope("boxes")(self.boxes)(x.astype(jnp.float32))


def copies(head: PredictionHead, count: int) -> PredictionHead:
    """A stack of `count` heads that start as copies of `head`."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], count, axis=0), head)


class DecoderHeads(nnx.Module):
    """One head per decoder layer, and if there are dense queries, another one per layer for them. Dense queries stand last.

    Both are stacks: their variables have a leading axis for the layers, and `jax.lax.scan` or `jax.vmap` over this module
    gives each layer its own heads.
    """

    def __init__(self, head: PredictionHead, layers: int, *, with_dense: bool):
        self.matching = copies(head, layers)
        self.dense: PredictionHead | None = copies(head, layers) if with_dense else nnx.data(None)

    def offsets(self, x: jax.Array, num_dense: int) -> jax.Array:
        """Box offsets of one layer: `[B, Q, C]`, of which the last `num_dense` queries are dense -> `[B, Q, 4]`."""
        return self._join(PredictionHead.offsets, x, num_dense)

    def logits(self, x: jax.Array, num_dense: int) -> jax.Array:
        """Class logits of one layer: `[B, Q, C]`, of which the last `num_dense` queries are dense -> `[B, Q, K]`."""
        return self._join(PredictionHead.logits, x, num_dense)

    def _join(self, predict: Callable[[PredictionHead, jax.Array], jax.Array], x: jax.Array, num_dense: int) -> jax.Array:
        if not num_dense:
            return predict(self.matching, x)
        assert self.dense is not None, "dense queries have heads of their own"
        return jnp.concatenate([predict(self.matching, x[:, :-num_dense]), predict(self.dense, x[:, -num_dense:])], axis=1)

    def predict(
        self, hidden: jax.Array, references: jax.Array, num_dense: int, epsilon: float = 1e-5
    ) -> tuple[jax.Array, jax.Array]:
        """Predictions of all layers.

        Args:
          hidden: normed hidden states `[layers, B, Q, C]`.
          references: the boxes in front of each layer, `[layers, B, Q, 4]`.
          num_dense: number of dense queries, which stand last.
          epsilon: coordinates of references count as at least so far from 0 and 1.

        Returns:
          logits `[layers, B, Q, K]` and boxes `[layers, B, Q, 4]`.
        """

        def predict_layer(heads, x, reference):
            boxes = jax.nn.sigmoid(heads.offsets(x, num_dense) + inverse_sigmoid(reference, epsilon))
            return heads.logits(x, num_dense), boxes

        return jax.vmap(predict_layer)(self, hidden, references)

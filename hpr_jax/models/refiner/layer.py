"""One layer of the hybrid refiner: the paths of several refiners, side by side, and the merges between them."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.attention import MultiHeadAttention
from hpr_jax.models.layers import FeedForward, layer_norm
from hpr_jax.models.refiner.interaction import InteractionFactory, Surroundings
from hpr_jax.models.refiner.merge import MERGE_POINTS, Merge, MergeKind, MergePoint


class RefinerPath(nnx.Module):
    """The modules of one refiner within one layer: self-attention, interaction and FFN, each followed by its norm."""

    def __init__(
        self,
        make_interaction: InteractionFactory,
        channels: int,
        heads: int,
        hidden: int,
        *,
        implementation: str | None,
        rngs: nnx.Rngs,
    ):
        self.attention = MultiHeadAttention(channels, heads, implementation=implementation, rngs=rngs)
        self.norm1 = layer_norm(channels, rngs=rngs)
        self.interaction = make_interaction(rngs)
        self.norm2 = layer_norm(channels, rngs=rngs)
        self.ffn = FeedForward(channels, hidden, rngs=rngs)
        self.norm3 = layer_norm(channels, rngs=rngs)

    def attend(self, x: jax.Array, position: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Queries `[B, Q, C]` behind the self-attention, the residual included; see `RefinerLayer`."""
        return x + jax.named_scope("attention")(self.attention.self_attention)(x, position, mask)

    def interact(self, x: jax.Array, position: jax.Array, surroundings: Surroundings) -> jax.Array:
        """Queries `[B, Q, C]` behind the interaction, the residual included, in the type of `x`: interactions may be made of
        Flax's own layers, whose results have the type of their parameters.

        Raises:
          UserError: the interaction returns another shape than it gets.
        """
        normed = jax.named_scope("norm1")(self.norm1)(x)
        refined = jax.named_scope("interaction")(self.interaction)(normed, position, surroundings)
        if refined.shape != x.shape:
            name = type(self.interaction).__name__
            raise UserError(f"The interaction {name} returns {list(refined.shape)} for queries {list(x.shape)}.")
        return refined.astype(x.dtype)

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """Queries `[B, Q, C]` behind the FFN, the residual included."""
        return jax.named_scope("ffn")(self.ffn)(jax.named_scope("norm2")(self.norm2)(x))


class RefinerLayer(nnx.Module):
    """One decoder layer: the path of the primary refiner, and one of each auxiliary refiner. Without auxiliary refiners it
    is the plain decoder layer of the base detector.

    Args:
      primary: makes the primary path's interaction.
      auxiliaries: make the interactions of the auxiliary paths, in the order of their branches.
      merge, merge_initial: kind and initial weights of the merges, see `Merge`.
      merge_points: parts of the paths behind which the primary path goes on with a merge of all paths.

      implementation: of `attention`.

    Raises:
      UserError: an unknown merge point, or what `Merge` raises.
    """

    def __init__(
        self,
        primary: InteractionFactory,
        auxiliaries: Sequence[InteractionFactory],
        channels: int,
        heads: int,
        hidden: int,
        *,
        merge: MergeKind,
        merge_initial: Sequence[float] | Literal["xavier"],
        merge_points: Sequence[MergePoint],
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        for point in merge_points:
            if point not in MERGE_POINTS:
                raise UserError(f"merge_points names {point!r}; known are {', '.join(MERGE_POINTS)}.")

        def path(make: InteractionFactory) -> RefinerPath:
            return RefinerPath(make, channels, heads, hidden, implementation=implementation, rngs=rngs)

        self.primary = path(primary)
        self.auxiliaries = nnx.List([path(make) for make in auxiliaries])

        def make_merge(point):
            if not auxiliaries or point not in merge_points:
                return nnx.data(None)
            return Merge(1 + len(auxiliaries), channels, merge, merge_initial, rngs=rngs)

        self.merge_attention = make_merge("attention")
        self.merge_interaction = make_merge("interaction")
        self.merge_ffn = make_merge("ffn")

    def __call__(
        self, query: jax.Array, position: jax.Array, mask: jax.Array | None, surroundings: Surroundings
    ) -> tuple[jax.Array, jax.Array]:
        """Refines the queries once.

        Args:
          query, position: queries and the encodings of their positions, `[B, Q, C]`.
          mask: bool `[B, Q, Q]`, true: may see; None: all see all.

        Returns:
          The refined queries `[B, Q, C]`, and the results of the auxiliary paths `[branches, B, Q, C]`.
        """
        xs = self.attended(query, position, mask)
        xs = self._by_path(lambda path, x: path.interact(x, position, surroundings), xs)
        xs = jax.named_scope("merge_interaction")(_merged)(self.merge_interaction, xs)
        xs = self._by_path(RefinerPath.feed_forward, xs)
        xs = jax.named_scope("merge_ffn")(_merged)(self.merge_ffn, xs)
        refined, *branches = self._by_path(lambda path, x: jax.named_scope("norm3")(path.norm3)(x), xs)
        return refined, jnp.stack(branches) if branches else jnp.zeros((0, *query.shape), query.dtype)

    def attended(self, query: jax.Array, position: jax.Array, mask: jax.Array | None) -> list[jax.Array]:
        """The queries of each path, `[B, Q, C]`, behind its self-attention; the arguments are those of a call."""
        xs = self._by_path(lambda path, x: path.attend(x, position, mask), [query] * (1 + len(self.auxiliaries)))
        return jax.named_scope("merge_attention")(_merged)(self.merge_attention, xs)

    def _by_path(self, function: Callable[[RefinerPath, jax.Array], jax.Array], xs: Sequence[jax.Array]) -> list[jax.Array]:
        """A function of each path and its queries."""
        names = ["primary", *(f"auxiliaries/{index}" for index in range(len(self.auxiliaries)))]
        paths = [self.primary, *self.auxiliaries]
        return [jax.named_scope(name)(function)(path, x) for name, path, x in zip(names, paths, xs)]


def _merged(merge: Merge | None, xs: list[jax.Array]) -> list[jax.Array]:
    """What goes on in each path behind a part of it: in the primary one the merge of all."""
    return xs if merge is None else [merge(xs), *xs[1:]]

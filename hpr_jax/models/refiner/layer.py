"""One layer of the refiner: several paths, and the merges between them."""

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.attention import MultiHeadAttention
from hpr_jax.models.layers import FeedForward, Frozen, layer_norm
from hpr_jax.models.refiner.interaction import InteractionFactory, Surroundings

MergeKind = Literal["fixed", "learned_scalar", "learned_vector"]


MERGES = get_args(MergeKind)


# Behind which parts of a path features may be merged.
MergePoint = Literal["attention", "interaction", "ffn"]


MERGE_POINTS = get_args(MergePoint)


class Merge(nnx.Module):
    """Weighted sum of the paths (HPR equation 4).

    Args:
      kind: `fixed` weights, a learned weight per path, or a learned weight per channel and path.
      initial: a weight per path (primary first; none: one for all), or, for vectors, `"xavier"`: drawn at random as the
        published DDQ models do, whose Xavier initialisation overwrites the weights (+-0.15 at 256 channels).
    """

    def __init__(
        self,
        paths: int,
        channels: int,
        kind: MergeKind,
        initial: Sequence[float] | Literal["xavier"],
        *,
        rngs: nnx.Rngs,
    ):
        if kind not in MERGES:
            raise UserError(f"config.model.refiner.merge is {kind!r}; known are {', '.join(MERGES)}.")
        if initial == "xavier":
            weights = nnx.initializers.xavier_uniform()(rngs.params(), (channels, paths))
        else:
            initial = initial or (1.0,) * paths
            if len(initial) != paths:
                raise UserError(f"config.model.refiner.merge_initial has {len(initial)} weights for {paths} refiners.")
            weights = jnp.array(initial, jnp.float32)
            if kind == "learned_vector":
                weights = jnp.tile(weights, (channels, 1))
        self.weights = Frozen(weights) if kind == "fixed" else nnx.Param(weights)

    def __call__(self, paths: Sequence[jax.Array]) -> jax.Array:
        return sum(path * self.weights[..., index].astype(path.dtype) for index, path in enumerate(paths))


class RefinerPath(nnx.Module):
    """The parts that a path has to itself: self-attention, interaction and FFN, each followed by its norm."""

    def __init__(self, make: InteractionFactory, channels: int, heads: int, hidden: int, *, rngs: nnx.Rngs):
        self.attention = MultiHeadAttention(channels, heads, rngs=rngs)
        self.norm1 = layer_norm(channels, rngs=rngs)
        self.interaction = make(rngs)
        self.norm2 = layer_norm(channels, rngs=rngs)
        self.ffn = FeedForward(channels, hidden, rngs=rngs)
        self.norm3 = layer_norm(channels, rngs=rngs)


class RefinerLayer(nnx.Module):
    """One decoder layer of a primary and any number of auxiliary refiners; without auxiliaries the plain layer.

    Args:
      primary: makes the primary interaction.
      auxiliaries: make the auxiliary interactions, in the order of their branches.
      merge, merge_initial: see `Merge`.
      merge_points: behind which parts the primary path takes a merge of all.
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
        rngs: nnx.Rngs,
    ):
        for point in merge_points:
            if point not in MERGE_POINTS:
                raise UserError(f"config.model.refiner.merge_points names {point!r}; known are {', '.join(MERGE_POINTS)}.")
        self.primary = RefinerPath(primary, channels, heads, hidden, rngs=rngs)
        self.auxiliaries = nnx.List([RefinerPath(make, channels, heads, hidden, rngs=rngs) for make in auxiliaries])

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
        """Queries and positions `[B, Q, C]`, attention mask bool `[B, Q, Q]` (true: may see).

        Returns:
          The refined queries `[B, Q, C]` and the auxiliary branches `[branches, B, Q, C]`.
        """
        paths = [self.primary, *self.auxiliaries]

        def merged(merge, xs):
            return xs if merge is None else [merge(xs), *xs[1:]]

        xs = [query + path.attention.self_attention(query, position, mask) for path in paths]
        xs = merged(self.merge_attention, xs)
        xs = [path.interaction(path.norm1(x), position, surroundings) for path, x in zip(paths, xs)]
        xs = merged(self.merge_interaction, xs)
        xs = [path.ffn(path.norm2(x)) for path, x in zip(paths, xs)]
        xs = merged(self.merge_ffn, xs)
        refined, *branches = [path.norm3(x) for path, x in zip(paths, xs)]
        return refined, jnp.stack(branches) if branches else jnp.zeros((0, *query.shape), query.dtype)

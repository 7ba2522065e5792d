"""The hybrid proposal refiner: a decoder layer in which several refiners work on the same queries (HPR section 3.1).

Each refiner is a path of its own through the layer: self-attention, an interaction with the image (deformable attention,
dynamic convolution, regional attention, ...), an FFN. Behind the self-attention and behind the FFN (or where settings say)
the primary path takes a merge of all paths; the auxiliary paths end in branches that are supervised but not passed on.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.attention import MultiHeadAttention
from hpr_jax.models.encoder import Pyramid
from hpr_jax.models.heads import DecoderHeads
from hpr_jax.models.layers import MLP, FeedForward, Frozen, layer_norm, rematerialized, stack, xavier_linear
from hpr_jax.models.position import box_encoding
from hpr_jax.models.refiner.deformable import InteractionFactory
from hpr_jax.models.refiner.interaction import Surroundings
from hpr_jax.ops.boxes import cxcywh_to_xyxy, inverse_sigmoid, whwh
from hpr_jax.ops.nms import nms_mask
from hpr_jax.ops.roi_align import roi_align

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


@flax.struct.dataclass
class DecoderInput:
    """Queries in front of the first layer, in the order denoising, matching, dense.

    Attributes:
      content: `[B, Q, C]`.
      reference_boxes: normalised cxcywh `[B, Q, 4]`, without gradient.
      mask: bool `[B, Q, Q]`, true: may see.
      twins: bool `[B, num_matching]`, matching queries that start out identical.
      num_denoising, num_matching, num_dense: static counts that sum to Q.
    """

    content: jax.Array
    reference_boxes: jax.Array
    mask: jax.Array
    twins: jax.Array
    num_denoising: int = flax.struct.field(pytree_node=False)
    num_matching: int = flax.struct.field(pytree_node=False)
    num_dense: int = flax.struct.field(pytree_node=False)

    @property
    def matching(self) -> slice:
        return slice(self.num_denoising, self.num_denoising + self.num_matching)


@flax.struct.dataclass
class DecoderOutput:
    """Per layer: hidden states `[layers, B, Q, C]`, branches `[layers, branches, B, Q, C]`, both before the heads' norm;
    reference boxes `[layers + 1, B, Q, 4]`, those behind a layer differentiable; `kept` bool `[layers, B, M]`, the
    matching queries that are distinct in front of each layer."""

    hidden: jax.Array
    branches: jax.Array
    reference_boxes: jax.Array
    kept: jax.Array


def distinct_attention(kept: jax.Array) -> jax.Array:
    """DDQ's mask: kept queries see all and are seen by all. bool `[B, M]` -> `[B, M, M]`."""
    return kept[:, :, None] | kept[:, None, :]


def counted(kept: jax.Array) -> jax.Array:
    """Queries that enter the next selection, the loss and the detections: bool `[..., M]` -> the same.

    The published implementation reads them from row 0 of the attention mask, so that all count when query 0 is kept.
    """
    return kept | kept[..., :1]


def select_distinct(scores: jax.Array, boxes: jax.Array, kept: jax.Array, twins: jax.Array, threshold: float) -> jax.Array:
    """DDQ's selection behind a layer: NMS among the queries that count.

    Args:
      scores: `[M]`; boxes: normalised cxcywh `[M, 4]`; kept: bool `[M]`, before the selection.
      twins: bool `[M]`, queries that started out identical. Those that were treated alike still are, but for rounding:
        they take the values of the first of them, so that ties go to the lowest index.

    Returns:
      bool `[M]`.
    """
    first = jnp.where(kept, jnp.argmax(twins & kept), jnp.argmax(twins & ~kept))
    same_as = jnp.where(twins, first, jnp.arange(len(scores)))
    return nms_mask(cxcywh_to_xyxy(boxes[same_as]), scores[same_as], counted(kept), threshold)


@dataclasses.dataclass(frozen=True)
class RegionSettings:
    """How region features are taken from the memory: arguments of `roi_align`."""

    strides: tuple[int, ...] = (8, 16, 32, 64)
    output_size: int = 7
    sampling_ratio: int = 2
    finest_scale: float = 56.0
    implementation: str | None = None


class HybridRefiner(nnx.Module):
    """Decoder of equal refiner layers, scanned.

    Args:
      make_layer: makes one layer.
      branches: names of the auxiliary branches, in the layer's order.
      nms_threshold: DDQ's selection of distinct queries between layers at this IoU, or None.
      region: how region features are taken.
      remat: compute a layer's inner values again in the backward pass.
    """

    def __init__(
        self,
        make_layer: Callable[[nnx.Rngs], RefinerLayer],
        *,
        layers: int,
        channels: int,
        branches: Sequence[str],
        nms_threshold: float | None,
        region: RegionSettings,
        remat: bool,
        rngs: nnx.Rngs,
    ):
        self.layers = stack(make_layer, layers, rngs=rngs)
        self.position = MLP(2 * channels, channels, channels, rngs=rngs, make=xavier_linear)
        self.norm = layer_norm(channels, rngs=rngs)
        self.branch_norms = nnx.List([layer_norm(channels, rngs=rngs) for _ in branches])
        self.branches = tuple(branches)
        self.nms_threshold, self.region, self.remat = nms_threshold, region, remat

    def regions(self, memory: Pyramid, boxes: jax.Array) -> jax.Array:
        """RoIAlign features of normalised cxcywh boxes `[B, Q, 4]` -> `[B, Q, bins, C]`."""
        pixels = cxcywh_to_xyxy(boxes) * whwh(memory.image_sizes)[:, None]
        return roi_align(memory.tokens, memory.spatial_shapes, memory.level_sizes, pixels, **dataclasses.asdict(self.region))

    def __call__(self, queries: DecoderInput, memory: Pyramid, heads: DecoderHeads) -> DecoderOutput:
        """Runs all layers; `heads` move the reference boxes, and rate queries for the selection of distinct ones."""
        paths = [self.layers.primary, *self.layers.auxiliaries]
        needs_regions = any(path.interaction.needs_regions for path in paths)

        def step(carry, per_layer):
            content, boxes, kept = carry
            layer, heads = per_layer
            mask = queries.mask
            if self.nms_threshold is not None:
                matching = mask[:, queries.matching, queries.matching] & distinct_attention(kept)
                mask = mask.at[:, queries.matching, queries.matching].set(matching)
            regions = self.regions(memory, boxes) if needs_regions else None
            # The reference relative to the valid area, not to the padded map, is encoded.
            position = self.position(box_encoding(boxes, content.shape[-1] // 2).astype(content.dtype))
            content, branches = layer(content, position, mask, Surroundings(memory, boxes, regions))

            refined = jax.nn.sigmoid(heads.offsets(content, queries.num_dense) + inverse_sigmoid(boxes, 1e-3))
            boxes = jax.lax.stop_gradient(refined)
            if self.nms_threshold is not None:
                distinct = jax.vmap(functools.partial(select_distinct, threshold=self.nms_threshold))
                scores = jnp.max(heads.matching.logits(content[:, queries.matching]), axis=-1)
                scores = jax.lax.stop_gradient(scores)
                kept = distinct(jax.nn.sigmoid(scores), boxes[:, queries.matching], kept, queries.twins)
            return (content, boxes, kept), (content, branches, refined, kept)

        batch = len(queries.content)
        everything = jnp.ones((batch, queries.num_matching), bool)
        boxes = jax.lax.stop_gradient(queries.reference_boxes)
        _, (hidden, branches, refined, kept) = jax.lax.scan(
            rematerialized(step) if self.remat else step,
            (queries.content, boxes, everything),
            (self.layers, heads),
        )
        # No selection counts behind the last layer.
        return DecoderOutput(
            hidden=hidden,
            branches=branches,
            reference_boxes=jnp.concatenate([boxes[None], refined]),
            kept=jnp.concatenate([everything[None], kept[:-1]]),
        )

"""The hybrid proposal refiner: a decoder layer in which several refiners work on the same queries (HPR section 3.1).

Each refiner is a path of its own through the layer: self-attention, an interaction with the image (deformable attention,
dynamic convolution, regional attention, ...), an FFN. Behind the self-attention and behind the FFN (or where settings say)
the primary path takes a merge of all paths; the auxiliary paths end in branches that are supervised but not passed on.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.heads import DecoderHeads
from hpr_jax.models.layers import MLP, layer_norm, rematerialized, stack, xavier_linear
from hpr_jax.models.position import box_encoding
from hpr_jax.models.pyramid import Pyramid
from hpr_jax.models.refiner.interaction import Surroundings
from hpr_jax.models.refiner.layer import RefinerLayer
from hpr_jax.models.refiner.selection import distinct_attention, select_distinct
from hpr_jax.ops.boxes import cxcywh_to_xyxy, inverse_sigmoid, whwh
from hpr_jax.ops.roi_align import roi_align


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

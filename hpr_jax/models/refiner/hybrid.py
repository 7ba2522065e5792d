"""The hybrid refiner: a decoder in whose layers several refiners work side by side on the same queries (HPR section 3.1).

Each refiner has a path of its own through a layer: self-attention, an interaction with the image (deformable attention,
dynamic convolution, regional attention, ...), an FFN. Behind some of these parts the primary path goes on with a merge of
all paths. The primary path's result goes on to the next layer; each auxiliary path ends in a branch, which losses supervise.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.heads import DecoderHeads
from hpr_jax.models.layers import MLP, LayerNorm, layer_norm, scan_layers, stack, xavier_linear
from hpr_jax.models.position import box_encoding
from hpr_jax.models.pyramid import Pyramid
from hpr_jax.models.refiner.interaction import Surroundings
from hpr_jax.models.refiner.layer import RefinerLayer
from hpr_jax.models.refiner.nms_selection import distinct_attention, select_distinct
from hpr_jax.ops.boxes import cxcywh_to_xyxy, inverse_sigmoid, whwh
from hpr_jax.ops.platform import target_platform
from hpr_jax.ops.roi_align import roi_align

# On GPUs, the number of queries and that of a region's bins are filled up to a multiple of this. Matrix products of other
# sizes are slower there: XLA copies each of their operands into a larger array.
MULTIPLE = 8


@flax.struct.dataclass
class DecoderInput:
    """Queries in front of the first layer: first the denoising queries, then the matching ones, then the dense ones.

    Attributes:
      content: `[B, Q, C]`.
      reference_boxes: normalised cxcywh `[B, Q, 4]`; no gradient flows into them.
      mask: bool `[B, Q, Q]`, true: may see.
      duplicates: bool `[B, num_matching]`, matching queries that start out identical.
      position: `[B, Q, C]`, the position encoding in front of every layer; None: layers encode the boxes in front of them.
      num_denoising, num_matching, num_dense: numbers of queries, static, which sum to Q.
    """

    content: jax.Array
    reference_boxes: jax.Array
    mask: jax.Array
    duplicates: jax.Array
    num_denoising: int = flax.struct.field(pytree_node=False)
    num_matching: int = flax.struct.field(pytree_node=False)
    num_dense: int = flax.struct.field(pytree_node=False)
    position: jax.Array | None = None

    @property
    def matching(self) -> slice:
        """Where the matching queries are on the axis of queries."""
        return slice(self.num_denoising, self.num_denoising + self.num_matching)

    def filled(self, count: int) -> "DecoderInput":
        """The same with so many more queries in front, which count as denoising queries that no query sees."""

        def in_front(x, value):
            return jnp.pad(x, ((0, 0), (count, 0), (0, 0)), constant_values=value)

        return dataclasses.replace(
            self,
            content=in_front(self.content, 0.0),
            reference_boxes=in_front(self.reference_boxes, 0.5),
            mask=jnp.pad(self.mask, ((0, 0), (count, 0), (count, 0))),
            position=None if self.position is None else in_front(self.position, 0.0),
            num_denoising=self.num_denoising + count,
        )


@flax.struct.dataclass
class DecoderOutput:
    """What all layers compute.

    Attributes:
      hidden: `[layers, B, Q, C]`, the queries behind each layer, in front of the norm that the heads read.
      branches: `[layers, branches, B, Q, C]`, the same for the auxiliary branches.
      reference_boxes: `[layers + 1, B, Q, 4]`, in front of each layer, and behind the last one; gradients flow into all but
        the first.
      selected: bool `[layers, B, M]`, the matching queries that were selected as distinct in front of each layer.
    """

    hidden: jax.Array
    branches: jax.Array
    reference_boxes: jax.Array
    selected: jax.Array


@dataclasses.dataclass(frozen=True)
class RegionSettings:
    """How the features of regions are taken from the memory: keyword arguments of `roi_align`."""

    strides: tuple[int, ...] = (8, 16, 32, 64)
    output_size: int = 7
    sampling_ratio: int = 2
    finest_scale: float = 56.0


class HybridRefiner(nnx.Module):
    """A decoder whose layers have the same structure, and are scanned.

    Args:
      make_layer: makes one layer.
      layers: number of layers.
      branches: names of the auxiliary branches, in the order of the layers' auxiliary paths.
      encodes_boxes: whether the position encoding of queries is made of the boxes in front of each layer, and not given.
      final_norm: whether there is a norm in front of the heads.
      look_forward_twice: whether the boxes that a layer's losses look at have gradients for the layer before it, too (DINO,
        Zhang et al. 2023, section 3.5).
      refine_epsilon, output_epsilon: coordinates of reference boxes are kept so far from 0 and 1 before layers move them,
        and before heads make predictions of them.
      nms_threshold: IoU above which a query suppresses a worse one in DDQ's selection of distinct queries between layers;
        None: no selection.
      region: how the features of regions are taken.
      remat: whether the backward pass computes a layer's inner values again.
      implementation: of `roi_align` and of NMS.
    """

    def __init__(
        self,
        make_layer: Callable[[nnx.Rngs], RefinerLayer],
        *,
        layers: int,
        channels: int,
        branches: Sequence[str],
        encodes_boxes: bool = True,
        final_norm: bool = True,
        look_forward_twice: bool = True,
        refine_epsilon: float = 1e-3,
        output_epsilon: float = 1e-5,
        nms_threshold: float | None,
        region: RegionSettings,
        remat: bool,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.layers = stack(make_layer, layers, rngs=rngs)
        position = MLP(2 * channels, channels, channels, rngs=rngs, make=xavier_linear) if encodes_boxes else None
        self.position: MLP | None = nnx.data(position)
        self.norm: LayerNorm | None = nnx.data(layer_norm(channels, rngs=rngs) if final_norm else None)
        self.branch_norms = nnx.List([layer_norm(channels, rngs=rngs) for _ in branches if final_norm])
        self.branches = tuple(branches)
        self.look_forward_twice = look_forward_twice
        self.refine_epsilon, self.output_epsilon = refine_epsilon, output_epsilon
        self.nms_threshold, self.region = nms_threshold, region
        self.remat, self.implementation = remat, implementation

    def regions(self, memory: Pyramid, boxes: jax.Array, multiple: int = 1) -> jax.Array:
        """RoIAlign features of the memory at normalised cxcywh boxes `[B, Q, 4]`: `[B, Q, bins, C]`. Behind
        the bins are others that are zero, so that their number is a `multiple`."""
        pixels = cxcywh_to_xyxy(boxes) * whwh(memory.image_sizes)[:, None]
        maps = memory.tokens, memory.spatial_shapes, memory.level_sizes
        settings = dataclasses.asdict(self.region)
        return roi_align(*maps, pixels, **settings, multiple=multiple, implementation=self.implementation)

    def mask_of(self, queries: DecoderInput, selected: jax.Array) -> jax.Array:
        """Which queries see which in a layer, bool `[B, Q, Q]`, given the selected matching queries, bool `[B, M]`."""
        mask = queries.mask
        if self.nms_threshold is not None:
            matching = mask[:, queries.matching, queries.matching] & distinct_attention(selected)
            mask = mask.at[:, queries.matching, queries.matching].set(matching)
        return mask

    def position_of(self, queries: DecoderInput, boxes: jax.Array) -> jax.Array | None:
        """The position encodings of the queries in a layer, `[B, Q, C]`, given the boxes in front of it, `[B, Q, 4]`."""
        if self.position is None:
            return queries.position
        content = queries.content
        # Boxes are encoded relative to the valid area, not to the padded map.
        return self.position(box_encoding(boxes, content.shape[-1] // 2).astype(content.dtype))

    def normed(self, decoded: DecoderOutput) -> list[jax.Array]:
        """What the heads of the primary branch and of each auxiliary branch read, `[layers, B, Q, C]` each."""
        hidden = [decoded.hidden, *jnp.unstack(decoded.branches, axis=1)]
        if self.norm is None:
            return hidden
        names = ["norm", *(f"branch_norms/{index}" for index in range(len(self.branch_norms)))]
        return [jax.named_scope(name)(norm)(x) for name, norm, x in zip(names, [self.norm, *self.branch_norms], hidden)]

    def __call__(self, queries: DecoderInput, memory: Pyramid, heads: DecoderHeads) -> DecoderOutput:
        """Runs all layers. The primary branch's `heads` move the reference boxes, and score queries for the selection."""
        paths = [self.layers.primary, *self.layers.auxiliaries]
        needs_regions = any(path.interaction.needs_regions for path in paths)
        multiple = MULTIPLE if target_platform() == "gpu" else 1
        fill = -queries.content.shape[1] % multiple
        queries = queries.filled(fill) if fill else queries

        def step(carry, memory, per_layer):
            content, boxes, selected = carry
            layer, heads = per_layer
            mask = self.mask_of(queries, selected)
            filled = jax.named_scope("regions")(self.regions)(memory, boxes, multiple) if needs_regions else None
            regions = None if filled is None else filled[:, :, : self.region.output_size**2]
            position = jax.named_scope("position")(self.position_of)(queries, boxes)
            surroundings = Surroundings(memory, boxes, regions, filled)
            content, branches = jax.named_scope("layers")(layer)(content, position, mask, surroundings)

            offsets = jax.named_scope("heads")(heads.offsets)(content, queries.num_dense)
            refined = jax.nn.sigmoid(offsets + inverse_sigmoid(boxes, self.refine_epsilon))
            boxes = jax.lax.stop_gradient(refined)
            if self.nms_threshold is not None:
                select = jax.vmap(
                    functools.partial(select_distinct, threshold=self.nms_threshold, implementation=self.implementation)
                )
                with jax.named_scope("selection"):
                    scores = jnp.max(heads.matching.logits(content[:, queries.matching]), axis=-1)
                    scores = jax.lax.stop_gradient(scores)
                    selected = select(jax.nn.sigmoid(scores), boxes[:, queries.matching], selected, queries.duplicates)
            return (content, boxes, selected), (content, branches, refined, selected)

        batch = queries.content.shape[0]
        all_selected = jnp.ones((batch, queries.num_matching), bool)
        boxes = jax.lax.stop_gradient(queries.reference_boxes)
        _, (hidden, branches, refined, selected) = scan_layers(
            step, (queries.content, boxes, all_selected), memory, (self.layers, heads), remat=self.remat
        )
        # The selection behind the last layer has no reader.
        return DecoderOutput(
            hidden=hidden[:, :, fill:],
            branches=branches[:, :, :, fill:],
            reference_boxes=jnp.concatenate([boxes[None], refined])[:, :, fill:],
            selected=jnp.concatenate([all_selected[None], selected[:-1]]),
        )

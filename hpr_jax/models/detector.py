"""The detector: one composition of modules for all base detectors."""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.encoder import Encoder
from hpr_jax.models.heads import DecoderHeads, PredictionHead
from hpr_jax.models.neck import ChannelMapper
from hpr_jax.models.pyramid import Pyramid, flatten
from hpr_jax.models.queries.denoising import Denoiser
from hpr_jax.models.queries.proposals import InitialQueries
from hpr_jax.models.refiner.hybrid import DecoderInput, HybridRefiner
from hpr_jax.models.refiner.nms_selection import distinct_attention, valid_queries
from hpr_jax.ops.padding import zero_padding
from hpr_jax.ops.precision import products
from hpr_jax.types import BranchPredictions, DenoisingQueries, Intermediates, Outputs, Predictions

# Kinds of queries, in the order in which they stand in the decoder.
DENOISING, MATCHING, DENSE = range(3)


class Backbone(Protocol):
    """Maps normalised images `[B, H, W, 3]` and their valid sizes `[B, 2]` to feature maps `[B, h, w, C]` and their valid
    sizes. What the padding of the images holds does not matter to it.

    Attributes:
      out_channels: C of each map.
      first_map: the first stage whose map it returns, counted from 0.
    """

    out_channels: tuple[int, ...]
    first_map: int

    def __call__(
        self, images: jax.Array, sizes: jax.Array, keys: jax.Array | None = None
    ) -> tuple[list[jax.Array], list[jax.Array]]: ...


class QueryInit(Protocol):
    """Makes the matching queries from the memory, and in training, where there are such, the dense ones.

    Attributes:
      head: scores the proposals that matching queries come from.
    """

    head: PredictionHead

    def __call__(self, memory: Pyramid, *, train: bool) -> tuple[InitialQueries, InitialQueries | None]: ...


class Detector(nnx.Module):
    """Backbone, neck, encoder, initial queries, refiner and heads.

    Args:
      backbone: see `Backbone`.
      query_init: makes the initial queries, see `QueryInit`.
      denoiser: None: training has no denoising queries.
      heads: of the primary branch.
      branch_heads: of each auxiliary branch.
      pixel_mean, pixel_std: of RGB values in 0..255, for each channel.
      dtype: of activations between the images and the heads. Boxes, predictions and parameters are float32.
      precision: of products of float32 numbers but those of the heads, which are exact; see `ops.precision`.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        neck: ChannelMapper,
        encoder: Encoder,
        query_init: QueryInit,
        denoiser: Denoiser | None,
        refiner: HybridRefiner,
        heads: DecoderHeads,
        branch_heads: list[DecoderHeads],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        dtype: jax.typing.DTypeLike = jnp.float32,
        precision: str = "default",
    ):
        self.backbone = backbone
        self.neck = neck
        self.encoder = encoder
        self.query_init = query_init
        self.denoiser: Denoiser | None = nnx.data(denoiser)
        self.refiner = refiner
        self.heads = heads
        self.branch_heads = nnx.List(branch_heads)
        self.pixel_mean, self.pixel_std = tuple(pixel_mean), tuple(pixel_std)
        self.dtype, self.precision = jnp.dtype(dtype), precision

    def normalize(self, images: jax.Array, sizes: jax.Array) -> jax.Array:
        """Normalises RGB images `[B, H, W, 3]` in 0..255 (uint8 or float) to zero mean and unit variance, with zeros outside
        of their valid sizes `[B, 2]`: float32 `[B, H, W, 3]`."""
        with jax.named_scope("normalize"):
            images = (images.astype(jnp.float32) - jnp.array(self.pixel_mean)) / jnp.array(self.pixel_std)
            return zero_padding(images, sizes)

    def __call__(
        self,
        images: jax.Array,
        sizes: jax.Array,
        *,
        denoising: DenoisingQueries | None = None,
        train: bool = False,
        keys: jax.Array | None = None,
    ) -> Outputs:
        """Runs the detector.

        Args:
          images: normalised `[B, H, W, 3]`, padded at the right and at the bottom.
          sizes: int32 `[B, 2]`, valid (height, width) in pixels.
          denoising: queries from `denoiser.draw`, in training; None: there are none.
          train: whether there is what only losses read, such as dense queries.
          keys: `[B]`, a key for each image, for what is random in training (drop path); None: nothing is random.
        """
        memory = self.remember(images, sizes, keys)
        with products(self.precision):
            matching, dense = jax.named_scope("query_init")(self.query_init)(memory, train=train)
            queries = self.decoder_input(denoising, matching, dense)
            with jax.named_scope("refiner"):
                decoded = self.refiner(queries, memory, self.heads)
                normed, *branch_normed = self.refiner.normed(decoded)
        valid = valid_by_layer(denoising, dense, valid_queries(decoded.selected) & matching.proposals.valid)
        references = decoded.reference_boxes[:-1]
        if not self.refiner.look_forward_twice:
            references = jax.lax.stop_gradient(references)

        def predict(heads, hidden):
            logits, boxes = heads.predict(hidden, references, queries.num_dense, self.refiner.output_epsilon)
            return by_kind(Predictions(logits, boxes, valid), queries)

        return Outputs(
            primary=jax.named_scope("heads")(predict)(self.heads, normed),
            branches={
                name: jax.named_scope(f"branch_heads/{index}")(predict)(heads, hidden)
                for index, (name, heads, hidden) in enumerate(zip(self.refiner.branches, self.branch_heads, branch_normed))
            },
            proposals=matching.proposals if matching.all_proposals is None else matching.all_proposals,
            dense_proposals=dense.proposals if dense is not None else None,
            intermediates=Intermediates(
                memory=memory.tokens[:, : sum(height * width for height, width in memory.spatial_shapes)],
                level_sizes=memory.level_sizes,
                initial_content=queries.content,
                reference_boxes=decoded.reference_boxes,
                hidden=decoded.hidden,
                normed=normed,
                branch_hidden=decoded.branches,
                branch_normed=jnp.stack(branch_normed, axis=1) if branch_normed else decoded.branches,
                attention_mask=jax.vmap(distinct_attention)(decoded.selected),
                spatial_shapes=memory.spatial_shapes,
            ),
        )

    def remember(self, images: jax.Array, sizes: jax.Array, keys: jax.Array | None = None) -> Pyramid:
        """The memory of images; the arguments are those of a call."""
        with products(self.precision):
            maps, map_sizes = jax.named_scope("backbone")(self.backbone)(images.astype(self.dtype), sizes, keys)
            maps, map_sizes = jax.named_scope("neck")(self.neck)(maps, map_sizes)
            return jax.named_scope("encoder")(self.encoder)(flatten(maps, map_sizes, sizes))

    def decoder_input(
        self, denoising: DenoisingQueries | None, matching: InitialQueries, dense: InitialQueries | None
    ) -> DecoderInput:
        """Joins the kinds of queries. Denoising queries see their own group and the matching queries, matching queries see
        matching queries, and dense queries see dense queries."""
        batch, num_matching, _ = matching.content.shape
        contents, boxes = [matching.content], [matching.proposals.boxes]
        # For each query its kind, its group within the kind, and whether other queries may see it: `[B, Q]` each.
        kinds = [jnp.full((batch, num_matching), MATCHING, jnp.int32)]
        groups = [jnp.zeros((batch, num_matching), jnp.int32)]
        visibles = [matching.proposals.valid]
        num_denoising = num_dense = 0
        if denoising is not None:
            assert self.denoiser is not None, "denoising queries need a denoiser"
            num_denoising = denoising.used.shape[1]
            contents.insert(0, jax.named_scope("denoiser")(self.denoiser.embed)(denoising).astype(self.dtype))
            boxes.insert(0, denoising.boxes)
            kinds.insert(0, jnp.full_like(denoising.group, DENOISING))
            groups.insert(0, denoising.group)
            visibles.insert(0, denoising.used)
        if dense is not None:
            num_dense = dense.content.shape[1]
            contents.append(dense.content)
            boxes.append(dense.proposals.boxes)
            kinds.append(jnp.full((batch, num_dense), DENSE, jnp.int32))
            groups.append(jnp.zeros((batch, num_dense), jnp.int32))
            visibles.append(dense.proposals.valid)
        kind, group, visible = (jnp.concatenate(parts, axis=1) for parts in (kinds, groups, visibles))
        same = (kind[:, :, None] == kind[:, None, :]) & (group[:, :, None] == group[:, None, :])
        denoising_sees_matching = (kind[:, :, None] == DENOISING) & (kind[:, None, :] == MATCHING)
        return DecoderInput(
            content=jnp.concatenate(contents, axis=1),
            reference_boxes=jnp.concatenate(boxes, axis=1),
            mask=(same | denoising_sees_matching) & visible[:, None, :],
            duplicates=matching.duplicates,
            position=matching.position,
            num_denoising=num_denoising,
            num_matching=num_matching,
            num_dense=num_dense,
        )


def valid_by_layer(denoising: DenoisingQueries | None, dense: InitialQueries | None, matching_valid: jax.Array) -> jax.Array:
    """Which queries of all kinds are valid, bool `[layers, B, Q]`, given the valid matching queries `[layers, B, M]`."""
    layers = len(matching_valid)
    parts = [matching_valid]
    if denoising is not None:
        parts.insert(0, jnp.broadcast_to(denoising.used, (layers, *denoising.used.shape)))
    if dense is not None:
        valid = dense.proposals.valid
        parts.append(jnp.broadcast_to(valid, (layers, *valid.shape)))
    return jnp.concatenate(parts, axis=-1)


def by_kind(predictions: Predictions, queries: DecoderInput) -> BranchPredictions:
    """Splits predictions of all queries `[layers, B, Q, ...]` by the kind of the queries."""

    def part(start, stop):
        return Predictions(
            logits=predictions.logits[:, :, start:stop],
            boxes=predictions.boxes[:, :, start:stop],
            valid=predictions.valid[:, :, start:stop],
        )

    first, last = queries.matching.start, queries.matching.stop
    return BranchPredictions(
        matching=part(first, last),
        denoising=part(0, first) if queries.num_denoising else None,
        dense=part(last, None) if queries.num_dense else None,
    )

"""The detector: one composition for all base models."""

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.models.encoder import Encoder
from hpr_jax.models.heads import DecoderHeads
from hpr_jax.models.neck import ChannelMapper
from hpr_jax.models.pyramid import flatten
from hpr_jax.models.queries.denoising import Denoiser
from hpr_jax.models.queries.proposals import InitialQueries
from hpr_jax.models.refiner.hybrid import DecoderInput, HybridRefiner
from hpr_jax.models.refiner.selection import counted, distinct_attention
from hpr_jax.ops.padding import zero_padding
from hpr_jax.types import BranchPredictions, DenoisingQueries, Intermediates, Outputs, Predictions


class Detector(nnx.Module):
    """Backbone, neck, encoder, initial queries, refiner and heads.

    Args:
      backbone: images, sizes and keys or None -> feature maps and their valid sizes.
      query_init: memory -> matching queries and dense ones or None.
      denoiser: or None for training without denoising queries.
      heads: of the primary branch; branch_heads: of each auxiliary branch.
      pixel_mean, pixel_std: of RGB values in 0..255.
      dtype: of what lies between the images and the heads. Boxes, predictions and parameters are float32.
    """

    def __init__(
        self,
        *,
        backbone: nnx.Module,
        neck: ChannelMapper,
        encoder: Encoder,
        query_init: nnx.Module,
        denoiser: Denoiser | None,
        refiner: HybridRefiner,
        heads: DecoderHeads,
        branch_heads: list[DecoderHeads],
        pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
        dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        self.backbone = backbone
        self.neck = neck
        self.encoder = encoder
        self.query_init = query_init
        self.denoiser = nnx.data(denoiser)
        self.refiner = refiner
        self.heads = heads
        self.branch_heads = nnx.List(branch_heads)
        self.pixel_mean, self.pixel_std = tuple(pixel_mean), tuple(pixel_std)
        self.dtype = jnp.dtype(dtype)

    def normalize(self, images: jax.Array, sizes: jax.Array) -> jax.Array:
        """RGB images `[B, H, W, 3]` in 0..255 (uint8 or float) -> zero mean and unit variance, zero where padded."""
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
          images: normalised `[B, H, W, 3]`, padded at the right and bottom.
          sizes: int32 `[B, 2]`, valid (height, width) in pixels.
          denoising: queries from `denoiser.draw`, in training.
          train: with the dense queries that only losses read.
          keys: `[B]`, for what is random in training (drop path); None: nothing is.
        """
        maps, map_sizes = self.neck(*self.backbone(zero_padding(images, sizes).astype(self.dtype), sizes, keys))
        memory = self.encoder(flatten(maps, map_sizes, sizes))
        matching, dense = self.query_init(memory, with_dense=train)
        queries = self._decoder_input(denoising, matching, dense)
        decoded = self.refiner(queries, memory, self.heads)

        normed = self.refiner.norm(decoded.hidden)
        branch_normed = [norm(decoded.branches[:, i]) for i, norm in enumerate(self.refiner.branch_norms)]
        valid = self._valid(denoising, dense, counted(decoded.kept) & matching.proposals.valid)
        references = decoded.reference_boxes[:-1]

        def predict(heads, hidden):
            logits, boxes = heads.predict(hidden, references, queries.num_dense)
            return _by_kind(Predictions(logits, boxes, valid), queries)

        return Outputs(
            primary=predict(self.heads, normed),
            branches={
                name: predict(heads, hidden)
                for name, heads, hidden in zip(self.refiner.branches, self.branch_heads, branch_normed)
            },
            proposals=matching.proposals,
            dense_proposals=dense.proposals if dense is not None else None,
            intermediates=Intermediates(
                memory=memory.tokens,
                level_sizes=memory.level_sizes,
                initial_content=queries.content,
                reference_boxes=decoded.reference_boxes,
                hidden=decoded.hidden,
                normed=normed,
                branch_hidden=decoded.branches,
                branch_normed=jnp.stack(branch_normed, axis=1) if branch_normed else decoded.branches,
                attention_mask=jax.vmap(distinct_attention)(decoded.kept),
                spatial_shapes=memory.spatial_shapes,
            ),
        )

    def _decoder_input(
        self, denoising: DenoisingQueries | None, matching: InitialQueries, dense: InitialQueries | None
    ) -> DecoderInput:
        """Joins the kinds of queries. Denoising ones see their own group and the matching ones; matching ones see
        matching ones; dense ones see dense ones."""
        batch, num_matching, _ = matching.content.shape
        content, boxes = [matching.content], [matching.proposals.boxes]
        # Per query: its kind, its group within the kind, and whether others may see it.
        kind = [jnp.ones((batch, num_matching), jnp.int32)]
        group = [jnp.zeros((batch, num_matching), jnp.int32)]
        visible = [matching.proposals.valid]
        num_denoising = num_dense = 0
        if denoising is not None:
            num_denoising = denoising.used.shape[1]
            content.insert(0, self.denoiser.embed(denoising).astype(self.dtype))
            boxes.insert(0, denoising.boxes)
            kind.insert(0, jnp.zeros_like(denoising.group))
            group.insert(0, denoising.group)
            visible.insert(0, denoising.used)
        if dense is not None:
            num_dense = dense.content.shape[1]
            content.append(dense.content)
            boxes.append(dense.proposals.boxes)
            kind.append(jnp.full((batch, num_dense), 2))
            group.append(jnp.zeros((batch, num_dense), jnp.int32))
            visible.append(dense.proposals.valid)
        kind, group, visible = (jnp.concatenate(parts, axis=1) for parts in (kind, group, visible))
        same = (kind[:, :, None] == kind[:, None, :]) & (group[:, :, None] == group[:, None, :])
        denoising_sees_matching = (kind[:, :, None] == 0) & (kind[:, None, :] == 1)
        return DecoderInput(
            content=jnp.concatenate(content, axis=1),
            reference_boxes=jnp.concatenate(boxes, axis=1),
            mask=(same | denoising_sees_matching) & visible[:, None, :],
            twins=matching.twins,
            num_denoising=num_denoising,
            num_matching=num_matching,
            num_dense=num_dense,
        )

    @staticmethod
    def _valid(denoising, dense, counted_matching):
        layers = len(counted_matching)
        parts = [counted_matching]
        if denoising is not None:
            parts.insert(0, jnp.broadcast_to(denoising.used, (layers, *denoising.used.shape)))
        if dense is not None:
            valid = dense.proposals.valid
            parts.append(jnp.broadcast_to(valid, (layers, *valid.shape)))
        return jnp.concatenate(parts, axis=-1)


def _by_kind(predictions: Predictions, queries: DecoderInput) -> BranchPredictions:
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

"""Contrastive denoising queries (DINO, Zhang et al. 2023, section 3.3) in a fixed number of slots."""

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.ops.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from hpr_jax.types import DenoisingQueries, Targets


class Denoiser(nnx.Module):
    """Draws noisy copies of the ground truth and embeds their labels.

    The copies form groups of [positives; negatives], each half as long as the most boxes of any view of a chunk. As many
    groups are made as fit into `queries` positives. Chunks are all views of fixed runs of images, `views_per_chunk` views in
    all, so that the number of groups does not depend on how a batch is spread over devices.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        queries: int,
        label_noise: float,
        box_noise: float,
        views_per_chunk: int,
        rngs: nnx.Rngs,
    ):
        self.embedding = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (num_classes, channels)))
        self.queries, self.views_per_chunk = queries, views_per_chunk
        self.label_noise, self.box_noise = label_noise, box_noise

    def draw(self, key: jax.Array, targets: Targets, views: int = 1) -> DenoisingQueries:
        """Noisy queries for a batch; 2 max(queries, N) slots a view, always enough.

        Args:
          views: of each image, side by side in the batch.
        """
        batch, most, _ = targets.boxes.shape
        slots = 2 * max(self.queries, most)
        layout = self._layout(targets, slots, views)
        labels = jnp.take_along_axis(targets.labels, layout["target"], axis=1)
        boxes = jnp.take_along_axis(targets.boxes, layout["target"][..., None], axis=1)

        flip_key, label_key, sign_key, noise_key = jax.random.split(key, 4)
        # Half of the noise rate, as published; a drawn label may be the true one.
        flip = jax.random.uniform(flip_key, labels.shape) < 0.5 * self.label_noise
        labels = jnp.where(flip, jax.random.randint(label_key, labels.shape, 0, len(self.embedding.get_value())), labels)

        sign = jax.random.rademacher(sign_key, boxes.shape, jnp.float32)
        # Positives move each side by up to half the box size, negatives by half to once the box size.
        noise = jax.random.uniform(noise_key, boxes.shape) + jnp.where(layout["positive"], 0.0, 1.0)[..., None]
        half_sides = jnp.tile(boxes[..., 2:], 2) * 0.5
        corners = jnp.clip(cxcywh_to_xyxy(boxes) + sign * noise * half_sides * self.box_noise, 0.0, 1.0)
        boxes = jax.nn.sigmoid(inverse_sigmoid(xyxy_to_cxcywh(corners), 1e-3))
        boxes = jnp.where(layout["object"][..., None], boxes, 0.5)
        return DenoisingQueries(labels=labels, boxes=boxes, **layout)

    def embed(self, queries: DenoisingQueries) -> jax.Array:
        """Content of the queries: `[B, D, C]`, zero where there is no object."""
        return jnp.where(queries.object[..., None], self.embedding[queries.labels], 0.0)

    def _layout(self, targets: Targets, slots: int, views: int) -> dict[str, jax.Array]:
        batch = len(targets.valid)
        counts = jnp.sum(targets.valid, axis=1)
        chunk = jnp.arange(batch) // (views * max(self.views_per_chunk // views, 1))
        most = jax.ops.segment_max(counts, chunk, num_segments=batch)[chunk][:, None]
        return group_layout(counts[:, None], most, jnp.maximum(self.queries // jnp.maximum(most, 1), 1), slots)


def group_layout(counts: jax.Array, most: jax.Array, groups: jax.Array, slots: int) -> dict[str, jax.Array]:
    """Which slot belongs to what: the fields of `DenoisingQueries` that do not depend on chance.

    Args:
      counts: boxes of each image, int `[B, 1]`.
      most: length of a half group, int `[B, 1]`.
      groups: number of groups, int `[B, 1]`.
      slots: D.
    """
    slot = jnp.arange(slots)[None, :]
    length = jnp.maximum(most, 1)
    # In floating point, exact for such numbers: integer division is slow to compile, and fused into every reader.
    group = jnp.floor((slot + 0.5) / (2 * length)).astype(jnp.int32)
    place = slot - group * 2 * length
    target = jnp.where(place < length, place, place - length)
    used = slot < 2 * most * groups
    is_object = used & (target < counts)
    return {
        "target": jnp.where(is_object, target, 0),
        "group": jnp.where(used, group, -1),
        "used": used,
        "object": is_object,
        "positive": is_object & (place < length),
    }

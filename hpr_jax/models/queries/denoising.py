"""Contrastive denoising queries (DINO, Zhang et al. 2023, section 3.3) in a fixed number of slots."""

import jax
import jax.numpy as jnp
from flax import nnx

from hpr_jax.ops.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from hpr_jax.types import DenoisingQueries, Targets


class Denoiser(nnx.Module):
    """Draws noisy copies of the ground truth, and embeds their labels.

    The copies form groups. A group has a positive copy of each box, then a negative copy of each box; both halves are as
    long as the view with the most boxes in its chunk requires. A view has as many groups as fit into `queries` positive
    copies. A chunk is a fixed run of images with all their views, `views_per_chunk` views together, so that the number of
    groups does not depend on how a batch is split over devices.

    Args:
      queries: number of positive copies of a view at most, except that there is always one group.
      label_noise: twice the probability that a label is drawn anew.
      box_noise: scale of the noise on boxes; 1 moves the sides of a positive copy by up to half the box's size.
      views_per_chunk: see above.
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
        """Noisy queries for a batch, in 2 max(queries, N) slots for each view, which is always enough.

        Args:
          targets: ground truth of the B views of the batch.
          views: number of views of each image, which stand side by side in the batch.
        """
        batch, most, _ = targets.boxes.shape
        slots = 2 * max(self.queries, most)
        layout = self._layout(targets, slots, views)
        labels = jnp.take_along_axis(targets.labels, layout["target"], axis=1)
        boxes = jnp.take_along_axis(targets.boxes, layout["target"][..., None], axis=1)

        flip_key, label_key, sign_key, noise_key = jax.random.split(key, 4)
        # Labels are drawn anew at half of the noise rate, as published; a drawn label may be the true one.
        flip = jax.random.uniform(flip_key, labels.shape) < 0.5 * self.label_noise
        labels = jnp.where(flip, jax.random.randint(label_key, labels.shape, 0, len(self.embedding.get_value())), labels)

        sign = jax.random.rademacher(sign_key, boxes.shape, jnp.float32)
        # The noise moves each side of a positive copy by up to half the box's size, and each side of a negative copy by half
        # to once the box's size.
        noise = jax.random.uniform(noise_key, boxes.shape) + jnp.where(layout["positive"], 0.0, 1.0)[..., None]
        half_sides = jnp.tile(boxes[..., 2:], 2) * 0.5
        corners = jnp.clip(cxcywh_to_xyxy(boxes) + sign * noise * half_sides * self.box_noise, 0.0, 1.0)
        boxes = jax.nn.sigmoid(inverse_sigmoid(xyxy_to_cxcywh(corners), 1e-3))
        boxes = jnp.where(layout["object"][..., None], boxes, 0.5)
        return DenoisingQueries(labels=labels, boxes=boxes, **layout)

    def embed(self, queries: DenoisingQueries) -> jax.Array:
        """Content of the queries, `[B, D, C]`: the embedding of their labels, zero where there is no object."""
        return jnp.where(queries.object[..., None], self.embedding[queries.labels], 0.0)

    def _layout(self, targets: Targets, slots: int, views: int) -> dict[str, jax.Array]:
        batch = len(targets.valid)
        counts = jnp.sum(targets.valid, axis=1)
        chunk = jnp.arange(batch) // (views * max(self.views_per_chunk // views, 1))
        most = jax.ops.segment_max(counts, chunk, num_segments=batch)[chunk][:, None]
        return group_layout(counts[:, None], most, jnp.maximum(self.queries // jnp.maximum(most, 1), 1), slots)


def group_layout(counts: jax.Array, most: jax.Array, groups: jax.Array, slots: int) -> dict[str, jax.Array]:
    """What each slot is for: the fields of `DenoisingQueries` that are not drawn at random.

    Args:
      counts: number of boxes of each view, int `[B, 1]`.
      most: length of half a group, int `[B, 1]`.
      groups: number of groups, int `[B, 1]`.
      slots: D, the number of slots of each view.

    Returns:
      Fields by name, `[B, D]` each.
    """
    slot = jnp.arange(slots)[None, :]
    length = jnp.maximum(most, 1)
    # Divided in floating point, which is exact for such small numbers: an integer division compiles slowly, and XLA repeats
    # it in everything that reads the result.
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

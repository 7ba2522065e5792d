"""The compiled function from a padded batch of images to detections."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hpr_jax.ops.boxes import cxcywh_to_xyxy, whwh
from hpr_jax.runtime.devices import EVERYWHERE, split_at
from hpr_jax.types import Predictions


@functools.lru_cache(maxsize=8)
def make_detect(graph: nnx.GraphDef, max_detections: int, mesh: Mesh | None = None) -> jax.stages.Wrapped:
    """A jitted function that detects objects in a batch of images.

    Its arguments are the detector's state, images uint8 `[B, H, W, 3]`, padded behind their valid sizes, and these sizes,
    int32 `[B, 2]`, (height, width). It returns what `top_detections` does.

    The function is cached by the arguments, so that users in one process share its compiled programs.

    Args:
      graph: of the detector.
      max_detections: how many (query, class) pairs are taken of each image.
      mesh: splits the images over its devices; None for JAX's default device.
    """

    def detect(state, images, sizes):
        detector = nnx.merge(graph, state)
        outputs = detector(detector.normalize(images, sizes), sizes)
        last_layer = jax.tree.map(lambda x: x[-1], outputs.primary.matching)
        return top_detections(last_layer, sizes, max_detections)

    if mesh is not None:
        specs = EVERYWHERE, split_at(0), split_at(0)
        detect = jax.shard_map(detect, mesh=mesh, in_specs=specs, out_specs=split_at(0), check_vma=False)
    return jax.jit(detect)


def top_detections(
    predictions: Predictions, sizes: jax.Array, max_detections: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The (query, class) pairs of each image with the highest scores.

    Args:
      predictions: of one layer, `[B, Q, ...]`.
      sizes: int32 `[B, 2]`, valid (height, width) in pixels.
      max_detections: how many pairs to take.

    Returns:
      boxes `[B, n, 4]`, xyxy in pixels of the padded images; scores `[B, n]`, highest first; labels int32 `[B, n]`; valid
      bool `[B, n]`, false for pairs of queries that do not exist. n = min(max_detections, Q * K).
    """
    batch, queries, classes = predictions.logits.shape
    scores = jnp.where(predictions.valid[..., None], jax.nn.sigmoid(predictions.logits), -1.0)
    scores, index = jax.lax.top_k(scores.reshape(batch, -1), min(max_detections, queries * classes))
    scale = whwh(sizes)[:, None]
    boxes = jnp.take_along_axis(predictions.boxes, (index // classes)[..., None], axis=1)
    boxes = jnp.clip(cxcywh_to_xyxy(boxes) * scale, 0.0, scale)
    valid = scores >= 0
    return boxes, jnp.where(valid, scores, 0.0), (index % classes).astype(jnp.int32), valid

"""The compiled function from a padded batch of images to detections."""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hpr_jax.ops.boxes import cxcywh_to_xyxy, whwh
from hpr_jax.runtime.devices import EVERYWHERE, split_at
from hpr_jax.types import Predictions

Array = TypeVar("Array", np.ndarray, jax.Array)

# (height, width) -> (width, height, width, height).
_WHWH = np.array([1, 0, 1, 0])


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

    detect = functools.partial(detections, graph, max_detections)
    if mesh is not None:
        specs = EVERYWHERE, split_at(0), split_at(0)
        detect = jax.shard_map(detect, mesh=mesh, in_specs=specs, out_specs=split_at(0), check_vma=False)
    return jax.jit(detect)


def detections(
    graph: nnx.GraphDef, max_detections: int, state: nnx.State, images: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What the function of `make_detect` computes."""
    detector = nnx.merge(graph, state)
    outputs = detector(detector.normalize(images, sizes), sizes)
    last_layer = jax.tree.map(lambda x: x[-1], outputs.primary.matching)
    return jax.named_scope("detections")(top_detections)(last_layer, sizes, max_detections)


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


def in_image_pixels(boxes: Array, resized: Array, original: Array) -> Array:
    """Moves boxes from resized images to the images themselves, and clips them: on a canvas larger than the image, boxes may
    reach beyond the image. NumPy and XLA compute the same bits.

    Args:
      boxes: float32 xyxy `[..., n, 4]` in pixels of the resized images.
      resized, original: (height, width) of the images, `[..., 2]`.

    Returns:
      float32 xyxy `[..., n, 4]`.
    """
    limit = original[..., None, _WHWH].astype(np.float32)
    scale = limit / resized[..., None, _WHWH].astype(np.float32)
    return (boxes * scale).clip(np.float32(0), limit)

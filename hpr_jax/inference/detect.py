"""From padded batches to detections, compiled."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hpr_jax.ops.boxes import cxcywh_to_xyxy, whwh
from hpr_jax.runtime.devices import EVERYWHERE, split_at
from hpr_jax.types import Predictions


@functools.lru_cache(maxsize=8)
def make_detect(graph: nnx.GraphDef, count: int, mesh: Mesh | None = None):
    """Jitted: state, uint8 images, sizes -> boxes in pixels of the padded input, scores, labels, valid. A mesh splits the
    images over its devices. Cached, so that runs in the same process share what is compiled."""

    def detect(state, images, sizes):
        detector = nnx.merge(graph, state)
        outputs = detector(detector.normalize(images, sizes), sizes)
        return detections(jax.tree.map(lambda x: x[-1], outputs.primary.matching), sizes, count)

    if mesh is not None:
        specs = EVERYWHERE, split_at(0), split_at(0)
        detect = jax.shard_map(detect, mesh=mesh, in_specs=specs, out_specs=split_at(0), check_vma=False)
    return jax.jit(detect)


def detections(predictions: Predictions, sizes: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The `count` best (query, class) pairs of each image.

    Args:
      predictions: of one layer, `[B, Q, ...]`.
      sizes: int32 `[B, 2]`, valid (height, width) in pixels.

    Returns:
      boxes xyxy in pixels `[B, n, 4]`, scores `[B, n]` falling, labels int32 `[B, n]`, valid bool `[B, n]`, with
      n = min(count, Q * K); fewer are valid when fewer pairs exist.
    """
    batch, queries, classes = predictions.logits.shape
    scores = jnp.where(predictions.valid[..., None], jax.nn.sigmoid(predictions.logits), -1.0)
    scores, index = jax.lax.top_k(scores.reshape(batch, -1), min(count, queries * classes))
    scale = whwh(sizes)[:, None]
    boxes = jnp.take_along_axis(predictions.boxes, (index // classes)[..., None], axis=1)
    boxes = jnp.clip(cxcywh_to_xyxy(boxes) * scale, 0.0, scale)
    valid = scores >= 0
    return boxes, jnp.where(valid, scores, 0.0), (index % classes).astype(jnp.int32), valid

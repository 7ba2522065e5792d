"""What each branch of a detector predicts, layer by layer: its best queries."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from hpr_jax.inference.explanation import PRIMARY
from hpr_jax.ops.boxes import cxcywh_to_xyxy
from hpr_jax.types import Outputs, Predictions


@dataclasses.dataclass(frozen=True)
class TopQueries:
    """The best queries of one branch behind one layer, best first. A query is there once, with its best class.

    Attributes:
      queries: their numbers among the matching queries, int `[n]`. A query has the same number in all branches and layers.
      boxes: float32 xyxy `[n, 4]` in pixels of the image.
      scores: float32 `[n]`, between 0 and 1.
      labels: int `[n]`, class indices.
      names: the class name of each.
    """

    queries: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]

    def to_dict(self) -> list[dict[str, Any]]:
        """The queries as values of JSON: `query`, `box`, `score`, `label` and `name` of each."""
        rows = zip(self.queries.tolist(), self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.names)
        return [dict(zip(("query", "box", "score", "label", "name"), row)) for row in rows]


def top_queries(
    outputs: Outputs,
    auxiliaries: Sequence[str],
    count: int,
    scale: np.ndarray,
    limit: np.ndarray,
    class_names: Sequence[str],
) -> dict[str, list[TopQueries]]:
    """The best matching queries of each branch behind each layer, by the name of the branch's refiner, `primary` first.

    Args:
      outputs: of one image, with a batch axis of 1.
      auxiliaries: the names of the auxiliary branches, in their order, which compiled programs lose.
      count: how many queries to take.
      scale: from normalised (x, y) to pixels of the image, float32 `[2]`.
      limit: (width, height) of the image, to which boxes are clipped.
      class_names: the names of the K classes.
    """
    branches = [outputs.primary, *(outputs.branches[name] for name in auxiliaries)]
    found = jax.device_get([_with_corners(branch.matching) for branch in branches])
    corners = np.tile(scale, 2).astype(np.float32), np.tile(limit, 2).astype(np.float32)
    return {
        name: [
            _best(jax.tree.map(lambda x, place=place: x[place, 0], predictions), count, *corners, class_names)
            for place in range(len(predictions.logits))
        ]
        for name, predictions in zip((PRIMARY, *auxiliaries), found)
    }


def _with_corners(predictions: Predictions) -> Predictions:
    """Predictions whose boxes are xyxy."""
    return predictions.replace(boxes=cxcywh_to_xyxy(predictions.boxes))  # type: ignore[attr-defined]


def _best(
    predictions: Predictions, count: int, scale: np.ndarray, limit: np.ndarray, class_names: Sequence[str]
) -> TopQueries:
    """The best of the queries `[Q, ...]` of one branch and layer, whose boxes are xyxy."""
    logits = np.where(predictions.valid, predictions.logits.max(axis=-1), -np.inf)
    queries = np.argsort(-logits, kind="stable")[: min(count, int(predictions.valid.sum()))]
    labels = np.asarray(predictions.logits).argmax(axis=-1)[queries]
    return TopQueries(
        queries=queries,
        boxes=(np.asarray(predictions.boxes)[queries] * scale).clip(np.float32(0), limit),
        scores=(1 / (1 + np.exp(-logits[queries]))).astype(np.float32),
        labels=labels,
        names=[class_names[label] for label in labels],
    )

"""What was found in one image."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from hpr_jax.data.dataset import Id
from hpr_jax.inference.drawing import draw, encode_image

if TYPE_CHECKING:
    import supervision as sv

# So many objects are named in a line.
_NAMED = 5


@dataclasses.dataclass(frozen=True, repr=False)
class Detections:
    """What was found in one image, best first. Notebooks show it as a picture.

    Attributes:
      image: RGB uint8 `[h, w, 3]`.
      boxes: float32 xyxy `[n, 4]` in pixels of the image.
      scores: float32 `[n]`, between 0 and 1.
      labels: int32 `[n]`, class indices.
      names: the class name of each detection.
      category_ids: the category of each detection, as in the training annotations.
    """

    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    category_ids: list[Id]

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        named = ", ".join(f"{name} {score:.2f}" for name, score in list(zip(self.names, self.scores))[:_NAMED])
        more = f" and {len(self) - _NAMED} more" if len(self) > _NAMED else ""
        return f"<Detections in {width}x{height} pixels: {named or 'none'}{more}>"

    def _repr_png_(self) -> bytes:
        """The picture that notebooks show."""
        return encode_image(self.draw(), ".png")

    def above(self, threshold: float) -> "Detections":
        """The detections with at least this score."""
        return self.only(self.scores >= threshold)

    def only(self, keep: np.ndarray) -> "Detections":
        """The detections for which an array of bool `[n]` is true."""
        where = np.flatnonzero(keep)
        return Detections(
            image=self.image,
            boxes=self.boxes[keep],
            scores=self.scores[keep],
            labels=self.labels[keep],
            names=[self.names[i] for i in where],
            category_ids=[self.category_ids[i] for i in where],
        )

    def draw(self) -> np.ndarray:
        """The image with boxes, names and scores on it, RGB uint8 `[h, w, 3]`."""
        captions = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores)]
        return draw(self.image, self.boxes, self.labels, captions)

    def to_dict(self) -> dict[str, Any]:
        """The detections as values of JSON: size of the image, and for each detection `box` (xyxy in pixels), `score`,
        `label`, `name` and `category_id`."""
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.names, self.category_ids)
        keys = ("box", "score", "label", "name", "category_id")
        height, width = self.image.shape[:2]
        return {"height": height, "width": width, "detections": [dict(zip(keys, row)) for row in rows]}

    def to_supervision(self) -> "sv.Detections":
        """The detections for the library supervision, which draws, tracks, slices and exports them."""
        # Imported here, since it takes a second that nobody else needs.
        import supervision as sv

        return sv.Detections(
            xyxy=self.boxes.astype(np.float32).reshape(-1, 4),
            confidence=self.scores.astype(np.float32),
            class_id=self.labels.astype(int),
            data={"class_name": np.array(self.names, dtype=str), "category_id": np.array(self.category_ids)},
        )

"""How a query comes to its box: where it samples the image in each layer, and what each branch predicts of it."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import cast

import cv2
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.inference.drawing import contact_sheet, encode_image
from hpr_jax.models.detector import Detector
from hpr_jax.models.layers import layer
from hpr_jax.models.refiner.deformable import DeformableInteraction
from hpr_jax.ops.boxes import cxcywh_to_xyxy

# RGB colours: of the box in front of a layer, and of the boxes that branches predict behind it, the primary one first.
BEFORE = (255, 255, 255)
BRANCHES = ((255, 64, 64), (64, 200, 255), (255, 200, 0), (120, 255, 120))
# Height in pixels of the picture of a layer.
HEIGHT = 320


@flax.struct.dataclass
class Samples:
    """Where all queries of one image look.

    Attributes:
      points: centres (x, y) of the samples, normalised to the image, `[layers, Q, S, 2]`.
      weights: of each sample, `[layers, Q, S]`; those of one head sum to 1.
    """

    points: jax.Array
    weights: jax.Array


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """One query of one image, layer by layer. Notebooks show it as a picture.

    Attributes:
      image: RGB uint8 `[h, w, 3]`.
      query: number of the query among the matching ones.
      points: where the deformable attention of the primary refiner samples, xy in pixels, float32 `[layers, S, 2]`; the S
        samples are those of all heads, levels and points.
      weights: of each sample, float32 `[layers, S]`; those of one head sum to 1.
      reference_boxes: xyxy in pixels, in front of each layer and behind the last, float32 `[layers + 1, 4]`.
      boxes: what each branch predicts, by the name of its refiner, xyxy in pixels, float32 `[layers, 4]`.
      scores: the score of each class in each branch, float32 `[layers, K]`.
      class_names: the names of the K classes.
    """

    image: np.ndarray
    query: int
    points: np.ndarray
    weights: np.ndarray
    reference_boxes: np.ndarray
    boxes: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    class_names: tuple[str, ...]

    def __repr__(self) -> str:
        primary = next(iter(self.scores.values()))[-1]
        best = int(primary.argmax())
        return f"<query {self.query}: {self.class_names[best]} {primary[best]:.2f} after {len(self.points)} layers>"

    def _repr_png_(self) -> bytes:
        """The picture that notebooks show."""
        return encode_image(self.draw(), ".png")

    def draw(self) -> np.ndarray:
        """A picture of each layer, side by side, RGB uint8 `[h, w, 3]`: the samples, the larger the more they weigh, in
        white the box in front of the layer, and in colours what each branch predicts, with its best class."""
        return contact_sheet([[self.draw_layer(number) for number in range(len(self.points))]], HEIGHT)

    def draw_layer(self, number: int) -> np.ndarray:
        """The picture of one layer, RGB uint8 `[h, w, 3]`."""
        scale = HEIGHT / self.image.shape[0]
        width = max(round(self.image.shape[1] * scale), 1)
        picture = np.ascontiguousarray(cv2.resize(self.image, (width, HEIGHT)) // 2 + 32, np.uint8)
        heaviest = max(float(self.weights[number].max()), 1e-9)
        for (x, y), weight in zip(self.points[number] * scale, self.weights[number] / heaviest):
            cv2.circle(picture, _whole((x, y)), 1 + round(4 * float(weight) ** 0.5), BRANCHES[0], -1, cv2.LINE_AA)
        _rectangle(picture, self.reference_boxes[number] * scale, BEFORE, 1)
        lines = [(f"layer {number + 1}", BEFORE)]
        for (name, boxes), colour in zip(self.boxes.items(), BRANCHES):
            _rectangle(picture, boxes[number] * scale, colour, 2)
            scores = self.scores[name][number]
            lines.append((f"{name}: {self.class_names[int(scores.argmax())]} {scores.max():.2f}", colour))
        for row, (text, colour) in enumerate(lines):
            for shade, thickness in (((0, 0, 0), 3), (colour, 1)):
                cv2.putText(picture, text, (4, 14 + 15 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.42, shade, thickness, cv2.LINE_AA)
        return picture


def explain(
    module: Detector,
    image: np.ndarray,
    resized: tuple[int, int],
    padded: np.ndarray,
    sizes: np.ndarray,
    query: int | None,
    class_names: Sequence[str],
) -> Explanation:
    """The explanation of one query.

    Args:
      image: RGB uint8 `[h, w, 3]`.
      resized: (height, width) to which it is resized.
      padded: the input made of it, uint8 `[1, H, W, 3]`.
      sizes: its valid size, int32 `[1, 2]`.
      query: number of a matching query; None for the one with the best score.

    Raises:
      UserError: there is no such query, or the primary refiner does not sample.
    """
    if not isinstance(module.refiner.layers.primary.interaction, DeformableInteraction):
        raise UserError("Only queries of the primary refiner 'deformable' sample the image at points that can be shown.")
    graph, state = nnx.split(module)
    samples, references, predictions = jax.device_get(_look(graph)(state, padded, sizes))
    logits, _ = predictions[PRIMARY]
    count = logits.shape[1]
    number = int(logits[-1].max(axis=-1).argmax()) if query is None else query
    if not 0 <= number < count:
        raise UserError(f"There is no query {query}; this detector has the queries 0 to {count - 1}.")
    # Normalised to what is valid of the padded input -> pixels of the image.
    valid, size = sizes[0][::-1].astype(np.float32), np.array(image.shape[1::-1], np.float32)
    scale = valid * size / np.array(resized[::-1], np.float32)
    names = (PRIMARY, *module.refiner.branches)
    return Explanation(
        image=image,
        query=number,
        points=(samples.points[:, number] * scale).astype(np.float32),
        weights=samples.weights[:, number],
        reference_boxes=_in_pixels(references[:, number], scale),
        boxes={name: _in_pixels(predictions[name][1][:, number], scale) for name in names},
        scores={name: 1 / (1 + np.exp(-predictions[name][0][:, number])) for name in names},
        class_names=tuple(class_names),
    )


# The name of the primary branch among the others, which have those of their refiners.
PRIMARY = "primary"


@functools.lru_cache(maxsize=4)
def _look(graph: nnx.GraphDef) -> jax.stages.Wrapped:
    """A compiled function from a detector's state, a padded image and its size to the samples, the reference boxes
    `[layers + 1, Q, 4]`, and for each branch logits `[layers, Q, K]` and boxes `[layers, Q, 4]`."""

    @jax.jit
    def look(state, images, sizes):
        detector = nnx.merge(graph, state)
        outputs = detector(detector.normalize(images, sizes), sizes)
        branches = {PRIMARY: outputs.primary, **outputs.branches}
        predictions = {
            name: (branch.matching.logits[:, 0], branch.matching.boxes[:, 0]) for name, branch in branches.items()
        }
        references = outputs.intermediates.reference_boxes[:, 0]
        return samples_of(detector, detector.normalize(images, sizes), sizes), references, predictions

    return look


def samples_of(detector: Detector, images: jax.Array, sizes: jax.Array) -> Samples:
    """Where the queries of the first image sample the memory, in each layer.

    Args:
      images: normalised `[B, H, W, 3]`.
      sizes: int32 `[B, 2]`, valid (height, width).
    """
    memory = detector.remember(images, sizes)
    matching, _ = detector.query_init(memory, train=False)
    queries = detector.decoder_input(None, matching, None)
    decoded = detector.refiner(queries, memory, detector.heads)
    contents = jnp.concatenate([queries.content[None], decoded.hidden[:-1]])
    extent = memory.level_sizes[:, None, None, :, None, ::-1]
    found = []
    for number in range(len(contents)):
        one = layer(detector.refiner.layers, number)
        boxes = decoded.reference_boxes[number]
        position = detector.refiner.position_of(queries, boxes)
        assert position is not None, "queries whose boxes are not encoded have a position encoding"
        mask = detector.refiner.mask_of(queries, decoded.selected[number])
        attended, *_ = one.attended(contents[number], position, mask)
        attention = cast(DeformableInteraction, one.primary.interaction).attention
        pixels, weights = attention.samples(one.primary.norm1(attended), position, memory, boxes)
        found.append((pixels / extent, weights))
    points, weights = (jnp.stack(arrays)[:, 0] for arrays in zip(*found))
    return Samples(points.reshape(*points.shape[:2], -1, 2), weights.reshape(*weights.shape[:2], -1))


def _in_pixels(boxes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Normalised cxcywh `[..., 4]` -> xyxy in pixels."""
    return np.asarray(cxcywh_to_xyxy(jnp.asarray(boxes))) * np.tile(scale, 2).astype(np.float32)


def _whole(point: Iterable[float]) -> tuple[int, int]:
    """A point for OpenCV, within what it can draw."""
    x, y = (int(np.clip(round(float(value)), -10_000, 10_000)) for value in point)
    return x, y


def _rectangle(picture: np.ndarray, box: np.ndarray, colour: tuple[int, int, int], thickness: int) -> None:
    cv2.rectangle(picture, _whole(box[:2]), _whole(box[2:]), colour, thickness, cv2.LINE_AA)

"""Data sets of a few pictures in memory, whose pixels and objects tests choose."""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from hpr_jax.data.dataset import Classes, Dataset, GroundTruth, ImageAnnotations, Records
from hpr_jax.data.masks import parse_segmentation

# The category ids have gaps, and do not count from 0.
CLASSES = Classes(("cup", "pen", "hat"), (2, 5, 9))
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@dataclasses.dataclass(frozen=True)
class Picture:
    """An encoded image of a data set."""

    data: bytes
    name: str = "picture"
    exif: bool = True
    bits: int = 16

    def read(self) -> bytes:
        return self.data


class Pictures(list[Picture]):
    """The pictures of a data set."""

    @property
    def names(self) -> list[str]:
        return [picture.name for picture in self]


def png(pixels: np.ndarray) -> bytes:
    """RGB pixels `[h, w, 3]`, without loss."""
    return cv2.imencode(".png", np.ascontiguousarray(pixels[..., ::-1]))[1].tobytes()


def plain(height: int, width: int, colour: Sequence[int]) -> np.ndarray:
    """An image of one RGB colour."""
    return np.full((height, width, 3), colour, np.uint8)


def rectangle(box: Sequence[float], height: int, width: int):
    """The mask that fills an xyxy box of an image."""
    left, top, right, bottom = map(float, box)
    return parse_segmentation([[left, top, right, top, right, bottom, left, bottom]], height, width)


def dataset(
    images: Sequence[np.ndarray],
    boxes: Sequence[Sequence[Sequence[float]]],
    labels: Sequence[Sequence[int]] | None = None,
    *,
    masks: bool = False,
    classes: Classes = CLASSES,
    encoded: Sequence[bytes] | None = None,
) -> Dataset:
    """Images (RGB) with the ids 10, 11, ... and their xyxy boxes; labels count from 0 in each image by default.

    Args:
      masks: whether objects have masks, which fill their boxes.
      encoded: files of the images, where a PNG will not do.
    """
    labels = [range(len(some)) for some in boxes] if labels is None else labels
    annotated = [
        ImageAnnotations(
            image_id=10 + number,
            height=image.shape[0],
            width=image.shape[1],
            boxes=np.array(some, np.float32).reshape(-1, 4),
            labels=np.array(numbers, np.int32),
            masks=tuple(rectangle(box, *image.shape[:2]) for box in some) if masks else (),
        )
        for number, (image, some, numbers) in enumerate(zip(images, boxes, labels, strict=True))
    ]
    pictures = [Picture(data, f"{number}.png") for number, data in enumerate(encoded or map(png, images))]
    packed = Records.pack(annotated, Pictures(pictures), with_masks=masks)
    return Dataset("pictures", "0" * 64, classes, packed, ground_truth(annotated))


def ground_truth(annotated: Sequence[ImageAnnotations]) -> GroundTruth:
    """The boxes of all images, as evaluators get them."""
    truth = GroundTruth.Packer()
    for image in annotated:
        truth.begin_image()
        for (left, top, right, bottom), label in zip(image.boxes.tolist(), image.labels):
            box = (left, top, right - left, bottom - top)
            truth.add(int(label), box, box[2] * box[3], crowd=False, own_id=len(truth.images))
    return truth.finish()

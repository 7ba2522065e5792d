"""A small data set of coloured shapes in COCO layout, which follows from a seed: JPEG images, boxes and polygons.

By default, shapes have 10 to 60 % of the image's side; they may overlap, backgrounds are noisy, and category ids have gaps.
"""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

# The category id of each kind of shape.
CATEGORIES = {"circle": 1, "square": 2, "triangle": 4, "star": 7}
# The smallest and the largest radius of a shape, as parts of the image's shorter side.
RADII = (0.05, 0.3)


def outline(kind: str, center: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Corners (x, y) of a shape, float64 `[n, 2]`; `radius` in pixels, `angle` in radians."""
    if kind == "star":
        turns, radii = np.arange(10) / 10, np.where(np.arange(10) % 2, 0.45, 1.0)
    else:
        corners = {"circle": 32, "square": 4, "triangle": 3}[kind]
        turns, radii = np.arange(corners) / corners, np.ones(corners)
    theta = 2 * np.pi * turns + angle
    return center + radius * radii[:, None] * np.stack([np.cos(theta), np.sin(theta)], axis=-1)


def draw_image(
    rng: np.random.Generator, height: int, width: int, most: int = 5, radii: tuple[float, float] = RADII
) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    """A picture, uint8 `[h, w, 3]`, and its objects (kind, corners), in the order in which they were painted.

    Args:
      most: the most objects that it has; it has one at least.
      radii: the smallest and the largest radius, as parts of the shorter side.
    """
    coarse = rng.integers(40, 216, (4, 4, 3)).astype(np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float64)
    image += rng.normal(0, 8, image.shape)
    image = image.clip(0, 255).astype(np.uint8)
    objects: list[tuple[str, np.ndarray]] = []
    for _ in range(rng.integers(1, most + 1)):
        kind = str(rng.choice(list(CATEGORIES)))
        radius = rng.uniform(*radii) * min(height, width)
        center = rng.uniform(0.6 * radius, np.array([width, height]) - 0.6 * radius)
        corners = outline(kind, center, radius, rng.uniform(0, 2 * np.pi))
        colour = rng.integers(0, 256, 3).tolist()
        cv2.fillPoly(image, [np.rint(corners).astype(np.int32)], colour, lineType=cv2.LINE_AA)
        objects.append((kind, corners))
    return image, objects


def visible_fraction(index: int, objects: list[tuple[str, np.ndarray]], height: int, width: int) -> float:
    """The fraction of an object that is neither painted over nor outside of the image."""
    index_map = np.zeros((height, width), np.uint8)
    # Large enough for what lies outside of the image, too.
    uncovered = np.zeros((3 * height, 3 * width), np.uint8)
    cv2.fillPoly(uncovered, [np.rint(objects[index][1] + [width, height]).astype(np.int32)], 1)
    for number, (_, corners) in enumerate(objects):
        cv2.fillPoly(index_map, [np.rint(corners).astype(np.int32)], number + 1)
    return float(np.sum(index_map == index + 1) / max(np.sum(uncovered), 1))


def make_split(directory: Path, name: str, count: int, side: int, rng: np.random.Generator, **how: Any) -> None:
    """Writes the images and the annotation file of one split; `how` goes to `draw_image`."""
    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        height, width = side, int(side * rng.choice([1.0, 0.8]))
        if rng.random() < 0.5:
            height, width = width, height
        image, objects = draw_image(rng, height, width, **how)
        file_name = f"{number:06d}.jpg"
        cv2.imwrite(str(folder / file_name), image, [cv2.IMWRITE_JPEG_QUALITY, 92])
        images.append({"id": number, "file_name": file_name, "height": height, "width": width})
        for index, (kind, corners) in enumerate(objects):
            if visible_fraction(index, objects, height, width) < 0.3:
                continue
            clipped = corners.clip(0, [width, height])
            (left, top), (right, bottom) = clipped.min(axis=0), clipped.max(axis=0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": CATEGORIES[kind],
                    "bbox": [round(float(v), 2) for v in (left, top, right - left, bottom - top)],
                    "area": round(float(cv2.contourArea(clipped.astype(np.float32))), 2),
                    "segmentation": [[round(float(v), 2) for v in clipped.ravel()]],
                    "iscrowd": 0,
                }
            )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": kind} for kind, number in CATEGORIES.items()],
    }
    (directory / "annotations").mkdir(exist_ok=True)
    (directory / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


def make_shapes(
    directory: str | Path,
    train: int = 400,
    val: int = 100,
    side: int = 128,
    seed: int = 0,
    *,
    most: int = 5,
    radii: tuple[float, float] = RADII,
) -> Path:
    """Writes a data set of `train` and `val` images with a longer side of `side` pixels; returns its folder.

    Few large objects are learned sooner; `draw_image` says what `most` and `radii` are.
    """
    folder = Path(directory).expanduser()
    for stream, (name, count) in enumerate((("train2017", train), ("val2017", val))):
        make_split(folder, name, count, side, np.random.default_rng((seed, stream)), most=most, radii=radii)
    return folder

"""Draws the first images of a run's validation split, each with predictions (left) and with its ground truth (right).

python scripts/contact_sheet.py WORKDIR [--images 12] [--threshold 0.3] [--output WORKDIR/contact_sheet.jpg]
"""

import argparse
import itertools
import sys
from pathlib import Path

import cv2
import numpy as np

import hpr_jax
from hpr_jax.data.build import load_dataset
from hpr_jax.data.images import read_annotated_image
from hpr_jax.errors import UserError
from hpr_jax.inference.drawing import contact_sheet, draw, write_image

# Images in a row, each of which is drawn twice.
PER_ROW = 3
# Height of each image in the picture, in pixels.
HEIGHT = 320


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    detector = hpr_jax.load(arguments.workdir)
    dataset = load_dataset(detector.config.data, "val", detector.classes)
    pairs = []
    for record in itertools.islice(dataset.records, arguments.images):
        image = read_annotated_image(record.image, record.height, record.width)
        found = detector(image, arguments.threshold)
        captions = [f"{name} {score:.2f}" for name, score in zip(found.names, found.scores)]
        names = [dataset.classes.names[label] for label in record.labels]
        # Boxes are drawn after resizing, so that captions can be read.
        scale = HEIGHT / record.height
        image = cv2.resize(image, (round(record.width * scale), HEIGHT), interpolation=cv2.INTER_LINEAR)
        pairs.append(
            [
                draw(image, found.boxes * scale, found.labels, captions),
                draw(image, record.boxes * scale, record.labels, names),
            ]
        )
    rows = [list(itertools.chain(*pairs[start : start + PER_ROW])) for start in range(0, len(pairs), PER_ROW)]
    output = arguments.output or arguments.workdir / "contact_sheet.jpg"
    write_image(output, np.ascontiguousarray(contact_sheet(rows, HEIGHT)))
    print(output)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"contact_sheet: {error}")

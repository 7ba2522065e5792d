"""Times how an annotation file of COCO's size is read, with and without masks, and handed to another process.

    python scripts/benchmarks/annotations.py [--images 118287] [--objects 860000] [--corners 30]

It writes random annotations into a temporary folder: a polygon for each object; every 86th object is a crowd whose mask is
run lengths. Each reading has a process of its own. No images are needed.
"""

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hpr_jax.data.sources.coco import load_coco

HEIGHT, WIDTH, CLASSES = 480, 640, 80


def write_annotations(path: Path, images: int, objects: int, corners: int, rng: np.random.Generator) -> None:
    """Writes an annotation file with random objects, whose polygons have `corners` corners on average."""
    entries = [{"id": i, "file_name": f"{i:012}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(images)]
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)]
    owners = rng.integers(0, images, objects)
    with path.open("w") as file:
        file.write(f'{{"images": {json.dumps(entries)}, "categories": {json.dumps(categories)}, "annotations": [')
        for number in range(objects):
            radius = rng.uniform(4, 100)
            center = rng.uniform(radius, [WIDTH - radius, HEIGHT - radius])
            angles = np.linspace(0, 2 * np.pi, rng.integers(corners // 2, corners * 3 // 2), endpoint=False)
            outline = (center + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)).round(2)
            low, high = outline.min(axis=0), outline.max(axis=0)
            crowd = number % 86 == 0
            runs = {"size": [HEIGHT, WIDTH], "counts": [100_000, 500, HEIGHT * WIDTH - 100_500]}
            annotation = {
                "id": number + 1,
                "image_id": int(owners[number]),
                "category_id": number % CLASSES + 1,
                "bbox": [*low.tolist(), *(high - low).round(2).tolist()],
                "iscrowd": int(crowd),
                "segmentation": runs if crowd else [outline.ravel().tolist()],
            }
            file.write((", " if number else "") + json.dumps(annotation))
        file.write("]}")


def read(directory: Path, masks: bool) -> None:
    """Reads the annotations, and prints how long this process took and how much memory."""
    began, cpu = time.perf_counter(), time.process_time()
    dataset = load_coco(directory, ".", "annotations.json", masks=masks)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    began = time.perf_counter()
    pickled = pickle.dumps(dataset, protocol=4)
    packed = time.perf_counter() - began
    began = time.perf_counter()
    pickle.loads(pickled)
    unpacked = time.perf_counter() - began
    print(
        f"{'with' if masks else 'without'} masks: {seconds:.0f} s ({cpu:.0f} s of CPU), {peak:.1f} GB at most; "
        f"{len(pickled) / 1e9:.2f} GB pickled in {packed:.2f} s, unpickled in {unpacked:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--objects", type=int, default=860_000)
    parser.add_argument("--corners", type=int, default=30, help="of a polygon, on average")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    parser.add_argument("--masks", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read(Path(arguments.read), arguments.masks)
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "annotations.json"
        write_annotations(path, arguments.images, arguments.objects, arguments.corners, np.random.default_rng(0))
        print(f"{arguments.images:,} images, {arguments.objects:,} objects, {path.stat().st_size / 1e6:.0f} MB", flush=True)
        for masks in ([], ["--masks"]):
            subprocess.run([sys.executable, __file__, "--read", directory, *masks], check=True)


if __name__ == "__main__":
    main()

"""Times predict over a folder of photographs, against the same work done one step after the other.

    python scripts/benchmarks/predict.py RUN [--images 64] [--sides 480 640] [--batch 1] [--repeats 5]

RUN is whatever predict takes as a checkpoint. Both ways look at the same drawn images, in turn; loading the detector and
compiling are not counted.
"""

import argparse
import contextlib
import io
import shutil
import tempfile
import time
from pathlib import Path
from unittest import mock

import cv2
import numpy as np

from hpr_jax.data.images import read_image
from hpr_jax.inference.drawing import encode_image
from hpr_jax.inference.image_detector import ImageDetector
from hpr_jax.inference.load import load
from hpr_jax.inference.predict import PICTURES, predict
from hpr_jax.runtime.files import write_whole

THRESHOLD = 0.3


def write_images(folder: Path, count: int, height: int, width: int) -> None:
    """Draws blurred noise with shapes, which is about as hard to decode as a photograph."""
    rng = np.random.default_rng(0)
    for number in range(count):
        image = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), np.uint8), (0, 0), 2)
        for _ in range(5):
            centre = rng.integers(0, (width, height)).tolist()
            cv2.circle(image, centre, int(rng.integers(5, max(6, height // 4))), rng.integers(0, 256, 3).tolist(), -1)
        cv2.imwrite(str(folder / f"{number:03}.jpg"), image)


def one_by_one(detector: ImageDetector, folder: Path, output: Path) -> None:
    """Reads, detects, draws and writes, image after image."""
    for file in sorted(folder.iterdir()):
        found = detector(read_image(file), THRESHOLD)
        write_whole(output / f"{file.stem}{PICTURES}", encode_image(found.draw(), PICTURES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--sides", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    detector = load(arguments.run, overrides={"evaluate.batch_size": arguments.batch})
    with tempfile.TemporaryDirectory() as name, mock.patch("hpr_jax.inference.predict.load", return_value=detector):
        folder, output = Path(name) / "images", Path(name) / "output"
        folder.mkdir()
        write_images(folder, arguments.images, *arguments.sides)

        def overlapped() -> None:
            with contextlib.redirect_stderr(io.StringIO()):
                predict(arguments.run, [folder], output, THRESHOLD, batch=arguments.batch)

        ways = {"one by one": lambda: one_by_one(detector, folder, output), "predict": overlapped}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        # The first round compiles, and is not counted.
        for _ in range(1 + arguments.repeats):
            for way, run in ways.items():
                shutil.rmtree(output, ignore_errors=True)
                start = time.perf_counter()
                run()
                seconds[way].append(time.perf_counter() - start)
    medians = {way: float(np.median(times[1:])) for way, times in seconds.items()}
    for way, median in medians.items():
        print(f"{way}: {median:.3f} s, {1000 * median / arguments.images:.1f} ms an image")
    ratios = np.divide(seconds["predict"][1:], seconds["one by one"][1:])
    print(f"ratio: {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f} in {arguments.repeats} rounds)")


if __name__ == "__main__":
    main()

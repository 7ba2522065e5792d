"""Sends many requests at once to `hpr_jax serve`, and as many as there are pictures one after the other.

    python scripts/benchmarks/serving.py SOURCE [--requests 300] [--pictures 30] [--size 96x128]
        [--batch-size N] [--timeout SECONDS]

SOURCE is what `serve --checkpoint` takes: a run, or `configs/ddq.py:r50_1x` for random weights at full size. The server is
a process of its own, which compiles before anything is timed. The pictures, JPEG files of coarse
noise, are sent one after the other first; then all requests begin at the same time, each with a connection of its own. A
request is lost if it has no answer with status 200, and differs if what was found is not, but for rounding, what was found
in the same picture alone: a batch is another program, and adds up in another order.
"""

import argparse
import collections
import concurrent.futures
import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np

# What rounding may make of a box, in pixels, and of a score.
PIXELS, SCORE = 0.1, 1e-3
ROOT = Path(__file__).parents[2]
# An answer: its status, what it says, and the seconds that it took.
Answer = tuple[int, Any, float]


@contextmanager
def server(source: str, options: Sequence[str]) -> Iterator[int]:
    """A context in which a detector is served, with more options, at the port that it gives."""
    line = [sys.executable, "-m", "hpr_jax.main", "serve", "--checkpoint", source, "--port", "0", *options]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for text in process.stdout:
            print(text, end="", flush=True)
            if found := re.search(r"at http://[^ ]*:(\d+)/", text):
                yield int(found[1])
                return
        sys.exit("The server did not start.")
    finally:
        process.terminate()
        process.wait()


def pictures(count: int, height: int, width: int) -> list[bytes]:
    """JPEG files."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, max(height // 16, 2), max(width // 16, 2), 3)).astype(np.uint8)
    large = (cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC) for image in coarse)
    return [cv2.imencode(".jpg", image)[1].tobytes() for image in large]


def ask(port: int, picture: bytes) -> Answer:
    """Sends a picture; the status is 0 if there is no answer."""
    start = time.perf_counter()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
        connection.request("POST", "/detect?threshold=0", picture, {"Content-Type": "image/jpeg"})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), time.perf_counter() - start
    except (OSError, http.client.HTTPException, ValueError) as error:
        return 0, {"error": str(error)}, time.perf_counter() - start
    finally:
        connection.close()


def at_once(port: int, several: Sequence[bytes]) -> list[Answer]:
    """The answers to pictures that are sent at the same time."""
    barrier = threading.Barrier(len(several))

    def one(picture: bytes) -> Answer:
        barrier.wait()
        return ask(port, picture)

    with concurrent.futures.ThreadPoolExecutor(len(several)) as pool:
        return list(pool.map(one, several))


def has_all(found: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether each of some detections is among others, but for rounding. The last ones may be others, since as many are
    answered of each picture."""
    boxes, labels, scores = ([one[name] for one in others] for name in ("box", "label", "score"))
    for one in found:
        near = np.abs(np.array(boxes) - one["box"]).max(axis=1) < PIXELS
        if not (near & (np.array(labels) == one["label"]) & (np.abs(np.array(scores) - one["score"]) < SCORE)).any():
            return one["score"] < scores[-1] + SCORE
    return True


def report(name: str, answers: Sequence[Answer], expected: Sequence[Any], seconds: float) -> None:
    """Prints a line of the table."""
    lost = sum(status != 200 for status, *_ in answers)
    pairs = [(found["detections"], one) for (status, found, _), one in zip(answers, expected) if status == 200]
    differ = sum(not (has_all(found, one) and has_all(one, found)) for found, one in pairs)
    median, late = np.percentile([took for *_, took in answers], (50, 95))
    sizes = collections.Counter(found["batch"] for status, found, _ in answers if status == 200)
    batches = ", ".join(f"{count // size} of {size}" for size, count in sorted(sizes.items()))
    print(
        f"{name:20}{len(answers):9}{lost:6}{differ:9}{seconds:9.1f}{len(answers) / seconds:10.2f}{median:10.2f}{late:8.2f}"
        f"  {batches}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--pictures", type=int, default=30)
    parser.add_argument("--size", default="96x128", metavar="HxW")
    parser.add_argument("--batch-size", type=int, metavar="N", help="of the server")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="of the server")
    arguments = parser.parse_args()
    height, width = map(int, arguments.size.split("x"))
    different = pictures(arguments.pictures, height, width)
    several = [different[number % len(different)] for number in range(arguments.requests)]
    chosen = {"--batch-size": arguments.batch_size, "--timeout": arguments.timeout}
    options = [f"{name}={value}" for name, value in chosen.items() if value is not None]
    with server(arguments.source, options) as port:
        if 4 * height != 3 * width:
            # The server has compiled programs for landscapes of 4:3.
            at_once(port, several[: 2 * (arguments.batch_size or 8) + 1])
        start = time.perf_counter()
        alone = [ask(port, picture) for picture in different]
        alone_seconds = time.perf_counter() - start
        start = time.perf_counter()
        together = at_once(port, several)
        together_seconds = time.perf_counter() - start
    found = [answer[1].get("detections") for answer in alone]
    titles = ("requests", "lost", "differ", "seconds", "images/s", "median, s", "95%, s")
    widths = (9, 6, 9, 9, 10, 10, 8)
    print(f"\n{height}x{width:<15}" + "".join(f"{title:>{room}}" for title, room in zip(titles, widths)) + "  batches")
    report("one by one", alone, found, alone_seconds)
    report("at once", together, [found[number % len(found)] for number in range(len(several))], together_seconds)


if __name__ == "__main__":
    main()

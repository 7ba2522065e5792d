"""Pictures that a run leaves in its workdir, in `plots/`, and in TensorBoard: what it trains on, its curves, what it finds.

They are made from what the run has computed anyway. Nothing here draws random numbers or touches the state, and whatever
goes wrong is one warning: a run is the same with and without pictures.
"""

import functools
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hpr_jax.data.dataset import Dataset, Id, Record
from hpr_jax.data.images import read_annotated_image
from hpr_jax.data.loading.batches import Batch
from hpr_jax.inference.drawing import encode_image, scaled
from hpr_jax.inference.sheets import HEIGHT, Detection, draw_batch, draw_pair, sheet
from hpr_jax.runtime.files import write_whole
from hpr_jax.training.curves import CURVES, draw_labels
from hpr_jax.training.metric_reader import read_metrics
from hpr_jax.training.metric_writer import MetricWriter

log = logging.getLogger("hpr_jax")

# The folder of the pictures below the workdir.
FOLDER = "plots"
# Images of a batch, and of the validation split, that are drawn at most.
BATCH_IMAGES, VALIDATION_IMAGES = 16, 6
# Lowest score of the detections that are drawn, the one of `predict`.
THRESHOLD = 0.3


class RunPictures:
    """Draws the pictures of a run.

    Args:
      workdir: of the run; None draws nothing: of several processes, the main one alone draws.
      writer: gets the pictures for TensorBoard.
      splits: training and validation split, by the names that pictures give them; they have the same classes.
    """

    def __init__(self, workdir: Path | None, writer: MetricWriter, splits: Mapping[str, Dataset]):
        self.workdir, self.writer, self.splits = workdir, writer, splits
        # Whether the log has said that a picture failed: the others would fail for the same reason.
        self._told = False
        # Validation images, which are read once.
        self._images: list[tuple[Record, np.ndarray]] = []

    def draw_data(self, batch: Batch) -> None:
        """Draws how many objects there are, and the first batch of a run."""
        self._write(0, "labels.png", lambda: draw_labels(self.splits))
        self._write(0, "first_batch.jpg", lambda: encode_image(draw_batch(batch, self._names, BATCH_IMAGES), ".jpg"))

    def draw_evaluation(self, step: int, detections: Sequence[Detection]) -> None:
        """Draws the curves up to a step, and the detections of an evaluation, in COCO's results format."""
        if self.workdir is None:
            return
        try:
            metrics = read_metrics(self.workdir / "metrics.jsonl")
        except OSError as error:
            self._warn("curves", error)
            return
        for name, draw_curves in CURVES.items():
            self._write(step, f"{name}.png", functools.partial(draw_curves, metrics))
        self._write(step, "predictions.jpg", lambda: self._draw_predictions(detections))

    @property
    def _names(self) -> Sequence[str]:
        return next(iter(self.splits.values())).classes.names

    def _write(self, step: int, name: str, make: Callable[[], bytes | None]) -> None:
        """Writes a picture to its file and to TensorBoard, unless it cannot be made or there is nothing to draw."""
        if self.workdir is None:
            return
        # A picture is never worth a run: whatever goes wrong ends here.
        try:
            data = make()
            if data is not None:
                write_whole(self.workdir / FOLDER / name, data)
                height, width = _size(data)
                self.writer.write_image(step, f"{FOLDER}/{name.partition('.')[0]}", data, height, width)
        except Exception as error:
            self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        """Says once that a picture cannot be drawn."""
        if not self._told:
            self._told = True
            log.warning(
                "%s/%s cannot be drawn (%s: %s). The run goes on without it; --config.train.plots=False draws no pictures.",
                FOLDER,
                name,
                type(error).__name__,
                error,
            )

    def _draw_predictions(self, detections: Sequence[Detection]) -> bytes | None:
        """Some validation images, always the same ones, each with detections beside its ground truth."""
        val = list(self.splits.values())[-1]
        if not self._images:
            self._images = [_read(record) for record in chosen_records(val)]
        by_image: dict[Id, list[Detection]] = {record.image_id: [] for record, _ in self._images}
        for one in detections:
            if one["image_id"] in by_image and one["score"] >= THRESHOLD:
                by_image[one["image_id"]].append(one)
        cells = []
        for record, image in self._images:
            cells += draw_pair(image, record, by_image[record.image_id], val.classes, THRESHOLD)
        return encode_image(sheet(cells), ".jpg") if cells else None


def _size(data: bytes) -> tuple[int, int]:
    """Height and width of the image in a file."""
    with Image.open(io.BytesIO(data)) as image:
        return image.height, image.width


def chosen_records(dataset: Dataset) -> list[Record]:
    """The images that are drawn at every evaluation: with objects, and evenly spread over the split."""
    places = np.flatnonzero(dataset.records.counts)
    chosen = np.unique(np.linspace(0, len(places) - 1, min(VALIDATION_IMAGES, len(places))).round().astype(int))
    return [dataset.records[places[place]] for place in chosen]


def _read(record: Record) -> tuple[Record, np.ndarray]:
    """An image at the height at which it is drawn, and its record."""
    return record, scaled(read_annotated_image(record.image, record.height, record.width), HEIGHT)[0]

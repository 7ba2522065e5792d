"""COCO average precision, and where numbers of a run are written."""

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from hpr_jax.errors import RunError, UserError

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
NAMES += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


def coco_average_precision(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], evaluator: str = "auto"
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Box AP as COCO defines it.

    Args:
      truth: the annotations of the split, in COCO form.
      detections: COCO results: `image_id`, `category_id`, `bbox` (left, top, width, height), `score`.
      evaluator: `pycocotools`, the reference; `hotcoco`, the same numbers much faster; `auto`: the latter if installed.

    Returns:
      The twelve COCO numbers as fractions, and per category id `AP` and `AP50`. What no object defines is -1.
    """
    coco, coco_eval = find_evaluator(evaluator)
    truth = _complete(truth)
    if not detections and truth["images"]:
        # The evaluators take no empty list; a speck that matches nothing has the same numbers.
        category = truth["categories"][0]["id"]
        speck = [0.0, 0.0, 1e-3, 1e-3]
        detections = [{"image_id": truth["images"][0]["id"], "category_id": category, "bbox": speck, "score": 0.0}]
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotations.json"
        path.write_text(json.dumps(truth))
        loaded = coco(str(path))
        evaluation = coco_eval(loaded, loaded.loadRes(list(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = [float(value) for value in evaluation.stats]
    # thresholds x recalls x categories x areas x detections; all areas, 100 detections
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    categories = list(evaluation.params.catIds)
    per_category = {
        int(category): {"AP": _mean(precision[:, :, index]), "AP50": _mean(precision[0, :, index])}
        for index, category in enumerate(categories)
    }
    return dict(zip(NAMES, numbers)), per_category


def _complete(content: Mapping[str, Any]) -> dict[str, Any]:
    """Annotations with what evaluators need and many files lack (area, iscrowd), without boxes that are none. Numbered anew:
    pycocotools takes a match with an object whose id is 0 for none, and one of two objects with the same id for both."""
    annotations = []
    for number, annotation in enumerate(content["annotations"], start=1):
        box = annotation["bbox"]
        if len(box) == 4 and np.all(np.isfinite(np.asarray(box, float))):
            defaults = {"area": float(box[2]) * float(box[3]), "iscrowd": 0}
            annotations.append({**defaults, **annotation, "id": number})
    return {**content, "annotations": annotations}


def _mean(precision: np.ndarray) -> float:
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else -1.0


def find_evaluator(name: str) -> tuple[type, type]:
    """The classes COCO and COCOeval of an evaluator.

    Raises:
      UserError: it is not installed.
    """
    if name != "pycocotools":
        try:
            from hotcoco import COCO, COCOeval
        except ImportError:
            if name == "hotcoco":
                raise UserError(
                    "config.evaluate.evaluator is 'hotcoco', which is not installed; pip install hotcoco."
                ) from None
        else:
            return COCO, COCOeval
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


class MetricWriter:
    """Writes numbers to `metrics.jsonl` and to TensorBoard event files in one directory.

    Args:
      workdir: None writes nothing.
      start: the step that a run goes on from; what was written of later ones is dropped, as it comes again.
    """

    def __init__(self, workdir: Path | None, start: int = 0):
        self._file = None
        if workdir is None:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        _drop_later(path, start)
        self._file = path.open("a")
        # Not the usual writer, whose thread keeps events for minutes, and the caller waiting when the disk is full.
        self._board = EventsWriter(str(workdir / "events"))
        self._put(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            # Everything was written when it came.
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._board.close()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes the numbers of a step.

        Raises:
          RunError: they cannot be written.
        """
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
            self._file.flush()
            for name, value in numbers.items():
                self._put(Event(step=step, summary=scalar(name, value)))
            self._board.flush()
        except OSError as error:
            raise RunError(
                f"The metrics of step {step} cannot be written to {self._file.name}: {error.strerror}. The same command "
                "goes on from the latest checkpoint."
            ) from error

    def _put(self, event: Event) -> None:
        event.wall_time = time.time()
        self._board.write_event(event)


def _drop_later(path: Path, start: int) -> None:
    """Leaves the lines of steps up to `start`; a process that was killed may have left half a line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            early = json.loads(line)["step"] <= start
        except (ValueError, KeyError, TypeError):
            continue
        if early:
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)

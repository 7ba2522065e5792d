"""Numbers of objects through the frames of a video, by ByteTrack (Zhang et al. 2022, "ByteTrack: Multi-Object Tracking by
Associating Every Detection Box"). The library `trackers` is in the extra `video`.

Later versions of that library than 2.1 want the package opencv-python, which writes its files over those of
opencv-python-headless, with which this project is installed.
"""

import collections
import statistics

import numpy as np

from hpr_jax.inference.detections import Detections
from hpr_jax.inference.video_extra import library

# Detections that score less do not even continue a track, as in the paper.
LOWEST = 0.1
# An object that is not seen for so many seconds is forgotten.
MEMORY = 1.0
# The time between two frames is the median of the last so many.
_INTERVALS = 31


def one_class_each(found: Detections) -> Detections:
    """The detections of an image with each box once, as the class for which it scores best. A query may be found as several
    classes, and is one object all the same."""
    _, first = np.unique(found.boxes, axis=0, return_index=True)
    return found.only(np.isin(np.arange(len(found)), first))


class Tracker:
    """Gives the objects in the frames of one video numbers from 1, which they keep.

    Detections that score at least the threshold begin and continue tracks; those that score less continue them where no
    other does. An object has a number from the second frame in which it is seen. Objects are told apart by their places
    alone, so that one whose class is now this, now that, keeps its number.

    Args:
      threshold: score from which a detection is one of an object.
    """

    def __init__(self, threshold: float):
        self._tracker = library("trackers").ByteTrackTracker(
            track_activation_threshold=threshold, high_conf_det_threshold=threshold
        )
        self._numbers: dict[int, int] = {}
        self._last: float | None = None
        self._intervals = collections.deque[float](maxlen=_INTERVALS)

    def __call__(self, found: Detections, time: float) -> list[int | None]:
        """The number of each detection of the next frame; None for those that belong to no track.

        Args:
          found: with scores from `LOWEST` on.
          time: of the frame in seconds, later than that of the one before.
        """
        self._pass(time)
        boxes = found.to_supervision()
        boxes.data = {"place": np.arange(len(found))}
        tracked = self._tracker.update(boxes)
        numbers: list[int | None] = [None] * len(found)
        for place, name in zip(tracked.data.get("place", ()), tracked.tracker_id):
            if name >= 0:
                numbers[place] = self._numbers.setdefault(int(name), len(self._numbers) + 1)
        return numbers

    def _pass(self, time: float) -> None:
        """Lets the time since the last frame pass. The library counts frames: for each that is missing, objects move on as
        they moved, and are seen nowhere."""
        if self._intervals and self._last is not None:
            period = statistics.median(self._intervals)
            longest = self._tracker.maximum_frames_without_update = max(1, round(MEMORY / period))
            # Imported here, since it takes a second, and few videos are tracked.
            import supervision as sv

            for _ in range(min(round((time - self._last) / period) - 1, longest + 1)):
                self._tracker.update(sv.Detections.empty())
        if self._last is not None:
            self._intervals.append(time - self._last)
        self._last = time

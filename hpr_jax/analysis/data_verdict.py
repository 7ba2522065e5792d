"""The verdict on a data set: whether a config can be trained on it, and what about it is doubtful."""

from collections import Counter
from collections.abc import Sequence

from ml_collections import ConfigDict

from hpr_jax.analysis.dataset import MISSING, OTHER_SIZE, UNREADABLE, AnnotationFacts, OpenedImage, Overlap, find_copies
from hpr_jax.data.build import wants_masks
from hpr_jax.data.dataset import Dataset
from hpr_jax.data.suitability import dark_images, too_few_queries, why_no_objects

# The splits as settings and as messages name them.
SPLITS = {"train": "training", "val": "validation"}
# At most so many examples of anything are named.
NAMED = 3


def first_few(items: Sequence[str]) -> list[str]:
    """The first few of the items, and how many more there are."""
    more = len(items) - NAMED
    return [*items[:NAMED], *([f"and {more:,} more"] if more > 0 else [])]


class Verdict:
    """What is wrong with a data set.

    Attributes:
      obstacles: reasons why no run can be trained on it.
      doubts: what there should not be, although runs can be trained.
    """

    def __init__(self) -> None:
        self.obstacles: list[str] = []
        self.doubts: list[str] = []

    @property
    def fit(self) -> bool:
        """Whether a run can be trained on the data set."""
        return not self.obstacles

    def __str__(self) -> str:
        if self.obstacles:
            return f"Not fit to train: {'; '.join(sentence.rstrip('.') for sentence in self.obstacles)}."
        return f"Fit to train, but: {'; '.join(self.doubts)}." if self.doubts else "Fit to train."

    def doubt(self, what: str, count: int, note: str = "") -> None:
        """Notes what there should be none of, if there is any."""
        if count:
            self.doubts.append(f"{what}: {count:,}" + (f" ({note})" if note else ""))

    def judge_annotations(self, config: ConfigDict, split: str, dataset: Dataset, facts: AnnotationFacts) -> None:
        """Judges what is annotated in the split "train" or "val"."""
        what = SPLITS[split]
        if not facts.images:
            self.obstacles.append(f"the {what} split has no images")
            return
        if not facts.objects:
            self.obstacles.append(f"the {what} split has no objects: {why_no_objects(dataset)}")
        sentence = too_few_queries(dataset, config.model.queries.count)
        if sentence:
            self.doubts.append(sentence.rstrip("."))
        self.doubt(f"impossible {what} boxes, which are dropped", len(dataset.dropped_boxes))
        if split == "train" and wants_masks(config):
            self._judge_masks(dataset)
        self.doubt(f"classes without {what} objects", len(facts.absent), ", ".join(first_few(facts.absent)))
        self.doubt(f"{what} file names listed more than once", len(facts.repeated_names))

    def _judge_masks(self, dataset: Dataset) -> None:
        masked, objects = dataset.count_masks()
        self.doubt("malformed masks, which are dropped", len(dataset.dropped_masks))
        if objects and not masked:
            self.doubts.append("without masks nothing is copied and pasted")
        elif masked < objects:
            self.doubt("objects without a mask, which are not pasted", objects - masked)

    def judge_images(self, split: str, images: Sequence[OpenedImage]) -> None:
        """Judges what opening the images of the split "train" or "val" has shown."""
        failures = Counter(image.failure for image in images)
        note = "others take their place" if split == "train" else "what is on them counts as not found"
        if images and not any(image.digest for image in images):
            self.obstacles.append(f"none of the {SPLITS[split]} images can be read, like: {images[0].sentence}")
        for failure in (MISSING, UNREADABLE, OTHER_SIZE):
            self.doubt(f"{SPLITS[split]} images {failure}", failures[failure], note)
        self.doubt(f"{SPLITS[split]} images that are there more than once", len(find_copies(images)))
        dark = [image.dark_bits for image in images if image.dark_bits]
        if dark:
            self.doubts.append(dark_images(len(dark), len(images), max(dark), f"the {SPLITS[split]} split"))

    def judge_overlap(self, overlap: Overlap) -> None:
        """Judges what the splits have in common."""
        self.doubt("validation images that are training images, too", len(overlap.images))

    def judge_room(self, room: int, most: int) -> None:
        """Judges whether the boxes of the fullest image, `most`, fit into the `room` of a view."""
        if room < most:
            self.doubts.append(f"a view has room for {room} boxes (config.data.max_boxes), and an image has {most}")

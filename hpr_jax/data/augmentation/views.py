"""The views of an image that a training batch holds: weak, or weak and strong, with copy-paste if asked for."""

import dataclasses
from collections.abc import Callable

import numpy as np

from hpr_jax.data.augmentation.copy_paste import choose_donated, masked_objects, paste
from hpr_jax.data.augmentation.geometry import Geometry, Slot, apply_to_boxes, apply_to_image
from hpr_jax.data.augmentation.objects import Objects
from hpr_jax.data.augmentation.strong_view import draw_strong_view, strong_image, strong_objects
from hpr_jax.data.dataset import Dataset
from hpr_jax.data.images import UnreadableImageError, read_annotated_image


@dataclasses.dataclass(frozen=True)
class View:
    """An image, uint8 `[h, w, 3]`, and its objects."""

    image: np.ndarray
    objects: Objects


class ViewMaker:
    """Makes the views of a planned image; everything random in them follows from its slot.

    Args:
      strong: whether there is a strong view behind the weak one.
      drop_vanished: drops objects that a strong view moves out of sight; else they keep a box without area, as published.
      draw_donor: sizes (height, width) `[M, 2]`, rng=generator -> geometries. With it, objects of another image, as it is
        before strong augmentation, are pasted onto each view, and the data set must have masks. None: nothing is pasted.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        strong: bool = False,
        drop_vanished: bool = False,
        draw_donor: Callable[..., list[Geometry]] | None = None,
    ):
        self.dataset, self.strong, self.drop_vanished, self.draw_donor = dataset, strong, drop_vanished, draw_donor

    @property
    def count(self) -> int:
        """Views of an image."""
        return 1 + self.strong

    def __call__(self, slot: Slot) -> tuple[list[View], list[str]]:
        """The views, and sentences for the log.

        Raises:
          UnreadableImageError: for the image; a donor that cannot be read is reported, and nothing is pasted.
        """
        rng = np.random.default_rng(slot.seed)
        record = self.dataset.records[slot.index]
        image = apply_to_image(read_annotated_image(record.image, record.height, record.width), slot.geometry)
        if self.draw_donor is None:
            boxes, remains = apply_to_boxes(record.boxes, slot.geometry)
            objects = Objects(boxes, record.labels).take(remains)
        else:
            objects = masked_objects(record, slot.geometry)
        views, reports = [View(image, objects)], []
        if self.strong:
            drawn = draw_strong_view(image.shape[:2], rng)
            moved = strong_objects(objects, drawn, drop_vanished=self.drop_vanished)
            views.append(View(strong_image(image, drawn), moved))
        if self.draw_donor is not None:
            views = [self._paste(view, rng, reports) for view in views]
        return views, reports

    def _paste(self, view: View, rng: np.random.Generator, reports: list[str]) -> View:
        """Pastes objects of an image of the data set, all as likely; possibly none, possibly of the same image."""
        donor = self.dataset.records[rng.integers(len(self.dataset))]
        (geometry,) = self.draw_donor(np.array([[donor.height, donor.width]]), rng=rng)
        donated, crowds = choose_donated(donor, geometry, rng)
        if not len(donated) and not crowds:
            return view
        try:
            image = read_annotated_image(donor.image, donor.height, donor.width)
        except UnreadableImageError as error:
            reports.append(f"{error}; nothing of it is pasted")
            return view
        return View(*paste(view.image, view.objects, apply_to_image(image, geometry), donated, crowds))

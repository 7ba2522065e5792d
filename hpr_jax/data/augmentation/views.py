"""The views of an image in a training batch: a weak one, or a weak and a strong one, with pasted objects if asked for."""

import dataclasses
from typing import Protocol

import numpy as np

from hpr_jax.data.augmentation.copy_paste import choose_donated, masked_objects, paste
from hpr_jax.data.augmentation.crop_resize_flip import Geometry, Slot, apply_to_boxes, apply_to_image
from hpr_jax.data.augmentation.objects import Objects
from hpr_jax.data.augmentation.strong_view import draw_strong_view, strong_image, strong_objects
from hpr_jax.data.dataset import Dataset
from hpr_jax.data.images import UnreachableError, UnreadableImageError, read_annotated_image


class DrawDonorGeometry(Protocol):
    """Draws geometries of images whose objects are pasted."""

    def __call__(self, sizes: np.ndarray, *, rng: np.random.Generator) -> list[Geometry]:
        """(height, width) of the images, `[M, 2]` -> a geometry for each."""


@dataclasses.dataclass(frozen=True)
class View:
    """An image, uint8 `[h, w, 3]`, and its objects."""

    image: np.ndarray
    objects: Objects


class ViewMaker:
    """Makes the views of a planned image. Everything random in them follows from the image's slot.

    Args:
      strong: whether a strong view follows the weak one.
      drop_vanished: whether to drop objects that a strong view moves out of sight. Otherwise they keep a box without area,
        as published.
      draw_donor: draws the geometry of a donor, an image of the data set whose objects are pasted onto a view; the masks of
        the data set must have been read. Each view has a donor of its own. None: nothing is pasted.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        strong: bool = False,
        drop_vanished: bool = False,
        draw_donor: DrawDonorGeometry | None = None,
    ):
        self.dataset, self.strong, self.drop_vanished, self.draw_donor = dataset, strong, drop_vanished, draw_donor

    @property
    def count(self) -> int:
        """Number of views of an image."""
        return 1 + self.strong

    def __call__(self, slot: Slot) -> tuple[list[View], list[str]]:
        """The views of an image, and sentences for the log.

        Raises:
          UnreadableImageError: the image cannot be read. If a donor cannot, a sentence says so and nothing is pasted, unless
            no other could be.
        """
        rng = np.random.default_rng(slot.seed)
        record = self.dataset.records[slot.index]
        image = apply_to_image(read_annotated_image(record.image, record.height, record.width), slot.geometry)
        if self.draw_donor is None:
            boxes, remains = apply_to_boxes(record.boxes, slot.geometry)
            objects = Objects(boxes, record.labels).take(remains)
        else:
            objects = masked_objects(record, slot.geometry)
        views = [View(image, objects)]
        if self.strong:
            drawn = draw_strong_view(image.shape[:2], rng)
            moved = strong_objects(objects, drawn, drop_vanished=self.drop_vanished)
            views.append(View(strong_image(image, drawn), moved))
        reports: list[str] = []
        if self.draw_donor is not None:
            views = [self._paste(view, self.draw_donor, rng, reports) for view in views]
        return views, reports

    def _paste(self, view: View, draw_donor: DrawDonorGeometry, rng: np.random.Generator, reports: list[str]) -> View:
        """Pastes objects of a random image of the data set, which may have none, and may be the view's own image."""
        donor = self.dataset.records[int(rng.integers(len(self.dataset)))]
        (geometry,) = draw_donor(np.array([[donor.height, donor.width]]), rng=rng)
        donated, crowds = choose_donated(donor, geometry, rng)
        if not len(donated) and not crowds:
            return view
        try:
            image = read_annotated_image(donor.image, donor.height, donor.width)
        except UnreachableError:
            raise
        except UnreadableImageError as error:
            reports.append(f"{error}; nothing of it is pasted")
            return view
        return View(*paste(view.image, view.objects, apply_to_image(image, geometry), donated, crowds))

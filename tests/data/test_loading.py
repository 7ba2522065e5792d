"""Batches as they are loaded, and images that cannot be read."""

import numpy as np
import pytest
import tiny

from hpr_jax.data.augmentation.crop_resize_flip import (
    draw_weak,
    evaluation_geometries,
)
from hpr_jax.data.augmentation.views import ViewMaker
from hpr_jax.data.loading.batch_plan import TrainPlan, evaluation_plan
from hpr_jax.data.loading.batches import EvaluationLoader, TrainLoader, train_batches
from hpr_jax.data.sources.coco import load_coco
from hpr_jax.errors import DataLostError


@pytest.fixture
def coco(tmp_path):
    return tiny.write_coco(tmp_path / "data")


def load(directory, split="train2017", classes=None, masks=False):
    return load_coco(directory, split, f"annotations/instances_{split}.json", classes, masks=masks)


class TestLoading:
    def loader(self, coco, batch_size=2):
        dataset = load(coco).subset(keep_empty=True, min_side=1)
        plan = TrainPlan(
            lambda rng: draw_weak(dataset.sizes, tiny.WEAK, rng),
            len(dataset),
            batch_size=batch_size,
            buckets=[(96, 96)],
            seed=0,
        )
        return TrainLoader(plan, ViewMaker(dataset), max_boxes=3)

    def test_batches(self, coco):
        loader = self.loader(coco)
        batch, planned = loader[0], loader.plan[0]
        assert batch.images.shape == (2, 96, 96, 3)
        for place, slot in enumerate(planned.slots):
            height, width = slot.geometry.size
            assert batch.sizes[place].tolist() == [height, width]
            assert not batch.images[place, height:].any()
            assert not batch.images[place, :, width:].any()
            assert batch.images[place, :height, :width].std() > 1
        assert batch.valid.sum(axis=1).max() == 2
        assert np.all(batch.boxes[batch.valid] > 0)
        assert not batch.reports

    def test_threads_keep_the_order(self, coco):
        loader = self.loader(coco)
        for number, batch in enumerate(train_batches(loader, 2, 9, threads=3), start=2):
            np.testing.assert_array_equal(batch.images, loader[number].images)
        assert number == 8

    def test_unreadable_images_are_replaced_and_reported(self, coco):
        loader = self.loader(coco)
        broken = loader.make_views.dataset.records[loader.plan[0].slots[1].index]
        broken.image.path.write_bytes(b"broken")
        batch = loader[0]
        assert all(record is not None for record in batch.records)
        assert batch.records[1].image_id != broken.image_id
        (report,) = batch.reports
        assert broken.image.path.name in report
        assert batch.records[1].image.path.name in report

    def test_nothing_readable_ends_with_a_sentence(self, coco):
        loader = self.loader(coco)
        for record in loader.make_views.dataset.records:
            record.image.path.write_bytes(b"broken")
        with pytest.raises(DataLostError, match="none of the images"):
            loader[0]

    def test_more_boxes_than_room_are_reported(self, coco):
        loader = self.loader(coco)
        loader.max_boxes = 1
        reports = [report for step in range(3) for report in loader[step].reports]
        assert reports
        assert all("room for 1" in report for report in reports)

    def test_evaluation_leaves_unreadable_images_out(self, coco):
        dataset = load(coco)
        dataset.records[2].image.path.unlink()
        geometries = evaluation_geometries(dataset.sizes, 64, 96)
        loader = EvaluationLoader(dataset, evaluation_plan(geometries, batch_size=4, buckets=[(64, 96)]), 4)
        batches = [loader[index] for index in range(len(loader))]
        ids = [record.image_id for batch in batches for record in batch.records if record is not None]
        assert sorted(ids) == [7, 17, 37, 47, 57]
        assert sum(len(batch.reports) for batch in batches) == 1

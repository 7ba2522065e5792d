"""Views of planned images and their places in a batch. What is drawn for them follows from the slot alone."""

import functools
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import tiny

from hpr_jax.data.augmentation.crop_resize_flip import GREY, Slot, draw_large_scale
from hpr_jax.data.augmentation.views import ViewMaker
from hpr_jax.data.build import make_plan, make_views, room_for_boxes, wants_masks
from hpr_jax.data.loading.batches import TrainLoader, train_batches
from hpr_jax.data.sources.coco import load_coco
from hpr_jax.errors import UserError
from hpr_jax.settings import check

KINDS = ("detr", "lsj")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return tiny.write_coco(tmp_path_factory.mktemp("coco") / "data", train=8)


def setup(coco, kind, **augmentation):
    """A loader for a tiny config with strong views."""
    config = tiny.config(coco)
    config.data.max_boxes = 0
    config.augmentation.update(kind=kind, strong_views=True, **augmentation)
    config.augmentation.lsj.side = tiny.SIDE
    check(config)
    dataset = load_coco(coco, "train2017", "annotations/instances_train2017.json", masks=wants_masks(config))
    views = make_views(config, dataset)
    return TrainLoader(make_plan(config, dataset), views, room_for_boxes(config, dataset, views))


def same(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("images", "sizes", "boxes", "labels", "valid")
    )


@pytest.mark.parametrize("kind", KINDS)
class TestBatches:
    def test_weak_views_come_first(self, coco, kind):
        loader = setup(coco, kind, lsj={"side": tiny.SIDE, "scale_range": (0.5, 2.0), "copy_paste": False})
        batch, planned = loader[0], loader.plan[0]
        assert batch.views == 2
        assert batch.images.shape == (4, 64, 64, 3)
        records = loader.make_views.dataset.records
        expected = [records[slot.index].image_id for slot in planned.slots] * 2
        assert [record.image_id for record in batch.records] == expected
        np.testing.assert_array_equal(batch.sizes[:2], batch.sizes[2:])
        weak = ViewMaker(loader.make_views.dataset)
        for place, slot in enumerate(planned.slots):
            ((view,), _) = weak(slot)
            height, width = slot.geometry.size
            assert np.array_equal(batch.images[place, :height, :width], view.image)
            assert not np.array_equal(batch.images[place + 2, :height, :width], view.image)
            assert not batch.images[place + 2, height:].any()
            assert batch.valid[place].sum() == len(view.objects)

    def test_follows_from_the_step_alone(self, coco, kind):
        forward, other = setup(coco, kind), setup(coco, kind)
        steps = range(9)
        batches = [forward[step] for step in steps]
        assert all(same(other[step], batches[step]) for step in reversed(steps))
        # Another epoch has other views of the same image; so has another seed.
        assert forward.plan.steps_per_epoch == 4
        assert not any(same(batches[step], batches[step + 4]) for step in range(4))
        other.plan.seed += 1
        other.plan.__setstate__(other.plan.__getstate__())
        assert not any(same(other[step], batches[step]) for step in steps)

    def test_threads_and_pickled_loaders_give_the_same(self, coco, kind):
        loader = setup(coco, kind)
        copied = pickle.loads(pickle.dumps(loader))
        np.random.seed(3)
        for step, batch in enumerate(train_batches(copied, 2, 7, threads=3), start=2):
            assert same(batch, loader[step])
        assert step == 6


class TestViews:
    def test_strong_views_are_drawn_anew_for_each_seed(self, coco):
        views = setup(coco, "detr").make_views
        slot = Slot(0, setup(coco, "detr").plan[0].slots[0].geometry, (1, 2, 3))
        images = [views(Slot(0, slot.geometry, (0, 0, seed)))[0] for seed in range(8)]
        assert all(np.array_equal(images[0][0].image, weak.image) for weak, _ in images)
        assert len({strong.image.tobytes() for _, strong in images}) == 8

    def test_canvases_count_as_image(self, coco):
        loader = setup(coco, "lsj", lsj={"side": tiny.SIDE, "scale_range": (0.3, 0.5), "copy_paste": False})
        batch = loader[0]
        assert np.all(batch.sizes == tiny.SIDE)
        assert np.all(batch.images[:2, 40:] == GREY)
        # Boxes refer to the canvas: objects are a third of a small image.
        assert batch.boxes[batch.valid][:, 2:].max() < 0.3

    def test_objects_are_pasted_on_each_view_by_itself(self, coco):
        loader = setup(coco, "lsj")
        weak_counts, strong_counts = [], []
        for seed in range(40):
            slot = Slot(1, loader.plan[0].slots[0].geometry, (seed,))
            # The second image has no objects of its own.
            (weak, strong), _ = loader.make_views(slot)
            weak_counts.append(len(weak.objects))
            strong_counts.append(len(strong.objects))
        assert set(weak_counts) == set(strong_counts) == {0, 1, 2}
        assert weak_counts != strong_counts

    def test_own_objects_come_before_what_is_pasted(self, coco):
        loader = setup(coco, "lsj")
        slot = next(slot for slot in loader.plan[0].slots if len(loader.make_views.dataset.records[slot.index].boxes) == 2)
        own = ViewMaker(loader.make_views.dataset)(slot)[0][0].objects
        views = [loader.make_views(Slot(slot.index, slot.geometry, (seed,)))[0][0] for seed in range(40)]
        whole = [view.objects for view in views if len(view.objects) == 4]
        assert len(whole) > 3
        for objects in whole:
            assert objects.labels[:2].tolist() == own.labels.tolist()
            # Their boxes may have shrunk where they are partly hidden.
            assert np.all(np.abs(objects.boxes[:2] - own.boxes) <= 10)

    def test_donors_that_cannot_be_read(self, tmp_path, coco):
        dataset = load_coco(
            tiny.write_coco(tmp_path / "data"), "train2017", "annotations/instances_train2017.json", masks=True
        )
        draw = functools.partial(draw_large_scale, settings={"flip": 0.5, "lsj": {"side": 64, "scale_range": (1.0, 1.0)}})
        views = ViewMaker(dataset, draw_donor=draw)
        (geometry,) = draw(dataset.sizes[1:2], rng=np.random.default_rng(0))
        for record in dataset.records.take(np.array([0, 2, 3, 4, 5])):
            Path(record.image.name).write_bytes(b"broken")
        made = [views(Slot(1, geometry, (seed,))) for seed in range(20)]
        assert all(len(view.objects) == 0 for (view,), _ in made)
        reports = [report for _, reports in made for report in reports]
        assert len(reports) > 5
        assert all("nothing of it is pasted" in report for report in reports)

    def test_room_for_what_is_pasted(self, coco):
        assert setup(coco, "detr").max_boxes == 2
        assert setup(coco, "lsj").max_boxes == 4
        assert setup(coco, "lsj", lsj={"side": 64, "scale_range": (1.0, 1.0), "copy_paste": False}).max_boxes == 2


class TestDataWithoutMasks:
    def test_nothing_is_pasted_and_that_is_said_once(self, coco, caplog):
        loader = setup(coco, "lsj")
        assert not caplog.text
        config = tiny.config(coco)
        config.augmentation.kind = "lsj"
        dataset = load_coco(coco, "train2017", "annotations/instances_train2017.json")
        with caplog.at_level(logging.WARNING):
            views = make_views(config, dataset)
            for slot in loader.plan[0].slots:
                ((view,), reports) = views(slot)
                assert view.image.shape == (64, 64, 3)
                assert len(view.objects) <= len(dataset.records[slot.index].boxes)
                assert not reports
        assert len(caplog.records) == 1
        assert "has no masks: nothing is copied and pasted" in caplog.text
        assert "copy_paste=False" in caplog.text

    def test_some_objects_without_masks(self, tmp_path, caplog):
        config = tiny.config()
        config.augmentation.kind = "lsj"
        directory = tiny.write_coco(tmp_path / "data")
        path = directory / "annotations/instances_train2017.json"
        content = json.loads(path.read_text())
        content["annotations"][0].pop("segmentation")
        path.write_text(json.dumps(content))
        make_views(config, load_coco(directory, "train2017", "annotations/instances_train2017.json", masks=True))
        assert "1 of 10 objects have no mask" in caplog.text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "ljs"}, "kind names 'ljs'; did you mean 'lsj'"),
        ({"lsj": {"side": 0}}, "lsj.side is 0"),
        ({"lsj": {"scale_range": (2.0, 0.1)}}, r"scale_range is \(2.0, 0.1\)"),
        ({"lsj": {"scale_range": (0.0, 1.0)}}, "above 0"),
        ({"lsj": {"scale_range": (1.0,)}}, r"scale_range is \(1.0,\); it must list 2 values"),
        ({"flip": 1.5}, "flip is 1.5; it must be at least 0 and at most 1"),
    ],
)
def test_impossible_settings(settings, sentence):
    config = tiny.config()
    config.augmentation.update(settings)
    with pytest.raises(UserError, match=sentence):
        check(config)

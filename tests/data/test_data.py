"""Annotations in COCO form, geometry, decoding, the plan of batches, and loading."""

import json

import cv2
import numpy as np
import pytest
import tiny

from hpr_jax.data.augmentation.crop_resize_flip import (
    Geometry,
    apply_to_boxes,
    apply_to_image,
    draw_weak,
    evaluation_geometries,
    fit,
)
from hpr_jax.data.augmentation.views import ViewMaker
from hpr_jax.data.dataset import Classes
from hpr_jax.data.images import ImageFile, UnreadableImageError, read_annotated_image, read_image
from hpr_jax.data.loading.batch_plan import TrainPlan, choose_buckets, evaluation_plan, fits, smallest_bucket
from hpr_jax.data.loading.batches import EvaluationLoader, TrainLoader, train_batches
from hpr_jax.data.sources.coco import load_coco
from hpr_jax.errors import UserError

SETTINGS = {
    "flip": 0.5,
    "sides": (48, 64),
    "max_side": 96,
    "crop": 0.5,
    "crop_sides": (60, 80),
    "crop_range": (40, 70),
}


@pytest.fixture
def coco(tmp_path):
    return tiny.write_coco(tmp_path / "data")


def load(directory, split="train2017", classes=None, masks=False):
    return load_coco(directory, split, f"annotations/instances_{split}.json", classes, masks=masks)


def edit(directory, change):
    path = directory / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class TestAnnotations:
    def test_reads(self, coco):
        dataset = load(coco)
        assert dataset.classes.names == ("cup", "pen", "hat")
        assert dataset.classes.category_ids == (2, 5, 9)
        assert len(dataset) == 6
        # The crowd is no object, the box without width is dropped and named.
        assert dataset.records[0].labels.tolist() == [0, 1]
        (sentence,) = map(str, dataset.dropped_boxes)
        assert "image 7" in sentence
        assert "pixel wide" in sentence
        assert len(dataset.subset(keep_empty=False, min_side=32)) == 5
        assert len(dataset.subset(keep_empty=True, min_side=49)) == 0

    @pytest.mark.parametrize(
        ("bbox", "reason"),
        [
            ([70, 0, 5, 5], "outside"),
            ([0, 0, 1e999, 5], "finite"),
            ([0, 0, 5], "four numbers"),
            ([5, 5, -5, 5], "pixel wide"),
        ],
    )
    def test_impossible_boxes_are_dropped(self, coco, bbox, reason):
        edit(coco, lambda c: c["annotations"][0].update(bbox=bbox))
        dataset = load(coco)
        assert any(reason in problem.reason for problem in dataset.dropped_boxes)
        assert len(dataset.records[0].labels) == 1

    def test_boxes_are_clipped(self, coco):
        edit(coco, lambda c: c["annotations"][0].update(bbox=[-5, -5, 20, 100]))
        assert load(coco).records[0].boxes[0].tolist() == [0, 0, 15, 48]

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda c: c.pop("categories"), "has no 'categories'"),
            (lambda c: c["annotations"][0].pop("bbox"), "has no 'bbox'"),
            (lambda c: c["annotations"][0].update(bbox=["a", 1, 2, 3]), "could not convert"),
            (lambda c: c["annotations"][0].update(category_id=77), "category 77"),
            (lambda c: c["annotations"][0].update(image_id=99), "image 99"),
            (lambda c: c["images"].append(c["images"][0]), "twice"),
            (lambda c: c.update(categories=[]), "no categories"),
        ],
    )
    def test_broken_files_get_a_sentence(self, coco, change, sentence):
        edit(coco, change)
        with pytest.raises(UserError, match=sentence):
            load(coco)

    def test_missing_and_unreadable_files(self, coco):
        with pytest.raises(UserError, match=r"nowhere.*does not exist"):
            load(coco / "nowhere")
        with pytest.raises(UserError, match="image folder"):
            load(coco, "test2017")
        (coco / "annotations/instances_train2017.json").write_text("{")
        with pytest.raises(UserError, match="not JSON"):
            load(coco)

    def test_masks_are_read_when_wanted(self, coco):
        assert load(coco).records[0].masks == ()
        dataset = load(coco, masks=True)
        record = dataset.records[0]
        for mask, box in zip(record.masks, record.boxes):
            (corners,) = mask
            assert [*corners.min(axis=0), *corners.max(axis=0)] == box.tolist()
        (crowd,) = record.crowds
        assert crowd["size"] == [48, 60]
        assert dataset.dropped_masks == ()
        assert dataset.count_masks() == (10, 10)

    def test_malformed_masks_are_named_and_their_boxes_stay(self, coco):
        boxes = load(coco).records[0].boxes
        edit(coco, lambda c: [c["annotations"][0].update(segmentation=[[1, 2]]), c["annotations"][1].pop("segmentation")])
        dataset = load(coco, masks=True)
        assert dataset.records[0].masks == (None, None)
        np.testing.assert_array_equal(dataset.records[0].boxes, boxes)
        (sentence,) = map(str, dataset.dropped_masks)
        assert "annotation 1 of image 7: its segmentation has no polygon" in sentence
        assert dataset.count_masks() == (8, 10)

    def test_other_classes_are_refused(self, coco):
        classes = load(coco).classes
        edit(coco, lambda c: c["categories"][0].update(name="mug"))
        with pytest.raises(UserError, match="mug"):
            load(coco, classes=classes)


class TestLabels:
    """Classes are in the order of their ids, or as a model has them, whatever the order in the file."""

    ORDERS = ((0, 1, 2), (2, 1, 0), (1, 2, 0))

    def reordered(self, coco, order):
        edit(coco, lambda content: content.update(categories=[content["categories"][place] for place in order]))

    def categories(self, coco):
        """Of the objects that are kept, image by image."""
        content = json.loads((coco / "annotations/instances_train2017.json").read_text())
        objects = [a for a in content["annotations"] if not a["iscrowd"] and a["bbox"][2]]
        return [[a["category_id"] for a in objects if a["image_id"] == image["id"]] for image in content["images"]]

    @pytest.mark.parametrize("order", ORDERS)
    def test_are_numbered_by_category_id(self, coco, order):
        self.reordered(coco, order)
        dataset = load(coco)
        assert dataset.classes.category_ids == (2, 5, 9)
        assert dataset.classes.names == ("cup", "pen", "hat")
        found = [[dataset.classes.category_ids[label] for label in record.labels] for record in dataset.records]
        assert found == self.categories(coco)

    @pytest.mark.parametrize("order", ORDERS)
    def test_follow_the_order_of_a_model(self, coco, order):
        self.reordered(coco, order)
        model = Classes(("pen", "hat", "cup"), (5, 9, 2))
        dataset = load(coco, classes=model)
        assert dataset.classes == model
        assert dataset.records[0].labels.tolist() == [2, 0]
        found = [[model.category_ids[label] for label in record.labels] for record in dataset.records]
        assert found == self.categories(coco)

    def test_stay_with_their_boxes(self, coco):
        """Boxes and labels of each image are its own annotations', in order, where these are shuffled in the file."""
        edit(coco, lambda content: content["annotations"].sort(key=lambda a: (a["id"] * 7) % 11))
        content = json.loads((coco / "annotations/instances_train2017.json").read_text())
        dataset = load(coco)
        for image, record in zip(content["images"], dataset.records, strict=True):
            mine = [a for a in content["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"] and a["bbox"][2]]
            assert record.image_id == image["id"]
            assert record.image.path.name == image["file_name"]
            assert [(2, 5, 9)[label] for label in record.labels] == [a["category_id"] for a in mine]
            expected = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in mine)]
            np.testing.assert_array_equal(record.boxes, np.array(expected, np.float32).reshape(-1, 4))

    def test_of_both_splits_mean_the_same(self, coco):
        """Though the files list the categories in other orders, and images are left out of training."""
        self.reordered(coco, (2, 0, 1))
        train = load(coco).subset(keep_empty=False, min_side=1)
        val = load(coco, "val2017", train.classes)
        assert train.classes == val.classes
        assert [record.image_id for record in train.records] == [7, 27, 37, 47, 57]
        for dataset in (train, val):
            assert {tuple(record.labels) for record in dataset.records} <= {(0, 1), ()}


class TestGeometry:
    def test_fit(self):
        sizes = fit(np.array([480, 1000]), np.array([640, 100]), np.array([800.0, 800.0]), 1333)
        assert sizes.tolist() == [[800, 1067], [1333, 133]]

    def test_boxes_follow_crop_resize_and_flip(self):
        image = np.zeros((100, 200, 3), np.uint8)
        image[40:60, 100:140] = 255
        geometry = Geometry(window=(80, 20, 180, 70), size=(100, 400), flip=True)
        out = apply_to_image(image, geometry)
        boxes, remains = apply_to_boxes(np.array([[100, 40, 140, 60], [0, 0, 20, 20]], np.float32), geometry)
        # Window 100x50 -> 400x100: x4 and x2, then mirrored; the second box is outside.
        assert boxes[0].tolist() == [160, 40, 320, 80]
        assert remains.tolist() == [True, False]
        assert out[60, 240].tolist() == [255] * 3
        assert out[30, 240].tolist() == [0] * 3
        assert out[60, 150].tolist() == [0] * 3

    def test_evaluation_keeps_everything(self):
        (geometry,) = evaluation_geometries(np.array([[480, 640]]), 800, 1333)
        assert geometry == Geometry((0, 0, 640, 480), (800, 1067), False)

    def test_drawn_geometries_stay_within_their_settings(self):
        sizes = np.tile([[100, 150], [90, 60]], (200, 1))
        drawn = draw_weak(sizes, SETTINGS, np.random.default_rng(0))
        for (height, width), geometry in zip(sizes, drawn):
            left, top, right, bottom = geometry.window
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert min(geometry.size) in (48, 64) or max(geometry.size) == 96
            assert max(geometry.size) <= 96
        assert 150 < sum(geometry.flip for geometry in drawn) < 250
        cropped = [g.window != (0, 0, w, h) for (h, w), g in zip(sizes, drawn)]
        assert 150 < sum(cropped) < 250
        # A crop's sides, at the intermediate scale, lie in crop_range.
        scale = [min(60 / 100, 1), 80 / 100]
        widths = [g.window[2] - g.window[0] for g, c in zip(drawn[::2], cropped[::2]) if c]
        assert min(widths) >= 40 / scale[1] - 2
        assert max(widths) <= 70 / scale[0] + 2

    def test_crops_lie_anywhere(self):
        """Where a crop begins, as a fraction of where it can: uniform along both sides, which are not resized before it."""
        settings = {**SETTINGS, "crop": 1.0, "crop_sides": (480,), "crop_range": (100, 200)}
        drawn = draw_weak(np.array([[480, 640]] * 400), settings, np.random.default_rng(0))
        windows = np.array([geometry.window for geometry in drawn])
        start = windows[:, :2] / ([640, 480] - (windows[:, 2:] - windows[:, :2]))
        assert np.all((start.min(axis=0) < 0.02) & (start.max(axis=0) > 0.98))
        np.testing.assert_allclose(start.mean(axis=0), 0.5, atol=0.05)
        assert abs(np.corrcoef(start.T)[0, 1]) < 0.2


class TestImages:
    def exif(self, tmp_path, orientation):
        """A JPEG with an EXIF orientation; the left half of the stored pixels is bright."""
        path = tmp_path / f"exif{orientation}.jpg"
        pixels = np.zeros((20, 40, 3), np.uint8)
        pixels[:, :20] = 255
        tiny.write_turned(path, pixels, orientation)
        return path

    def test_exif_rotation_is_applied(self, tmp_path):
        path = self.exif(tmp_path, 6)
        image = read_image(path)
        assert image.shape == (40, 20, 3)
        assert image[5].mean() > 200
        assert read_annotated_image(ImageFile(path), 40, 20).shape == (40, 20, 3)

    def test_annotations_on_stored_pixels_are_honoured(self, tmp_path):
        image = read_annotated_image(ImageFile(self.exif(tmp_path, 6)), 20, 40)
        assert image.shape == (20, 40, 3)
        assert image[:, 5].mean() > 200

    def test_colours_are_rgb(self, tmp_path):
        cv2.imwrite(str(tmp_path / "blue.png"), np.full((4, 4, 3), (255, 0, 0), np.uint8))
        assert read_image(tmp_path / "blue.png")[0, 0].tolist() == [0, 0, 255]

    def test_unreadable(self, tmp_path):
        (tmp_path / "text.jpg").write_text("no image")
        (tmp_path / "empty.jpg").write_bytes(b"")
        for name in ("text.jpg", "empty.jpg", "missing.jpg"):
            with pytest.raises(UnreadableImageError, match=name):
                read_image(tmp_path / name)
        with pytest.raises(UnreadableImageError, match="annotation says 30x30"):
            read_annotated_image(ImageFile(self.exif(tmp_path, 1)), 30, 30)


def make_plan(count=23, batch_size=4, seed=0):
    sizes = np.tile([[100, 150], [90, 60], [64, 64]], (10, 1))[:count]
    trial = draw_weak(sizes, SETTINGS, np.random.default_rng(9))
    buckets = choose_buckets(np.array([g.size for g in trial]), 3, cover=[(64, 96), (96, 64)])
    return TrainPlan(lambda rng: draw_weak(sizes, SETTINGS, rng), count, batch_size=batch_size, buckets=buckets, seed=seed)


class TestPlan:
    def test_buckets(self):
        sizes = np.array([[60, 90]] * 10 + [[33, 33]] * 5 + [[64, 64]])
        assert choose_buckets(sizes, 3) == [(64, 64), (64, 96)]
        assert choose_buckets(sizes, 1) == [(64, 96)]
        assert (128, 64) in choose_buckets(sizes, 3, cover=[(100, 40)])
        assert choose_buckets(sizes, 1, cover=[(100, 40)]) == [(128, 96)]
        assert smallest_bucket([(64, 64), (64, 96)], (10, 70)) == (64, 96)
        with pytest.raises(ValueError, match="No bucket"):
            smallest_bucket([(64, 64)], (65, 10))

    def test_leftovers_stay_within_the_buckets(self):
        """No bucket holds both the portrait and the landscape images that are left over."""
        sizes = np.array([[60, 90]] * 9 + [[90, 60]] * 10)
        for seed in range(5):
            plan = TrainPlan(
                lambda rng: evaluation_geometries(sizes, 64, 96), 19, batch_size=4, buckets=[(64, 96), (96, 64)], seed=seed
            )
            batches = [plan[step] for step in range(plan.steps_per_epoch)]
            assert len(batches) == 4
            assert {batch.shape for batch in batches} == {(64, 96), (96, 64)}
            seen = [slot.index for batch in batches for slot in batch.slots]
            assert len(seen) == 16
            for step, batch in enumerate(batches):
                assert all(fits(slot.geometry.size, batch.shape) for slot in batch.slots)
                assert fits(next(plan.successors(step)).geometry.size, batch.shape)

    def test_epochs_take_the_images_in_turn(self):
        plan = make_plan()
        assert plan.steps_per_epoch == 5
        for epoch in range(3):
            batches = [plan[epoch * 5 + step] for step in range(5)]
            seen = [slot.index for batch in batches for slot in batch.slots]
            assert len(seen) == 20
            # A short last batch is filled with images that the epoch had already.
            assert len(set(seen)) >= 20 - plan.batch_size
            for batch in batches:
                assert all(
                    s.geometry.size[0] <= batch.shape[0] and s.geometry.size[1] <= batch.shape[1] for s in batch.slots
                )

    def test_follows_from_seed_and_step_alone(self):
        plan = make_plan()
        forward = [plan[step] for step in range(17)]
        other = make_plan()
        assert [other[step] for step in reversed(range(17))] == forward[::-1]
        assert [make_plan(seed=1)[step] for step in range(17)] != forward

    def test_successors_have_the_same_shape(self):
        plan = make_plan()
        successors = plan.successors(2)
        for _ in range(20):
            slot = next(successors)
            assert slot.geometry.size[0] <= plan[2].shape[0]
            assert slot.geometry.size[1] <= plan[2].shape[1]

    def test_evaluation_takes_each_image_once(self):
        geometries = evaluation_geometries(np.array([[48, 60], [60, 48], [50, 50]] * 5), 64, 96)
        plan = evaluation_plan(geometries, batch_size=4, buckets=choose_buckets(np.array([g.size for g in geometries]), 2))
        assert sorted(slot.index for batch in plan for slot in batch.slots) == list(range(15))
        assert all(len(batch.slots) <= 4 for batch in plan)


class TestLoading:
    def loader(self, coco, batch_size=2):
        dataset = load(coco).subset(keep_empty=True, min_side=1)
        plan = TrainPlan(
            lambda rng: draw_weak(dataset.sizes, SETTINGS, rng),
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
            record.image.path.unlink()
        with pytest.raises(UserError, match="none of the images"):
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


def test_images_on_a_canvas():
    """An image lies at the top left of a grey square, and its boxes with it."""
    image = np.full((40, 80, 3), 250, np.uint8)
    (geometry,) = evaluation_geometries(np.array([image.shape[:2]]), 64, 64, canvas=64)
    out = apply_to_image(image, geometry)
    moved, _ = apply_to_boxes(np.array([[40, 0, 80, 40]], np.float32), geometry)
    assert geometry.resized == (32, 64)
    assert out.shape == (64, 64, 3)
    assert np.all(out[:32] == 250)
    assert np.all(out[32:] == 114)
    np.testing.assert_allclose(moved, [[32, 0, 64, 32]])

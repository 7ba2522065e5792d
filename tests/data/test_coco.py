"""Annotations in COCO form: what is read, what is dropped, what is refused, and which classes labels are."""

import json

import numpy as np
import pytest
import tiny
from folders import edit

from hpr_jax.data.dataset import Classes
from hpr_jax.data.sources.coco import load_coco
from hpr_jax.errors import UserError


@pytest.fixture
def coco(tmp_path):
    return tiny.write_coco(tmp_path / "data")


def load(directory, split="train2017", classes=None, masks=False):
    return load_coco(directory, split, f"annotations/instances_{split}.json", classes, masks=masks)


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
            (["a", 1, 2, 3], "four numbers"),
            ([[1], 1, 2, 3], "four numbers"),
            ({"x": 1}, "four numbers"),
            ([True, 0, 20, 15], "four numbers"),
            (["0", "nan", 5, 5], "finite"),
            ([5, 5, -5, 5], "pixel wide"),
        ],
    )
    def test_impossible_boxes_are_dropped(self, coco, bbox, reason):
        edit(coco, lambda c: c["annotations"][0].update(bbox=bbox))
        dataset = load(coco)
        assert any(reason in problem.reason for problem in dataset.dropped_boxes)
        assert len(dataset.records[0].labels) == 1

    @pytest.mark.parametrize("bbox", [None, [], "missing"])
    def test_without_a_box_it_is_that_of_the_mask(self, coco, bbox):
        boxes = load(coco).records[0].boxes

        def take(content):
            objects = content["annotations"]
            objects[1]["segmentation"] = {"size": [48, 60], "counts": [500, 30, 48 * 60 - 530]}
            for one in objects[:2]:
                one.pop("bbox") if bbox == "missing" else one.update(bbox=bbox)

        edit(coco, take)
        found = load(coco).records[0].boxes
        np.testing.assert_array_equal(found[0], boxes[0])
        # The run lengths begin at pixel 500 = 10 * 48 + 20, go down to the last row, and two rows of the next column.
        assert found[1].tolist() == [10, 0, 12, 48]
        edit(coco, lambda content: content["annotations"][0].update(segmentation=[]))
        dataset = load(coco)
        assert len(dataset.records[0].boxes) == 1
        assert str(dataset.dropped_boxes[0]).startswith("annotation 1 of image 7: box ")
        assert "does not have four numbers" in str(dataset.dropped_boxes[0])

    def test_boxes_are_clipped(self, coco):
        edit(coco, lambda c: c["annotations"][0].update(bbox=[-5, -5, 20, 100]))
        assert load(coco).records[0].boxes[0].tolist() == [0, 0, 15, 48]

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda c: c.pop("categories"), "has no list of categories"),
            (lambda c: c.update(images={"1": {}}), "has {'1': {}} in the place of the list of images"),
            (lambda c: c["annotations"].insert(0, 5), "entry 0 of its annotations is 5"),
            (lambda c: c["images"][0].pop("id"), "Entry 0 of the images of .* has no id"),
            (lambda c: c["images"][0].pop("file_name"), "Image 7 of .* has no file_name"),
            (lambda c: c["images"][0].update(file_name="\ud800.jpg"), "'.ud800.jpg', which is not valid Unicode"),
            (lambda c: c["images"][0].update(file_name="a\0.jpg"), "NUL"),
            (lambda c: c["images"][0].update(file_name="/etc/passwd"), "'/etc/passwd', which leads out of the folder"),
            (lambda c: c["images"][0].update(file_name="a/../../../b.jpg"), "leads out of the folder"),
            (lambda c: c["images"][0].update(width=1e999), "Image 7 of .* has the width inf; it must be from 1"),
            (lambda c: c["images"][0].update(height="high"), "has the height 'high', which is no number"),
            (lambda c: c["images"][0].update(height=0), "has the height 0; it must be from 1"),
            (lambda c: c["images"][0].update(id=[1]), r"has the id \[1\], which is neither a whole number nor text"),
            (lambda c: c["images"][0].update(id="7"), r"belongs to image 7, which is not listed \(but '7' is: write ids"),
            (lambda c: c["annotations"][0].update(category_id="2"), r"category '2', which is not listed \(but 2 is"),
            (lambda c: c["annotations"][0].update(iscrowd="maybe"), "has the iscrowd 'maybe', which is neither 0 nor 1"),
            (lambda c: c["annotations"][0].update(iscrowd=[]), r"has the iscrowd \[\]"),
            (lambda c: c["categories"][0].update(name=None), "Category 2 of .* has no name"),
            (lambda c: c["categories"][0].update(name="a\0"), "NUL"),
            (lambda c: c["categories"].append({"id": 5.0, "name": "x"}), "lists the category id 5 twice"),
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
        for text, sentence in (
            ("{", "not JSON"),
            ("[1, 2]", "holds no object with images and annotations"),
            ("[" * 100_000, "nested too deeply"),
            ('{"images": ' + "9" * 5000 + "}", "not JSON"),
        ):
            (coco / "annotations/instances_train2017.json").write_text(text)
            with pytest.raises(UserError, match=sentence):
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

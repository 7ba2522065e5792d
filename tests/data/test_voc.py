"""Pascal VOC's format: its XML files and lists, and the sentences about what is wrong in them."""

import cv2
import folders
import layouts
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged_bytes, examples, understood_or_refused

from hpr_jax.data.build import load_dataset
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.evaluation.average_precision import coco_average_precision

SIZE = {"height": 50, "width": 100}


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((50, 100, 3), np.uint8))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.fixture
def data(tmp_path):
    """Two training images and a validation image of 100x50 pixels, and a difficult object."""
    directory = tmp_path / "data"
    objects = {
        "a": [("pen", [10, 20, 30, 15], False), ("cup", [0, 0, 100, 50], True)],
        "b": [],
        "c": [("hat", [40, 10, 20, 20], False)],
    }
    for name, some in objects.items():
        layouts.write_voc(directory / f"Annotations/{name}.xml", f"{name}.jpg", SIZE, some)
        picture(directory / f"JPEGImages/{name}.jpg")
    write(directory / "ImageSets/Main/train.txt", "a\nb\n")
    write(directory / "ImageSets/Main/val.txt", "c\n")
    write(directory / "ImageSets/Main/trainval.txt", "a\nb\nc\n")
    return directory


def load(directory, split="train", classes=None, **settings):
    return load_dataset(folders.settings(directory, **settings), split, classes, masks=True)


class TestAnnotations:
    def test_corners_are_counted_from_one(self, data):
        text = (data / "Annotations/a.xml").read_text()
        assert "<xmin>11</xmin><ymin>21</ymin><xmax>40</xmax><ymax>35</ymax>" in text
        record = load(data).records[0]
        assert record.boxes.tolist() == [[10, 20, 40, 35]]
        assert (record.height, record.width) == (50, 100)

    def test_classes_are_the_names_of_both_splits_in_order(self, data):
        for split in layouts.SPLITS:
            assert load(data, split).classes == Classes(("cup", "hat", "pen"), (1, 2, 3))
        assert load(data).records[0].labels.tolist() == [2]

    def test_ids_are_those_that_a_model_has_for_the_names(self, data):
        """Not every class of it need be there."""
        model = Classes(("pen", "cat", "hat", "cup"), (7, 2, 5, 3))
        assert load(data, classes=model).classes == model
        assert load(data, classes=model).records[0].labels.tolist() == [0]
        with pytest.raises(
            UserError, match="not those that the model knows: it lacks 7 cat, and it has 1 cup, 2 hat, 3 pen"
        ):
            load(data, classes=Classes(("cat",), (7,)))

    def test_difficult_objects_neither_gain_nor_cost(self, data):
        dataset = load(data)
        assert dataset.truth.crowd.tolist() == [False, True]
        assert dataset.truth.labels.tolist() == [2, 0]
        right = {"image_id": 1, "category_id": 3, "bbox": [10, 20, 30, 15], "score": 0.9}
        easy = coco_average_precision(dataset, [right], "pycocotools")[0]
        found = [right, {"image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 50], "score": 0.8}]
        for evaluator in ("pycocotools", "hotcoco"):
            assert coco_average_precision(dataset, found, evaluator)[0] == pytest.approx(easy)
        assert easy["AP"] == pytest.approx(1)

    @pytest.mark.parametrize(
        ("old", "new", "reason"),
        [
            ("<xmin>11</xmin>", "", "does not have four numbers"),
            ("<xmin>11</xmin>", "<xmin>left</xmin>", "does not have four numbers"),
            ("<xmin>11</xmin>", "<xmin>nan</xmin>", "is not finite"),
            ("<xmax>40</xmax>", "<xmax>1e999</xmax>", "is not finite"),
            ("<xmax>40</xmax>", "<xmax>5</xmax>", "is less than a pixel wide or high"),
            ("<xmin>11</xmin><ymin>21</ymin><xmax>40", "<xmin>200</xmin><ymin>21</ymin><xmax>240", "lies outside the image"),
        ],
    )
    def test_impossible_boxes_are_dropped_and_named(self, data, old, new, reason):
        edit(data / "Annotations/a.xml", old, new)
        (problem,) = load(data).dropped_boxes
        assert problem.subject.startswith("annotation 'Annotations/a.xml, object 1' of image 1: box ")
        assert problem.reason == reason

    def test_boxes_of_parts_are_not_those_of_objects(self, data):
        part = "<part><name>cap</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        edit(data / "Annotations/a.xml", "<object><name>pen</name>", f"<object>{part}<name>pen</name>")
        assert load(data).records[0].boxes.tolist() == [[10, 20, 40, 35]]

    @pytest.mark.parametrize(
        "size", ["", "<size><width>0</width><height>0</height></size>", "<size><width>x</width></size>"]
    )
    def test_sizes_that_are_not_written_are_measured(self, data, size):
        edit(data / "Annotations/a.xml", "<size><width>100</width><height>50</height><depth>3</depth></size>", size)
        record = load(data).records[0]
        assert (record.height, record.width) == (50, 100)

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("<annotation>", "Annotations/a.xml, line 1 is not XML; mend it"),
            ("", "line 1 is not XML"),
            ("<a/>", "a.xml is no annotation of Pascal VOC: it holds <a>, not <annotation>"),
            (
                "<annotation><object/></annotation>",
                "Annotations/a.xml, object 1 has the name '', which is no text; name its",
            ),
            (
                "<annotation><object><name>a</name><difficult>2</difficult></object></annotation>",
                "Annotations/a.xml, object 1 has '2' as difficult, which is neither 0 nor 1",
            ),
            ('<?xml version="1.0" encoding="klingon"?><annotation/>', "is XML in an encoding that is not known; save it"),
            (
                '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
                r"a.xml declares a document type \(DOCTYPE\), which annotations have none of; take it out",
            ),
            ("<!DOCTYPE annotation><annotation/>", "declares a document type"),
        ],
    )
    def test_broken_files_get_a_sentence(self, data, text, sentence):
        write(data / "Annotations/a.xml", text)
        with pytest.raises(UserError, match=sentence):
            load(data)

    def test_document_types_are_seen_in_other_encodings(self, data):
        text = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>'
        (data / "Annotations/a.xml").write_bytes(text.encode("utf-16"))
        with pytest.raises(UserError, match="declares a document type"):
            load(data)

    def test_large_files_are_refused(self, data):
        (data / "Annotations/a.xml").write_bytes(b" " * (8 * 2**20 + 1))
        with pytest.raises(UserError, match=r"a.xml has more than the 8,388,608 bytes"):
            load(data)


class TestImages:
    def test_names_of_files_count_more_than_names_in_them(self, data):
        (data / "JPEGImages/a.jpg").rename(data / "JPEGImages/a.png")
        assert load(data).records.images.names == ["a.png", "b.jpg"]
        edit(data / "Annotations/b.xml", "b.jpg", "old/name.jpg")
        assert load(data).records.images.names == ["a.png", "b.jpg"]

    def test_other_names_are_taken_where_there_is_no_such_file(self, data):
        (data / "JPEGImages/a.jpg").rename(data / "JPEGImages/z.jpg")
        edit(data / "Annotations/a.xml", "a.jpg", "z.jpg")
        assert load(data).records.images.names[0] == "z.jpg"

    @pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd"])
    def test_names_do_not_lead_out(self, data, name):
        (data / "JPEGImages/a.jpg").unlink()
        edit(data / "Annotations/a.xml", "a.jpg", name)
        with pytest.raises(
            UserError, match=f"Image 1 of .*train.txt has the file_name '{name}', which leads out of the folder"
        ):
            load(data)


class TestSplits:
    def test_without_lists_it_is_divided(self, data):
        for path in (data / "ImageSets/Main").iterdir():
            path.unlink()
        train, val = layouts.load(data)
        assert len(train) + len(val) == 3
        assert train.origin == "Pascal VOC, split by config.data.val_fraction=0.2"

    def test_lists_of_voc_2007(self, data):
        write(data / "ImageSets/Main/test.txt", "c")
        (data / "ImageSets/Main/train.txt").unlink()
        edit(data / "ImageSets/Main/trainval.txt", "c\n", "")
        train, val = layouts.load(data)
        assert (len(train), len(val), train.origin) == (2, 1, "Pascal VOC, with test for validation")

    def test_lists_of_one_class_say_more(self, data):
        write(data / "ImageSets/Main/train.txt", "a  1\r\n\nb -1\n")
        assert load(data).records.images.names == ["a.jpg", "b.jpg"]

    def test_names_with_spaces(self, data):
        for folder, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
            (data / f"{folder}/a.{suffix}").rename(data / f"{folder}/my image 1.{suffix}")
        write(data / "ImageSets/Main/train.txt", "my image 1\n")
        assert load(data).records.images.names == ["my image 1.jpg"]

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            (
                "a\nx\n",
                r"train.txt, line 2 names 'x', whose annotation file in .*Annotations does not exist; leave the line",
            ),
            ("../a\n", r"line 1 names '../a', whose annotation file in .*Annotations leads out of its folder"),
            ("\n", "train.txt lists no images; add some"),
        ],
    )
    def test_wrong_lists_get_a_sentence(self, data, text, sentence):
        write(data / "ImageSets/Main/train.txt", text)
        with pytest.raises(UserError, match=sentence):
            load(data)

    def test_folders_with_small_letters(self, data):
        (data / "Annotations").rename(data / "annotations")
        (data / "JPEGImages").rename(data / "images")
        assert load(data).records.counts.tolist() == [1, 0]

    def test_files_beside_images(self, tmp_path):
        for name in "ab":
            layouts.write_voc(tmp_path / f"{name}.xml", f"{name}.jpg", SIZE, [("cup", [1, 2, 30, 20], False)])
            picture(tmp_path / f"{name}.jpg")
        train, val = layouts.load(tmp_path)
        assert [len(train), len(val)] == [1, 1]
        assert val.records[0].boxes.tolist() == [[1, 2, 31, 22]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return layouts.to_voc(
        layouts.shapes(tmp_path_factory.mktemp("shapes"), whole=True), tmp_path_factory.mktemp("voc") / "data"
    )


TEXTS = st.sampled_from(["", "0", "1", "-3", "12.5", "nan", "1e999", "x", "9" * 400, "a.jpg", "../../x", "&lt;", "1 2", "é"])
TAGS = ("name", "difficult", "xmin", "ymin", "xmax", "ymax", "width", "height", "filename")


@examples(100, 5000)
@given(st.data())
def test_any_value_is_understood_or_gets_a_sentence(folder, data):
    path = folder / "Annotations/train_000001.xml"
    values = {tag: data.draw(TEXTS) for tag in TAGS if data.draw(st.booleans())}
    tags = {tag: f"<{tag}>{value}</{tag}>" for tag, value in values.items()}
    box = "".join(tags.get(tag, "") for tag in TAGS[2:6])
    one = f"<object>{tags.get('name', '<name>star</name>')}{tags.get('difficult', '')}<bndbox>{box}</bndbox></object>"
    size = f"<size>{tags.get('width', '')}{tags.get('height', '')}</size>"
    path.write_text(f"<annotation>{tags.get('filename', '')}{size}{one}</annotation>")
    understood_or_refused(load, folder)


@examples(100, 5000)
@given(st.data())
def test_any_damage_of_a_file_is_understood_or_gets_a_sentence(folder, data):
    path = folder / "Annotations/train_000001.xml"
    original = (folder / "Annotations/train_000002.xml").read_bytes()
    path.write_bytes(data.draw(damaged_bytes(original)))
    understood_or_refused(load, folder, "train")

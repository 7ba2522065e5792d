"""YOLO's format: `data.yaml`, lists of images, labels, and the sentences about what is wrong in them."""

import logging
from pathlib import Path

import cv2
import folders
import layouts
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged_bytes, examples, understood_or_refused

from hpr_jax.data.build import load_dataset
from hpr_jax.data.dataset import Classes
from hpr_jax.data.sources.yolo import label_file
from hpr_jax.errors import UserError

NAMES = "names: [cup, pen]\n"
DATA = f"train: images/train\nval: images/val\n{NAMES}"


def picture(path, height=50, width=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def data(tmp_path):
    """Two training images and a validation image of 100x50 pixels; the second one has no labels."""
    directory = tmp_path / "data"
    write(directory / "data.yaml", DATA)
    for name in ("train/a", "train/b", "val/c"):
        picture(directory / f"images/{name}.jpg")
    write(directory / "labels/train/a.txt", "0 0.5 0.5 0.2 0.4\n\n1 0.1 0.2 0.5 0.2 0.5 0.8\n")
    write(directory / "labels/val/c.txt", "1 0.25 0.5 0.5 1.0")
    return directory


def load(directory, split="train", classes=None, **settings):
    return load_dataset(folders.settings(directory, **settings), split, classes, masks=True)


def boxes(dataset):
    return [record.boxes.tolist() for record in dataset.records]


class TestLabels:
    def test_boxes_and_polygons(self, data):
        dataset = load(data)
        assert dataset.classes == Classes(("cup", "pen"), (0, 1))
        assert [record.image.path.name for record in dataset.records] == ["a.jpg", "b.jpg"]
        first, second = dataset.records
        np.testing.assert_allclose(first.boxes, [[40, 15, 60, 35], [10, 10, 50, 40]], atol=1e-5)
        assert first.labels.tolist() == [0, 1]
        assert first.masks[0] is None
        np.testing.assert_allclose(first.masks[1][0], [[10, 10], [50, 10], [50, 40]], atol=1e-5)
        assert second.boxes.shape == (0, 4)
        # The triangle has half of its hull's area.
        np.testing.assert_allclose(dataset.truth.areas, [400, 600])
        np.testing.assert_allclose(load(data, "val").truth.boxes, [[0, 0, 50, 50]])

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("0 0.5 0.5 0.2", "does not have four numbers"),
            ("0", "does not have four numbers"),
            ("0 0.5 0.5 0.2 high", "does not have four numbers"),
            ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.9", "does not have four numbers"),
            ("0 0.5 nan 0.2 0.2", "is not finite"),
            ("0 0.5 0.5 inf 0.2", "is not finite"),
            ("0 0.5 0.5 1e999 0.2", "is not finite"),
            ("0 0.1 0.2 0.5 0.2 0.5 inf", "is not finite"),
            ("0 0.5 0.5 0.001 0.2", "is less than a pixel wide or high"),
            ("0 0.5 0.5 -0.2 0.2", "is less than a pixel wide or high"),
            ("0 5 5 0.2 0.2", "lies outside the image"),
        ],
    )
    def test_impossible_ones_are_dropped_and_named(self, data, line, reason):
        write(data / "labels/train/a.txt", f"1 0.5 0.5 0.5 0.5\n{line}\n")
        dataset = load(data)
        (problem,) = dataset.dropped_boxes
        assert problem.subject.startswith("annotation 'labels/train/a.txt, line 2' of image 1: box ")
        assert problem.reason == reason
        assert boxes(dataset)[0] == [[25, 12.5, 75, 37.5]]

    def test_a_far_corner_drops_the_mask(self, data):
        write(data / "labels/train/a.txt", "0 0.1 0.2 0.5 0.2 9.5 0.8")
        (problem,) = load(data).dropped_masks
        assert str(problem) == (
            "annotation 'labels/train/a.txt, line 1' of image 1: its segmentation has a corner far outside its image"
        )

    @pytest.mark.parametrize("label", ["2", "-1", "cup", "0.5", "nan", "inf", "9" * 400])
    def test_other_classes_are_refused(self, data, label):
        write(data / "labels/train/a.txt", f"0 0.5 0.5 0.2 0.4\n{label} 0.5 0.5 0.2 0.2")
        with pytest.raises(
            UserError, match=r"data/labels/train/a.txt, line 2 has the class .*, and .*data.yaml names 2, from"
        ):
            load(data)

    def test_numbers_as_other_programs_write_them(self, data):
        """A score behind the box, classes as 0.0, lines of Windows, and a mark at the beginning."""
        text = "\ufeff0.0 0.5 0.5 0.2 0.4 0.93\r\n1\t0.5  0.5 0.2 4e-1\r\n"
        (data / "labels/train/a.txt").write_text(text, newline="")
        dataset = load(data)
        assert dataset.records[0].labels.tolist() == [0, 1]
        np.testing.assert_allclose(dataset.records[0].boxes, [[40, 15, 60, 35]] * 2, atol=1e-5)

    def test_keypoints_are_left_out(self, data):
        write(data / "data.yaml", DATA + "kpt_shape: [2, 2]\n")
        write(data / "labels/train/a.txt", "0 0.5 0.5 0.2 0.4 0.1 0.1 0.9 0.9")
        record = load(data).records[0]
        np.testing.assert_allclose(record.boxes, [[40, 15, 60, 35]], atol=1e-5)
        assert record.masks == (None,)

    def test_not_text(self, data):
        (data / "labels/train/a.txt").write_bytes(b"0 0.5 \xff")
        with pytest.raises(UserError, match=r"a.txt is not text in UTF-8: byte 6 is none; save it as UTF-8."):
            load(data)

    def test_where_they_lie(self):
        """As Ultralytics looks for them."""
        for image, labels in (
            ("images/train/a.jpg", "labels/train/a.txt"),
            ("train/images/a.b.jpg", "train/labels/a.b.txt"),
            ("images/images/a.jpg", "images/labels/a.txt"),
            ("train/a.jpg", "train/a.txt"),
            ("my_images/a.jpg", "my_images/a.txt"),
            ("a.jpg", "a.txt"),
        ):
            assert label_file(Path(image)) == Path(labels)

    def test_no_labels_at_all_are_told(self, data, caplog):
        (data / "labels/train/a.txt").unlink()
        caplog.set_level(logging.WARNING, "hpr_jax")
        assert load(data).records.counts.tolist() == [0, 0]
        (message,) = caplog.messages
        assert message.startswith(f"None of the 2 images that {data}/data.yaml names (train) has a file of labels, like ")
        assert message.endswith(f" {data}/labels/train/a.txt.")


class TestImages:
    def test_turned_ones_are_measured_as_they_are_seen(self, data):
        pixels = np.zeros((100, 50, 3), np.uint8)
        tiny.write_turned(data / "images/train/a.jpg", pixels, 6)
        record = load(data).records[0]
        stored = cv2.imread(str(data / "images/train/a.jpg"))
        assert (record.height, record.width) == stored.shape[:2]

    def test_unreadable_ones_stay_and_their_boxes_are_named(self, data):
        write(data / "images/train/a.jpg", "no image")
        dataset = load(data)
        assert [str(problem) for problem in dataset.dropped_boxes] == [
            f"annotation 'labels/train/a.txt, line {line}' of image 1: box 'unknown, since its image cannot be read' does "
            "not have four numbers"
            for line in (1, 3)
        ]
        assert len(dataset) == 2

    def test_folders_are_searched_to_the_bottom(self, data):
        picture(data / "images/train/deep/er/d.PNG")
        picture(data / "images/train/.hidden.jpg")
        write(data / "images/train/notes.txt", "")
        write(data / "labels/train/deep/er/d.txt", "0 0.5 0.5 0.2 0.4")
        dataset = load(data)
        assert dataset.records.images.names == ["a.jpg", "b.jpg", "deep/er/d.PNG"]
        assert dataset.records.counts.tolist() == [2, 0, 1]


class TestDataFile:
    @pytest.mark.parametrize(
        "names",
        [
            "names:\n  0: cup\n  1: pen\n",
            "names: {1: pen, 0: cup}\n",
            "nc: 2\nnames: ['cup', \"pen\"]\n",
            "names:\n- cup\n- pen\nroboflow:\n  version: 1\n",
        ],
    )
    def test_classes(self, data, names):
        write(data / "data.yaml", DATA.replace(NAMES, names))
        assert load(data).classes == Classes(("cup", "pen"), (0, 1))

    def test_classes_that_look_like_other_values(self, data):
        write(data / "data.yaml", DATA.replace(NAMES, "names: [no, 1.0]"))
        assert load(data).classes.names == ("no", "1.0")
        write(data / "data.yaml", DATA.replace(NAMES, "nc: 2"))
        assert load(data).classes.names == ("class_0", "class_1")
        write(data / "data.yaml", DATA.replace(NAMES, "names: {0: cup, 1: pen, 7: hat}"))
        assert load(data).classes.category_ids == (0, 1, 7)

    def test_ids_are_those_that_a_model_has_for_the_names(self, data):
        model = Classes(("pen", "cup"), (5, 9))
        assert load(data, classes=model).classes == model
        assert load(data, classes=model).records[0].labels.tolist() == [1, 0]
        with pytest.raises(UserError, match="are not those that the model knows: it lacks 3 hat, and it has 1 pen"):
            load(data, classes=Classes(("cup", "hat"), (0, 3)))

    def test_lists_of_images(self, data):
        write(data / "data.yaml", f"train: lists/train.txt\nval: [images/val, images/train]\n{NAMES}")
        listed = ("../images/train/b.jpg", "", "images/val/c.jpg", f"{data}/images/train/a.jpg\r", "./gone.jpg")
        write(data / "lists/train.txt", "\n".join(listed))
        dataset = load(data)
        names = [str(record.image.path.relative_to(data)) for record in dataset.records]
        assert names == ["images/train/b.jpg", "images/val/c.jpg", "images/train/a.jpg", "lists/gone.jpg"]
        assert dataset.records.counts.tolist() == [0, 1, 2, 0]
        assert load(data, "val").records.images.names == ["val/c.jpg", "train/a.jpg", "train/b.jpg"]

    @pytest.mark.parametrize("path", [".", "./", "~", "", "null", "data", "ABSOLUTE"])
    def test_path_names_the_folder(self, data, path):
        write(data / "data.yaml", f"path: {str(data) if path == 'ABSOLUTE' else path}\n{DATA}")
        assert len(load(data)) == 2

    def test_path_names_a_folder_below(self, data):
        write(data / "data.yaml", f"path: images\ntrain: train\nval: val\ntest:\n{NAMES}")
        assert load(data).records.counts.tolist() == [2, 0]

    def test_roboflow_writes_one_folder_too_far_up(self, tmp_path):
        for folder in ("train", "valid", "test"):
            picture(tmp_path / f"{folder}/images/a.jpg")
            write(tmp_path / f"{folder}/labels/a.txt", "0 0.5 0.5 0.2 0.4")
        text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 1\nnames: ['cup']\n"
        write(tmp_path / "data.yaml", text)
        train, val = layouts.load(tmp_path)
        assert [next(iter(one.records)).image.path for one in (train, val)] == [
            tmp_path / "train/images/a.jpg",
            tmp_path / "valid/images/a.jpg",
        ]
        assert train.origin == "YOLO"

    def test_one_split(self, data):
        """It is divided, and each image is in one part."""
        write(data / "data.yaml", f"train: images\n{NAMES}")
        for number in range(30):
            picture(data / f"images/{number}.jpg")
        train, val = layouts.load(data, val_fraction=0.4)
        assert len(train) + len(val) == 33
        assert {*train.records.images.names}.isdisjoint(val.records.images.names)
        assert train.fingerprint != val.fingerprint
        assert train.fingerprint != layouts.load(data, val_fraction=0.3)[0].fingerprint

    def test_test_is_validated_on_if_there_is_nothing_else(self, data):
        write(data / "data.yaml", f"train: images/train\ntest: images/val\n{NAMES}")
        assert load(data, "val").origin == "YOLO, with test for validation"

    def test_validation_alone_cannot_be_trained_on(self, data):
        write(data / "data.yaml", f"val: images/val\n{NAMES}")
        assert len(load(data, "val")) == 1
        with pytest.raises(UserError, match="is read as YOLO, and has no training split, only one for validation; name it"):
            load(data)

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("names: [cup", "data.yaml, line 1 is not YAML as Ultralytics writes it"),
            ("a: *b", "data.yaml, line 1 is not YAML"),
            ("[" * 100_000, "is not YAML"),
            ("\0", "is not YAML"),
            ("cup", "needs the keys names, train and val"),
            ("train: images/train", "lists no classes; add names"),
            ("names: []\ntrain: a", "lists no classes"),
            ("nc: 9999999999\ntrain: a", "lists no classes"),
            (DATA + "nc: 3", r"says that there are 3 classes \(nc\), and names 2; mend one"),
            ("names: [[a]]\ntrain: a", r"gives class 0 the name \['a'\]; write text there"),
            ("names: {a: b}\ntrain: a", "gives a class the number 'a'; number them"),
            ("names: {0: b, 0.0: c}\ntrain: a", "gives a class the number '0.0'"),
            (NAMES, "names no images; add train and val"),
            (f"train: {{a: b}}\n{NAMES}", r"has the train {'a': 'b'}; write a path there"),
            (
                f"train: ./images/trian\n{NAMES}",
                "data.yaml names the folder ./images/trian, which is missing; mend its train",
            ),
            (f"train: images/train/a.jpg\n{NAMES}", "which is neither a folder nor a list"),
            (f"train: empty\n{NAMES}", "where no images are listed"),
            (f"train: [empty, data.txt]\n{NAMES}", "where no images are listed"),
            (
                f"train: ../../x\n{NAMES}",
                "names train: ../../x, which leads out of the folder of the data; write it relative",
            ),
            (f"train: /etc\n{NAMES}", "names train: /etc, which leads out"),
            (
                f"path: /content/x\n{DATA}",
                "has the path '/content/x', which leads out of the folder of the data, .*; leave the",
            ),
            (f"path: ..\n{DATA}", "has the path '..', which leads out"),
            (f"path: [a]\n{DATA}", r"has the path \['a'\]; write a folder there"),
            (
                f"train: out.txt\n{NAMES}",
                r"out.txt, line 2 names the image '/etc/passwd.jpg', which leads out of the folder",
            ),
            (f"train: dot.txt\n{NAMES}", r"dot.txt, line 1 names '.', which can be no image; leave the line out."),
            (f"train: nul.txt\n{NAMES}", r"nul.txt, line 1 names 'a.x00.jpg', which can be no image; leave the line out."),
            (f"train: {'x' * 300}\n{NAMES}", "which is missing"),
        ],
    )
    def test_what_is_wrong_gets_a_sentence(self, data, text, sentence):
        (data / "empty").mkdir()
        write(data / "data.txt", "\n")
        write(data / "dot.txt", ".")
        write(data / "nul.txt", "a\0.jpg")
        write(data / "out.txt", "images/train/a.jpg\n/etc/passwd.jpg")
        write(data / "data.yaml", text)
        with pytest.raises(UserError, match=sentence):
            load(data)

    def test_large_ones_are_refused(self, data):
        write(data / "data.yaml", DATA + "#" * 2**20)
        with pytest.raises(UserError, match=r"data.yaml has more than the 1,048,576 bytes that such a file may have"):
            load(data)

    def test_other_large_files_are_refused(self, data):
        with (data / "labels/train/a.txt").open("ab") as file:
            file.truncate(8 * 2**20 + 1)
        with pytest.raises(UserError, match=r"a.txt has more than the 8,388,608 bytes that such a file may have"):
            load(data)

    def test_small_ones_that_would_become_large_do_not(self, data):
        """Each line is the one before ten times over."""
        lines = ["a0: &a0 {x: y}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12)]
        write(data / "data.yaml", "\n".join(lines) + "\n" + DATA)
        assert len(load(data)) == 2


TOKENS = st.sampled_from(["0", "1", "0.5", "-0.1", "1e308", "nan", "-inf", "", "x", "9" * 400, "0x1", "1_0", "\0", "é"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return layouts.to_yolo(layouts.shapes(tmp_path_factory.mktemp("shapes")), tmp_path_factory.mktemp("yolo") / "data")


@examples(100, 5000)
@given(lines=st.lists(st.lists(TOKENS, max_size=9).map(" ".join), max_size=4))
def test_any_line_is_understood_or_gets_a_sentence(folder, lines):
    path = folder / "labels/train/000001.txt"
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [circle, square, triangle, star]\n")
    path.write_text("\n".join(lines))
    understood_or_refused(load, folder, str(path))


@examples(100, 5000)
@given(st.data())
def test_any_damage_of_a_file_is_understood_or_gets_a_sentence(folder, data):
    original = b"path: .\ntrain: [images/train]\nval: images/val\nnc: 4\nnames: {0: a, 1: b, 2: c, 3: d}\n"
    (folder / "labels/train/000001.txt").write_text("0 0.5 0.5 0.5 0.5")
    (folder / "data.yaml").write_bytes(data.draw(damaged_bytes(original)))
    understood_or_refused(load, folder)

"""What is said of good and bad data, and the verdict."""

import logging
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tiny
from folders import edit

from hpr_jax.commands.check_data import check_data
from hpr_jax.data.images import read_image
from hpr_jax.data.loading.batches import empty_batch
from hpr_jax.data.sources.tfds_writer import make_tfds
from hpr_jax.errors import UserError


def without_fault(content):
    """Removes the impossible box, and gives an object to the class that has none."""
    content["annotations"].pop()
    content["annotations"][0]["category_id"] = 9


@pytest.fixture
def coco(tmp_path):
    """Six training and three validation images without any fault."""
    directory = tiny.write_coco(tmp_path / "data")
    for split in ("train", "val"):
        edit(directory, without_fault, split)
    return directory


class Checked:
    """What `check_data` has printed and returned."""

    def __init__(self, coco, tmp_path, capsys, samples=0, **settings):
        config = tiny.config(coco)
        for section, values in settings.items():
            config[section].update(values)
        capsys.readouterr()
        self.verdict = check_data(config, tmp_path / "pictures", samples)
        self.text = capsys.readouterr().out
        assert self.text.splitlines()[-1] == str(self.verdict)

    def lines(self, label):
        """The texts behind a label, in order: first that of the training split, then that of the validation split."""
        return [line[16:] for line in self.text.splitlines() if line.startswith(f"  {label:14}")]

    def doubts(self, *expected):
        """Asserts that the data is fit to train on, with exactly these doubts."""
        assert self.verdict.fit
        assert self.verdict.doubts == list(expected)
        assert str(self.verdict).startswith("Fit to train, but: ")


@pytest.fixture
def checked(coco, tmp_path, capsys):
    return lambda **settings: Checked(coco, tmp_path, capsys, **settings)


def test_good_data(checked):
    report = checked()
    assert str(report.verdict) == "Fit to train."
    assert report.lines("images") == ["6, 1 of them without objects", "3, 1 of them without objects", "6"]
    assert report.lines("objects") == ["10, and 1 crowds", "4, and 1 crowds"]
    assert report.lines("widths")[0] == "60 / 60 / 60 pixels (smallest / median / largest)"
    assert report.lines("boxes")[0] == "10 small, 0 medium, 0 large (below 32², 96² pixels)"
    assert report.lines("box heights")[0].startswith("15 / 15 / 15")
    assert report.lines("masks") == ["10 of 10 objects have one"]
    assert report.lines("left out")[0].startswith("0 images with a side below 32 (config.data.min_side), 0 without objects")
    assert report.lines("an epoch has") == ["3 steps of 2 images; a run has 4 steps, 1.3 epochs"]
    assert report.lines("shapes") == ["1, whose padding adds 25% of the pixels:"]
    assert "64x64          3 batches" in report.text
    # The longest bar has 40 characters: five pens, four cups, one hat.
    assert f"cup         4 {'#' * 32}\n" in report.text
    assert f"pen         5 {'#' * 40}\n" in report.text
    assert f"hat         1 {'#' * 8}\n" in report.text
    assert report.lines("boxes a view") == ["room for 4; the fullest image has 2"]


def test_the_same_of_a_tfds_directory(coco, checked, tmp_path, capsys):
    expected = checked()
    directory = make_tfds(tiny.config(coco).data, tmp_path / "tfds")
    report = Checked(directory, tmp_path, capsys)
    assert str(report.verdict) == str(expected.verdict)
    for label in ("images", "objects", "boxes", "masks", "clipped", "shapes", "same images"):
        assert report.lines(label) == expected.lines(label) != []


def test_left_out_images(checked):
    report = checked(data={"keep_empty": False, "min_side": 49})
    assert report.lines("left out")[0].startswith("6 images with a side below 49 (config.data.min_side), 1 without objects")
    assert str(report.verdict) == "Not fit to train: no object is left to train on."


def test_boxes_and_masks(coco, checked):
    def change(content):
        annotations = content["annotations"]
        annotations[0]["bbox"] = [-3, 0, 20, 15]
        annotations[1]["bbox"] = [50, 40, 17.8, 15]
        annotations[2]["bbox"] = [0.2, 0, 60, 48]
        annotations[3]["bbox"] = [1, 1, 0, 5]
        annotations[4]["bbox"] = [1, 1, 5, 0.5]
        annotations[5]["bbox"] = [70, 1, 5, 5]
        annotations[6]["segmentation"] = [[1, 2]]
        del annotations[7]["segmentation"]

    edit(coco, change)
    report = checked(augmentation={"kind": "lsj"}, evaluate={"canvas": 64, "max_side": 64})
    assert report.lines("clipped")[0] == "2 boxes reach beyond their image, by 3 / 6 / 8 pixels (least / median / most)"
    assert report.lines("dropped")[0] == "3 boxes"
    assert "2 for what is less than a pixel wide or high:" in report.text
    assert "annotation 6 of image 37: box [70, 1, 5, 5]" in report.text
    assert report.lines("masks") == ["5 of 7 objects have one"]
    assert "1 for what has no polygon of at least three corners:" in report.text
    report.doubts(
        "impossible training boxes, which are dropped: 3",
        "malformed masks, which are dropped: 1",
        "objects without a mask, which are not pasted: 2",
    )


def test_masks_do_not_matter_where_nothing_is_pasted(coco, checked):
    edit(coco, lambda content: [annotation.pop("segmentation") for annotation in content["annotations"]])
    assert str(checked().verdict) == "Fit to train."
    report = checked(augmentation={"kind": "lsj"}, evaluate={"canvas": 64, "max_side": 64})
    report.doubts("without masks nothing is copied and pasted")


def test_classes_and_ids(coco, checked):
    def change(content):
        content["annotations"][0]["category_id"] = 2
        content["annotations"][1]["id"] = content["annotations"][2]["id"]

    edit(coco, change)
    report = checked()
    assert report.lines("absent") == ["1 classes without any object"]
    assert report.lines("ids")[0].startswith("1 annotations have no id of their own")
    report.doubts("classes without training objects: 1 (hat)")


def test_files(coco, checked):
    (coco / "train2017/0.jpg").unlink()
    (coco / "train2017/2.jpg").write_bytes(b"broken")
    data = (coco / "train2017/3.jpg").read_bytes()
    (coco / "train2017/3.jpg").write_bytes(data[: len(data) // 2])
    cv2.imwrite(str(coco / "val2017/1.jpg"), np.zeros((30, 20, 3), np.uint8))
    report = checked()
    for text in ("1 missing", "2 unreadable", "1 of another size", "0.jpg: No such file", "annotation says 60x48"):
        assert text in report.text
    report.doubts(
        "training images missing: 1 (others take their place)",
        "training images unreadable: 2 (others take their place)",
        "validation images of another size: 1 (what is on them counts as not found)",
    )


def test_no_image_can_be_read(coco, checked):
    for file in (coco / "train2017").iterdir():
        file.write_bytes(b"broken")
    report = checked(samples=2)
    (obstacle,) = report.verdict.obstacles
    assert obstacle.startswith("none of the training images can be read, like: ")
    assert obstacle.endswith("0.jpg is not an image that can be decoded")


def test_copies(coco, checked):
    shutil.copy(coco / "train2017/0.jpg", coco / "train2017/5.jpg")
    shutil.copy(coco / "train2017/3.jpg", coco / "val2017/2.jpg")
    edit(coco, lambda content: content["images"][4].update(file_name="3.jpg"))
    report = checked()
    assert report.lines("same names") == ["3 file names are in both"]
    assert report.lines("same images") == ["1 images are in both, byte by byte"]
    report.doubts(
        "training file names listed more than once: 1",
        "training images that are there more than once: 2",
        "validation images that are training images, too: 1",
    )


def test_broken_annotations_are_a_verdict(coco, checked):
    edit(coco, lambda content: content["annotations"][0].update(category_id=77))
    report = checked()
    assert not report.verdict.fit
    assert str(report.verdict).startswith("Not fit to train: Annotation 1 of ")
    assert "has the category 77, which is not listed." in str(report.verdict)
    # The other split is looked at all the same.
    assert report.lines("objects") == ["4, and 1 crowds"]


def test_splits_of_different_classes(coco, checked):
    edit(coco, lambda content: content["categories"][0].update(name="mug"), split="val")
    assert "not those that the model knows" in str(checked().verdict)


def test_too_few_images(checked):
    assert "fewer than config.train.batch_size 7" in str(checked(train={"batch_size": 7}).verdict)


def test_no_objects(coco, checked):
    edit(coco, lambda content: content.update(annotations=[]), split="val")
    assert checked().verdict.obstacles == [
        "the validation split has no objects: none of its images has an annotation",
    ]
    edit(coco, lambda content: content.update(annotations=[]))
    assert checked().verdict.obstacles == [
        f"the {split} split has no objects: none of its images has an annotation" for split in ("training", "validation")
    ]


def test_fewer_boxes_than_there_are(checked):
    checked(data={"max_boxes": 1}).doubts("a view has room for 1 boxes (config.data.max_boxes), and an image has 2")


def test_pictures(checked, tmp_path):
    report = checked(samples=5, augmentation={"strong_views": True, "kind": "lsj", "lsj": {"side": 64}})
    files = sorted((tmp_path / "pictures").iterdir())
    assert [file.name for file in files] == [f"sample_{number:03}.jpg" for number in range(5)]
    # A weak and a strong view side by side, each with a margin.
    assert {read_image(file).shape for file in files} == {(72, 144, 3)}
    assert report.lines("pictures")[0].endswith("5 images as training sees them (weak view, strong view)")
    report = checked(samples=1)
    # The valid part of a padded image.
    assert read_image(tmp_path / "pictures/sample_000.jpg").shape == (59, 72, 3)


@pytest.mark.parametrize("strong", [False, True])
def test_pictures_show_boxes_and_colours_as_training_has_them(checked, monkeypatch, tmp_path, strong):
    """Every view has red on the left, blue on the right, and a box around a third of it, of the second class."""

    class Loader:
        def __init__(self, plan, views, room):
            self.make_views = views

        def __getitem__(self, step):
            batch = empty_batch(2 * (1 + strong), (64, 96), 3)
            batch.views = 1 + strong
            batch.images[:, :60, :45], batch.images[:, :60, 45:90] = (255, 0, 0), (0, 0, 255)
            batch.sizes[:] = 60, 90
            batch.boxes[:, 0], batch.labels[:, 0], batch.valid[:, 0] = (0.5, 0.5, 0.5, 0.4), 1, True
            return batch

    monkeypatch.setattr("hpr_jax.commands.check_data.TrainLoader", Loader)
    drawn = []

    def draw(image, boxes, labels, names, **_):
        drawn.append((image.copy(), boxes, labels, names))
        return image

    monkeypatch.setattr("hpr_jax.inference.sheets.draw", draw)
    checked(samples=2, augmentation={"strong_views": strong})
    assert len(drawn) == 2 * (1 + strong)
    for image, boxes, labels, names in drawn:
        assert image.shape == (60, 90, 3)
        np.testing.assert_allclose(boxes, [[22.5, 18, 67.5, 42]], rtol=1e-5)
        assert (labels.tolist(), names) == ([1], ["pen"])
    picture = cv2.imread(str(tmp_path / "pictures/sample_001.jpg"))[..., ::-1]
    assert picture.shape == (68, 98 * (1 + strong), 3)
    for view in range(1 + strong):
        np.testing.assert_allclose(picture[34, 98 * view + 24], (255, 0, 0), atol=8)
        np.testing.assert_allclose(picture[34, 98 * view + 74], (0, 0, 255), atol=8)


def test_pictures_are_of_all_views_of_one_image(checked, monkeypatch):
    """Side by side, the weak one first, image by image; each view is its number of grey."""
    sheets = []

    class Loader:
        def __init__(self, plan, views, room):
            self.make_views = views

        def __getitem__(self, step):
            batch = empty_batch(4, (8, 8), 1)
            batch.views, batch.sizes[:] = 2, 8
            batch.images[:] = (10 * step + np.arange(4, dtype=np.uint8))[:, None, None, None]
            return batch

    monkeypatch.setattr("hpr_jax.commands.check_data.TrainLoader", Loader)
    monkeypatch.setattr("hpr_jax.commands.check_data.contact_sheet", lambda rows, height: sheets.append(rows) or rows[0][0])
    checked(samples=3, augmentation={"strong_views": True})
    assert [[int(view[0, 0, 0]) for view in views] for (views,) in sheets] == [[0, 2], [1, 3], [10, 12]]


def test_impossible_settings_are_no_verdict(checked, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="batch_size is 0"):
        checked(train={"batch_size": 0})


@pytest.mark.parametrize(
    ("change", "code", "words"), [(None, 0, "Fit to train"), ("train2017", 2, "Not fit"), ("val2017", 2, "Not fit")]
)
def test_as_a_program(coco, tmp_path, change, code, words):
    if change:
        shutil.rmtree(coco / change)
    command = [
        sys.executable,
        "-m",
        "hpr_jax.main",
        "check-data",
        "--config",
        f"{tiny.ROOT}/configs/ddq.py:demo",
        "--samples",
        "1",
    ]
    command += [f"--config.data.directory={coco}", "--config.train.batch_size=2", "--output", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1].startswith(words)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out/sample_000.jpg").is_file() == (code == 0 or change == "val2017")


def test_mistakes_on_the_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "hpr_jax.main",
        "check-data",
        "--config",
        f"{tiny.ROOT}/configs/ddq.py:demo",
        "--samples=-1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "hpr_jax: --samples is -1; it must be at least 0.\n"

"""Data on which a run would learn or measure nothing is refused, and the reason is said."""

import pytest
import tiny
from folders import edit

from hpr_jax.data import suitability
from hpr_jax.data.build import load_training_data
from hpr_jax.data.suitability import check_evaluation_data, check_training_data, too_few_queries, why_no_objects
from hpr_jax.errors import UserError


@pytest.fixture
def coco(tmp_path):
    return tiny.write_coco(tmp_path / "data")


def relative(content):
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [x / 60, y / 48, w / 60, h / 48]


def crowds(content):
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def check(directory, min_side=1, keep_empty=True):
    whole, _ = load_training_data(tiny.config(directory))
    check_training_data(whole, whole.subset(keep_empty=keep_empty, min_side=min_side), min_side, 2)


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (
            relative,
            ["11 boxes are left out, each of which is less than a pixel", "relative to the image? COCO's boxes are in"],
        ),
        (crowds, ["annotations that are crowds: 12"]),
        (lambda c: c.update(annotations=[]), ["none of its images has an annotation"]),
        (lambda c: c.update(annotations=[], images=[]), ["it lists no images"]),
        (
            lambda c: [a.update(bbox=[500, 0, 5, 5]) for a in c["annotations"]],
            ["11 boxes are left out, each of which lies outside the image"],
        ),
    ],
)
@pytest.mark.parametrize("keep_empty", [True, False])
def test_training_without_objects(coco, change, reasons, keep_empty):
    edit(coco, change)
    with pytest.raises(UserError, match=r"train2017.json has no objects to train on") as error:
        check(coco, keep_empty=keep_empty)
    assert all(reason in str(error.value) for reason in reasons), error.value


def test_training_on_too_small_images(coco):
    check(coco, min_side=48)
    with pytest.raises(
        UserError, match=r"10 objects are in images with a side below 49 pixels, as config.data.min_side asks"
    ):
        check(coco, min_side=49)


@pytest.mark.parametrize("change", [relative, crowds, lambda c: c.update(annotations=[])])
def test_evaluating_without_objects(coco, change):
    _, val = load_training_data(tiny.config(coco))
    check_evaluation_data(val, 1)
    edit(coco, change, "val")
    _, val = load_training_data(tiny.config(coco))
    if change is relative:
        # The evaluator can count them, whatever they are.
        assert "relative to the image" in why_no_objects(val)
    else:
        with pytest.raises(UserError, match=r"val2017.json has no objects to evaluate on: "):
            check_evaluation_data(val, 1)


def test_boxes_that_may_be_relative_are_told(coco, caplog):
    edit(coco, relative, "val")
    check_evaluation_data(load_training_data(tiny.config(coco))[1], 1)
    assert "No box of" in caplog.text
    assert "relative to the image? COCO's are in pixels" in caplog.text


def test_images_that_cannot_be_read(coco, caplog, monkeypatch):
    (coco / "train2017/3.jpg").unlink()
    check(coco)
    (sentence,) = [message for message in caplog.messages if "cannot be read" in message]
    assert sentence.startswith("1 of 6 images of ")
    assert "3.jpg: No such file or directory. `check-data` looks at all." in sentence
    for number in range(5):
        (coco / f"train2017/{number}.jpg").write_bytes(b"broken")
    check(coco)
    (coco / "train2017/5.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"None of the 6 images of .* can be read, like: .*/0.jpg is not an image"):
        check(coco)
    # A sample is looked at, and further images only if none of the sample can be read.
    monkeypatch.setattr(suitability, "SAMPLE", 2)
    monkeypatch.setattr(suitability, "MORE", 3)
    with pytest.raises(UserError, match=r"None of 5 images that were looked at of .* can be read"):
        check(coco)


def test_a_slow_folder_is_told_and_not_waited_for(coco, caplog, monkeypatch):
    monkeypatch.setattr(suitability, "SECONDS", 0.0)
    check(coco)
    assert "their folder is slow" in caplog.text


def test_more_objects_than_queries(coco):
    _, val = load_training_data(tiny.config(coco))
    assert too_few_queries(val, 2) == ""
    sentence = too_few_queries(val, 1)
    assert sentence.startswith("2 images of ")
    assert sentence.endswith("val2017/0.jpg has 2.")
    assert too_few_queries(val.subset(keep_empty=True, min_side=1000), 1) == ""


def test_the_sample_is_spread_over_the_split(coco, monkeypatch):
    seen = []
    decode = suitability.decode_annotated
    monkeypatch.setattr(
        suitability, "decode_annotated", lambda data, image, *size: seen.append(image.name) or decode(data, image, *size)
    )
    monkeypatch.setattr(suitability, "SAMPLE", 3)
    whole, _ = load_training_data(tiny.config(coco))
    suitability.check_training_data(whole, whole, 1, 1)
    assert [name[-5:] for name in seen] == ["0.jpg", "2.jpg", "5.jpg"]

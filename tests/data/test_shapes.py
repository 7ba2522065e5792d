"""The drawn data set of the demo."""

import json

import pytest

from hpr_jax.data.shapes import make_shapes

SPLITS = ("train2017", "val2017")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        make_shapes(folder / name, 3, 3, 64, seed)
    return folder


def pictures(folder, split):
    return [path.read_bytes() for path in sorted((folder / split).iterdir())]


def test_all_pictures_differ(drawn):
    """Also those of the two splits: what is evaluated was not trained on."""
    found = [data for split in SPLITS for data in pictures(drawn / "a", split)]
    assert len(set(found)) == 6


def test_the_seed_decides(drawn):
    for split in SPLITS:
        assert pictures(drawn / "a", split) == pictures(drawn / "again", split)
        assert not set(pictures(drawn / "a", split)) & set(pictures(drawn / "b", split))
        name = f"annotations/instances_{split}.json"
        assert (drawn / "a" / name).read_bytes() == (drawn / "again" / name).read_bytes()


def test_boxes_lie_in_their_images(drawn):
    for split in SPLITS:
        content = json.loads((drawn / f"a/annotations/instances_{split}.json").read_text())
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        assert all(max(size) == 64 for size in sizes.values())
        assert content["annotations"]
        for annotation in content["annotations"]:
            left, top, width, height = annotation["bbox"]
            assert min(left, top) >= 0
            assert min(width, height) > 0
            assert left + width <= sizes[annotation["image_id"]][0]
            assert top + height <= sizes[annotation["image_id"]][1]


def test_few_large_objects_can_be_asked_for(tmp_path):
    folder = make_shapes(tmp_path / "data", 8, 1, 64, 0, most=1, radii=(0.2, 0.25))
    content = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    assert [one["image_id"] for one in content["annotations"]] == list(range(1, 9))
    # A radius of 0.2 of the shorter side, 51 or 64 pixels: no shape is smaller than a triangle of that radius.
    assert all(max(one["bbox"][2:]) > 15 for one in content["annotations"])

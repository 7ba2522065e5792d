"""Folders of COCO annotations in other layouts than COCO's own: which files and images are found."""

import json
import shutil

import folders
import layouts
import pytest

from hpr_jax.data.build import load_dataset
from hpr_jax.errors import UserError


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return layouts.shapes(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def fingerprints(coco):
    return [dataset.fingerprint for dataset in layouts.load(coco)]


def lay_out(coco, target, **places):
    """Puts the images and annotations of the shapes elsewhere."""
    for split in layouts.SPLITS:
        images, annotations = places[split]
        shutil.copytree(coco / f"{split}2017", target / images, dirs_exist_ok=True)
        (target / annotations).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(coco / f"annotations/instances_{split}2017.json", target / annotations)
    return target


LAYOUTS = {
    "Roboflow": (("train", "train/_annotations.coco.json"), ("valid", "valid/_annotations.coco.json")),
    "Roboflow without valid": (("train", "train/_annotations.coco.json"), ("test", "test/_annotations.coco.json")),
    "folders of images": (("images/train", "annotations/train.json"), ("images/val", "annotations/val.json")),
    "files beside folders": (("train", "train.json"), ("val", "val.json")),
    "files beside images/": (("images/train", "train.json"), ("images/valid", "valid.json")),
    "Ultralytics' COCO": (
        ("images/train2017", "annotations/instances_train2017.json"),
        ("images/val2017", "annotations/instances_val2017.json"),
    ),
    "COCO 2014": (
        ("train2014", "annotations/instances_train2014.json"),
        ("val2014", "annotations/instances_val2014.json"),
    ),
    "FiftyOne": (("train/data", "train/labels.json"), ("validation/data", "validation/labels.json")),
    "folders with images/": (("train/images", "train/annotations/x.json"), ("val/images", "val/annotations/x.json")),
    "words": (("images/training", "my_training-coco.json"), ("images/testing", "my_testing-coco.json")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(coco, fingerprints, layout, tmp_path):
    """All images are those of the annotations, though both splits have images of the same names."""
    train, val = LAYOUTS[layout]
    target = lay_out(coco, tmp_path / "data", train=train, val=val)
    for dataset, known, (images, _), split in zip(layouts.load(target), fingerprints, (train, val), layouts.SPLITS):
        assert dataset.fingerprint == known
        for record in dataset.records:
            assert record.image.path.parent == target / images
            assert record.image.read() == (coco / f"{split}2017" / record.image.path.name).read_bytes()


def test_images_in_one_folder(coco, tmp_path):
    for split in layouts.SPLITS:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        content = layouts.content(coco, split)
        for image in content["images"]:
            name = f"{split}_{image['file_name']}"
            shutil.copy(coco / f"{split}2017" / image["file_name"], folder / name)
            image["file_name"] = name
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    for dataset in layouts.load(tmp_path):
        assert all(record.image.read() for record in dataset.records)


@pytest.fixture
def single(coco, tmp_path):
    """One file with all images."""
    shutil.copytree(coco / "train2017", tmp_path / "images")
    shutil.copy(coco / "annotations/instances_train2017.json", tmp_path / "annotations.json")
    return tmp_path


class TestSingleFiles:
    def test_is_divided(self, coco, single):
        whole, parts = layouts.load(coco)[0], layouts.load(single, val_fraction=0.5)
        of_name = {record.image.path.name: record for record in whole.records}
        names = [record.image.path.name for dataset in parts for record in dataset.records]
        assert sorted(names) == sorted(of_name)
        for dataset in parts:
            assert dataset.classes == whole.classes
            for record in dataset.records:
                known = of_name[record.image.path.name]
                assert record.image_id == known.image_id
                assert record.boxes.tolist() == known.boxes.tolist()
        assert parts[0].origin == "COCO, split by config.data.val_fraction=0.5"
        assert [dataset.name for dataset in parts] == [
            f"{single}/annotations.json ({part} part)" for part in ("training", "validation")
        ]
        assert sum(len(dataset.truth.images) for dataset in parts) == len(whole.truth.images)

    def test_the_order_in_the_file_does_not_matter(self, single):
        before = [sorted(dataset.records.images.names) for dataset in layouts.load(single)]
        path = single / "annotations.json"
        content = json.loads(path.read_text())
        content["images"].reverse()
        path.write_text(json.dumps(content))
        assert [sorted(dataset.records.images.names) for dataset in layouts.load(single)] == before

    def test_roboflow_with_one_split(self, coco, tmp_path):
        target = layouts.to_roboflow_coco(coco, tmp_path / "data")
        shutil.rmtree(target / "valid")
        assert [len(dataset) for dataset in layouts.load(target)] in ([5, 1], [4, 2])

    def test_faults_of_either_part_are_told(self, single):
        path = single / "annotations.json"
        content = json.loads(path.read_text())
        content["annotations"][0]["image_id"] = 99
        path.write_text(json.dumps(content))
        for split in layouts.SPLITS:
            with pytest.raises(UserError, match="belongs to image 99, which is not listed"):
                load_dataset(folders.settings(single), split)


class TestWhatIsWrong:
    def test_images_that_are_nowhere(self, coco, tmp_path):
        (tmp_path / "pictures").mkdir()
        shutil.copy(coco / "annotations/instances_train2017.json", tmp_path / "train.json")
        with pytest.raises(
            UserError, match=r"The images of .*/train.json, like '000001.jpg', are in none of the folders '.*; set"
        ):
            load_dataset(folders.settings(tmp_path), "train")

    def test_names_that_lead_out(self, coco, single):
        path = single / "annotations.json"
        content = json.loads(path.read_text())
        for image in content["images"][1:]:
            image["file_name"] = f"../../../{image['file_name']}"
        path.write_text(json.dumps(content))
        for split in layouts.SPLITS:
            with pytest.raises(UserError, match=r"has the file_name '../../../.*.jpg', which leads out of the folder"):
                load_dataset(folders.settings(single), split)

    def test_two_files_for_a_split(self, coco, tmp_path):
        target = layouts.to_roboflow_coco(coco, tmp_path / "data")
        shutil.copy(target / "train/_annotations.coco.json", target / "train.json")
        with pytest.raises(
            UserError, match=r"has 2 annotation files for train, 'train.json', 'train/_annotations.coco.json'; set"
        ):
            layouts.load(target)

    def test_two_files_of_no_split(self, single):
        shutil.copy(single / "annotations.json", single / "more.json")
        with pytest.raises(UserError, match=r"has 2 annotation files of no split, 'annotations.json', 'more.json'; set"):
            layouts.load(single)

    def test_others_of_coco_are_left_aside(self, coco, tmp_path, fingerprints):
        """Captions, keypoints, and JSON that is something else."""
        target = tmp_path / "data"
        lay_out(coco, target, train=LAYOUTS["COCO 2014"][0], val=LAYOUTS["COCO 2014"][1])
        for split in layouts.SPLITS:
            shutil.copy(
                target / f"annotations/instances_{split}2014.json", target / f"annotations/person_keypoints_{split}2014.json"
            )
            (target / f"annotations/captions_{split}2014.json").write_text('{"images": [], "annotations": []}')
        (target / "train.json").write_text("[1]")
        assert [dataset.fingerprint for dataset in layouts.load(target)] == fingerprints

    def test_folders_of_many_files_are_of_another_format(self, coco, tmp_path):
        target = layouts.to_roboflow_coco(coco, tmp_path / "data")
        for number in range(30):
            shutil.copy(target / "train/_annotations.coco.json", target / f"train/{number}.json")
        assert load_dataset(folders.settings(target), "val").origin == "COCO as Roboflow exports it"
        with pytest.raises(UserError, match="has no training split"):
            load_dataset(folders.settings(target), "train")

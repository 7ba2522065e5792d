"""TFDS directories: directories that users made, wrong ones, and those that `make_tfds` writes."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tiny
from folders import settings, write_folder

from hpr_jax.data.build import load_dataset, make_views
from hpr_jax.data.dataset import Classes
from hpr_jax.data.images import UnreadableImageError, read_annotated_image
from hpr_jax.data.sources.tfds_writer import make_tfds
from hpr_jax.errors import UserError
from hpr_jax.evaluation.average_precision import coco_average_precision

RNG = np.random.default_rng(0)


def build(directory, features, examples, splits=("train", "validation")):
    """Makes a TFDS directory as users do."""
    import tensorflow_datasets as tfds

    class Own(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "own"
        VERSION = tfds.core.Version("2.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features(tfds)))

        def _split_generators(self, dl_manager):
            return {split: iter(enumerate(examples)) for split in splits}

        def _generate_examples(self):
            return ()

    Own(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory / "own/2.0.0"


def plain_features(tfds, **more):
    objects = {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=["pen", "cup", "hat"])}
    return {"image": tfds.features.Image(), "objects": tfds.features.Sequence({**objects, **more})}


@pytest.fixture
def picture(tmp_path):
    """An image that is stored 48 pixels wide and 40 high, with an EXIF orientation that is wrong."""
    path = tmp_path / "x.jpg"
    tiny.write_turned(path, RNG.integers(0, 255, (40, 48, 3)).astype(np.uint8), 3)
    return path


class TestOwnDirectories:
    def test_all_that_tfds_knows(self, picture, tmp_path):
        def features(tfds):
            more = {"is_crowd": np.bool_, "area": np.int64, "id": np.int64}
            return {**plain_features(tfds, **more), "image/id": np.int64, "image/filename": tfds.features.Text()}

        cup = {"bbox": np.array([0.25, 0.5, 0.75, 1.0]), "label": 1, "is_crowd": False, "area": 77, "id": 0}
        crowd = {"bbox": np.array([0.0, 0.0, 0.5, 0.5]), "label": 0, "is_crowd": True, "area": 99, "id": 0}
        examples = [{"image": str(picture), "objects": [cup, crowd], "image/id": 70, "image/filename": "seventy.jpg"}]
        directory = build(tmp_path / "tfds", features, examples)
        dataset = load_dataset(settings(directory), "train", masks=True)
        assert dataset.classes.names == ("pen", "cup", "hat")
        assert dataset.classes.category_ids == (0, 1, 2)
        (record,) = dataset.records
        assert (record.image_id, record.height, record.width) == (70, 40, 48)
        assert record.boxes.tolist() == [[24, 10, 48, 30]]
        assert record.labels.tolist() == [1]
        assert "seventy.jpg" in record.image.name
        # As stored: the boxes refer to what TensorFlow decodes.
        stored = cv2.imread(str(picture), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        assert stored is not None
        np.testing.assert_array_equal(read_annotated_image(record.image, 40, 48), stored)
        assert dataset.count_masks() == (0, 1)
        truth = dataset.truth
        assert truth is not None
        assert truth.crowd.tolist() == [False, True]
        assert truth.areas.tolist() == [77, 99]
        assert truth.labels.tolist() == [1, 0]
        found = [{"image_id": 70, "category_id": 1, "bbox": [24, 10, 24, 20], "score": 0.5}]
        assert coco_average_precision(dataset, found)[0]["AP"] == pytest.approx(1.0)

    def test_the_least_that_is_wanted(self, picture, tmp_path, caplog):
        pen = {"bbox": np.array([0.0, 0.0, 0.5, 0.5]), "label": 0}
        examples = [{"image": str(picture), "objects": [pen] * count} for count in (2, 0, 1)]
        config = tiny.config(build(tmp_path / "tfds", plain_features, examples))
        config.augmentation.kind = "lsj"
        dataset = load_dataset(config.data, "val", masks=True)
        assert sorted(dataset.records.counts.tolist()) == [0, 1, 2]
        assert sorted(record.image_id for record in dataset.records) == [1, 2, 3]
        make_views(config, dataset)
        assert "has no masks: nothing is copied and pasted" in caplog.text

    def test_ids_of_a_model_that_knows_the_names(self, picture, folder, tmp_path):
        hat = {"bbox": np.array([0.0, 0.0, 0.5, 0.5]), "label": 2}
        directory = build(tmp_path / "tfds", plain_features, [{"image": str(picture), "objects": [hat]}])
        classes = load_dataset(settings(folder), "train").classes
        dataset = load_dataset(settings(directory), "val", classes)
        assert dataset.classes == classes
        assert dataset.records[0].labels.tolist() == [2]

    def test_parts_of_splits(self, picture, tmp_path):
        examples = [{"image": str(picture), "objects": []}] * 10
        directory = build(tmp_path / "tfds", plain_features, examples, splits=["train"])
        data = settings(directory, train_split="train[:70%]", val_split="train[70%:]")
        assert [len(load_dataset(data, split)) for split in ("train", "val")] == [7, 3]
        with pytest.raises(UserError, match=r"no split 'validation'; it has train. Set config.data.train_split"):
            load_dataset(settings(directory), "val")

    @pytest.mark.parametrize("missing", ["image", "objects", "bbox", "label"])
    def test_other_features_are_answered(self, picture, tmp_path, missing):
        def features(tfds):
            found = plain_features(tfds, other=np.int64)
            inner = {key: value for key, value in found.pop("objects").feature.items() if key != missing}
            return {"objects": tfds.features.Sequence(inner), **found, "number": np.int64} if missing != "objects" else found

        found = features(pytest.importorskip("tensorflow_datasets"))
        inner = {"bbox": np.zeros(4), "label": 0, "other": 1}
        values = {"objects": [{k: v for k, v in inner.items() if k != missing}], "image": str(picture), "number": 1}
        if missing == "image":
            del found["image"]
        directory = build(
            tmp_path / "tfds",
            lambda tfds: {k: v for k, v in features(tfds).items() if k != missing},
            [{key: values[key] for key in found}],
        )
        with pytest.raises(UserError, match=r"has the features .*; detection wants image \(Image\) and objects"):
            load_dataset(settings(directory), "train")

    def test_boxes_of_another_form(self, picture, tmp_path):
        def features(tfds):
            found = plain_features(tfds)
            label = found["objects"].feature["label"]
            bbox = tfds.features.BBoxFeature(bbox_format="XYXY")
            return {**found, "objects": tfds.features.Sequence({"bbox": bbox, "label": label})}

        directory = build(tmp_path / "tfds", features, [{"image": str(picture), "objects": []}])
        with pytest.raises(UserError, match="are XYXY; detection wants"):
            load_dataset(settings(directory), "train")

    def test_an_object_without_a_class(self, picture, tmp_path):
        """TFDS has the label -1 for it."""
        objects = [{"bbox": np.array([0.0, 0.0, 0.5, 0.5]), "label": -1}]
        directory = build(tmp_path / "tfds", plain_features, [{"image": str(picture), "objects": objects}])
        with pytest.raises(UserError, match="has an object with the label -1, and there are 3 classes"):
            load_dataset(settings(directory), "train")

    @pytest.mark.parametrize("error", [None, ValueError, SyntaxError, ZeroDivisionError])
    def test_images_that_cannot_be_read(self, tmp_path, monkeypatch, error):
        """Pillow raises errors of many types for damaged headers."""

        def open_image(file):
            raise error("broken")

        if error:
            monkeypatch.setattr("hpr_jax.data.sources.tfds.Image.open", open_image)
        (tmp_path / "x.jpg").write_bytes(b"broken")
        pen = {"bbox": np.array([0.0, 0.0, 0.5, 0.5]), "label": 0}
        directory = build(tmp_path / "tfds", plain_features, [{"image": str(tmp_path / "x.jpg"), "objects": [pen]}])
        dataset = load_dataset(settings(directory), "val")
        (record,) = dataset.records
        with pytest.raises(UnreadableImageError, match="record 0 of"):
            read_annotated_image(record.image, record.height, record.width)


class TestWrongDirectories:
    @pytest.fixture
    def copied(self, folder, tmp_path):
        return make_tfds(settings(folder), tmp_path / "tfds")

    def test_other_file_formats(self, copied):
        info = copied / "dataset_info.json"
        info.write_text(info.read_text().replace("array_record", "tfrecord"))
        with pytest.raises(UserError, match=r"is in tfrecord files.*tfds convert_format .*--out_file_format=array_record"):
            load_dataset(settings(copied), "train")

    def test_damaged_files(self, copied):
        (copied / "features.json").unlink()
        with pytest.raises(UserError, match="cannot be read"):
            load_dataset(settings(copied), "train")

    @pytest.mark.parametrize("damage", ["unlink", "truncate"])
    def test_damaged_records(self, copied, damage):
        (file,) = copied.glob("*train*")
        file.unlink() if damage == "unlink" else file.write_bytes(file.read_bytes()[:100_000])
        with pytest.raises(UserError, match=r"Record 0 of split 'train' .* cannot be read"):
            load_dataset(settings(copied), "train")

    def test_above_the_version(self, copied):
        for directory in (copied.parent, copied.parent.parent):
            with pytest.raises(UserError, match=rf"set --config.data.directory={copied}\."):
                load_dataset(settings(directory), "train")

    def test_beside_a_coco_folder(self, tmp_path):
        directory = tiny.write_coco(tmp_path / "data")
        make_tfds(settings(directory), directory / "tfds")
        assert len(load_dataset(settings(directory), "train")) == 6

    def test_other_classes(self, copied, folder):
        classes = load_dataset(settings(folder), "train").classes
        path = copied / "metadata.json"
        path.write_text(path.read_text().replace("cup", "mug"))
        with pytest.raises(UserError, match=r"not those that the model knows"):
            load_dataset(settings(copied), "val", classes)


@pytest.fixture(scope="module")
def reversed_categories(tmp_path_factory):
    """A folder whose files list the categories from the last to the first, and the TFDS directory made of it."""
    directory = write_folder(tmp_path_factory.mktemp("coco") / "data")
    for path in (directory / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["categories"].reverse()
        path.write_text(json.dumps(content))
    return directory, make_tfds(settings(directory), tmp_path_factory.mktemp("tfds"))


class TestMakeTfds:
    def test_classes_are_in_the_order_of_their_ids(self, reversed_categories, folder):
        expected = load_dataset(settings(folder), "train")
        for directory in reversed_categories:
            for split in ("train", "val"):
                dataset = load_dataset(settings(directory), split)
                assert dataset.classes.category_ids == (2, 5, 9)
                assert dataset.classes.names == ("cup", "pen", "hat")
            dataset = load_dataset(settings(directory), "train")
            labels = [record.labels.tolist() for record in dataset.records]
            assert labels == [record.labels.tolist() for record in expected.records]

    def test_others_read_the_same_by_tfds_features(self, reversed_categories):
        """Labels by name, boxes, crowds, areas, ids, and the pixels in RGB."""
        import tensorflow_datasets as tfds

        folder, directory = reversed_categories
        builder = tfds.builder_from_directory(directory)
        assert builder.info.features["objects"]["label"].names == ["cup", "pen", "hat"]
        content = json.loads((folder / "annotations/instances_train2017.json").read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        examples = list(builder.as_data_source(split="train"))
        for example, image in zip(examples, content["images"], strict=True):
            assert (example["image/id"], example["image/filename"]) == (image["id"], image["file_name"].encode())
            file = str(folder / "train2017" / image["file_name"])
            stored = cv2.imread(file, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
            assert stored is not None
            np.testing.assert_allclose(example["image"].astype(int), stored, atol=3)
            objects = example["objects"]
            mine = [a for a in content["annotations"] if a["image_id"] == image["id"] and a["bbox"][2] >= 1]
            assert [builder.info.features["objects"]["label"].names[label] for label in objects["label"]] == [
                names[a["category_id"]] for a in mine
            ]
            assert np.array(objects["is_crowd"], bool).tolist() == [bool(a["iscrowd"]) for a in mine]
            assert np.array(objects["id"], int).tolist() == [a["id"] for a in mine]
            np.testing.assert_allclose(objects["area"], [a["area"] for a in mine], rtol=1e-6)
            for (top, left, bottom, right), a in zip(objects["bbox"], mine):
                x, y, w, h = a["bbox"]
                expected = [max(x, 0), max(y, 0), min(x + w, 60), min(y + h, 48)]
                np.testing.assert_allclose([left * 60, top * 48, right * 60, bottom * 48], expected, rtol=1e-5, atol=1e-4)

    def test_plain_directories_give_ids_by_name(self, picture, tmp_path):
        """Names in an order of their own; the model's ids, or the numbers of the labels without a model."""
        objects = [{"bbox": np.array([0.0, 0.0, 0.5, 0.5]), "label": label} for label in (0, 1, 2)]
        directory = build(tmp_path / "tfds", plain_features, [{"image": str(picture), "objects": objects}])
        model = Classes(("hat", "cup", "pen"), (9, 2, 5))
        dataset = load_dataset(settings(directory), "val", model)
        # The directory's names are pen, cup, hat.
        assert dataset.records[0].labels.tolist() == [2, 1, 0]
        assert [model.category_ids[label] for label in dataset.records[0].labels] == [5, 2, 9]
        dataset = load_dataset(settings(directory), "val")
        assert dataset.classes == Classes(("pen", "cup", "hat"), (0, 1, 2))
        assert dataset.records[0].labels.tolist() == [0, 1, 2]

    def test_what_is_there_stays(self, folder, tfds_directory):
        with pytest.raises(UserError, match="exists; delete it"):
            make_tfds(settings(folder), tfds_directory.parent.parent)

    def test_other_categories_of_the_validation_split(self, tmp_path):
        directory = tiny.write_coco(tmp_path / "data")
        path = directory / "annotations/instances_val2017.json"
        content = json.loads(path.read_text())
        content["categories"][0]["name"] = "spoon"
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match="spoon"):
            make_tfds(settings(directory), tmp_path / "tfds")
        assert not (tmp_path / "tfds").exists()

    def test_missing_images(self, tmp_path):
        directory = tiny.write_coco(tmp_path / "data")
        (directory / "val2017/1.jpg").unlink()
        with pytest.raises(UserError, match=r"1 of 3 images of .* are missing, like .*1\.jpg"):
            make_tfds(settings(directory), tmp_path / "tfds")
        assert not (tmp_path / "tfds").exists()

    def test_nothing_is_left_of_a_stopped_conversion(self, folder, tmp_path, monkeypatch):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("hpr_jax.data.sources.tfds_writer.clip_box", stop)
        with pytest.raises(KeyboardInterrupt):
            make_tfds(settings(folder), tmp_path / "tfds")
        assert not list((tmp_path / "tfds").iterdir())

    def test_many_files(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr("hpr_jax.data.sources.tfds_writer.SHARD", 3000)
        directory = make_tfds(settings(folder), tmp_path / "tfds")
        assert len(list(directory.glob("*train*"))) > 2
        expected = [record.image_id for record in load_dataset(settings(folder), "train").records]
        assert [record.image_id for record in load_dataset(settings(directory), "train").records] == expected

    def test_as_a_program(self, folder, tmp_path):
        command = [sys.executable, "-m", "hpr_jax.main", "make-tfds", "--config", f"{tiny.ROOT}/configs/ddq.py"]
        command += [f"--config.data.directory={folder}", tmp_path / "tfds"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        directory = tmp_path / "tfds/coco_folder/1.0.0"
        assert f"--config.data.directory={directory}" in done.stdout
        assert [path.name for path in (tmp_path / "tfds").iterdir()] == ["coco_folder"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("hpr_jax: ")
        assert done.stderr.count("\n") == 1

"""COCO folders and TFDS directories: the same data, the same batches, the same numbers."""

import hashlib
import json
import pickle
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tiny
from flax import nnx

from hpr_jax.data.batching import TrainLoader
from hpr_jax.data.dataset import Record, Records
from hpr_jax.data.sources import load_dataset
from hpr_jax.data.transforms import ImageFile, UnreadableImageError, read_annotated_image
from hpr_jax.errors import UserError
from hpr_jax.evaluate import Evaluator
from hpr_jax.make_tfds import make_tfds
from hpr_jax.metrics import coco_average_precision
from hpr_jax.recipe import make_plan, make_views, room_for_boxes

RNG = np.random.default_rng(0)


def settings(directory, **others):
    """The section `data` of a config."""
    data = tiny.config(directory).data
    data.update(others)
    return data


def write_folder(directory):
    """A tiny COCO folder with a turned image, a box that leaves its image, a mask of run lengths and one of two polygons."""
    tiny.write_coco(directory)
    turned = RNG.integers(0, 255, (60, 48, 3)).astype(np.uint8)
    tiny.write_turned(directory / "train2017/2.jpg", turned, 6)
    path = directory / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    first, second, third, *_ = content["annotations"]
    first.update(bbox=[-5.3, 0.1, 40, 20.7], area=123.4)
    second["segmentation"] = {"size": [48, 60], "counts": [500, 30, 48 * 60 - 530]}
    third["segmentation"] += [[1.1, 2.2, 3.3, 2.2, 3.3, 9.9]]
    path.write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture(scope="module")
def tfds_directory(folder, tmp_path_factory):
    return make_tfds(settings(folder), tmp_path_factory.mktemp("tfds"))


@pytest.fixture(params=["train", "val"])
def both(request, folder, tfds_directory):
    """A split from either source."""
    return [load_dataset(settings(directory), request.param, masks=True) for directory in (folder, tfds_directory)]


def same_masks(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert type(a) is type(b)
        if isinstance(a, dict):
            assert a == b
        elif a is not None:
            assert len(a) == len(b)
            assert all(np.array_equal(p, q) for p, q in zip(a, b))


class TestBothSources:
    def test_records(self, both):
        one, two = both
        assert one.classes == two.classes
        assert [str(problem) for problem in one.dropped] == [str(problem) for problem in two.dropped] != []
        assert len(one) == len(two)
        for a, b in zip(one.records, two.records):
            assert (a.image_id, a.height, a.width) == (b.image_id, b.height, b.width)
            assert a.image.read() == b.image.read()
            assert a.image.path.name in b.image.name
            np.testing.assert_array_equal(a.boxes, b.boxes)
            np.testing.assert_array_equal(a.labels, b.labels)
            same_masks(a.masks, b.masks)
            same_masks(a.crowds, b.crowds)
        assert len(one.records[0].crowds) == len(two.records[0].crowds) == 1

    def test_ground_truth(self, both):
        one, two = (dataset.ground_truth() for dataset in both)
        assert one["images"] == two["images"]
        assert one["categories"] == two["categories"]
        for annotation in one["annotations"]:
            del annotation["segmentation"]
        assert sorted(one["annotations"], key=lambda a: a["id"]) == sorted(two["annotations"], key=lambda a: a["id"])

    @pytest.mark.parametrize("evaluator", ["pycocotools", "auto"])
    def test_average_precision(self, both, evaluator):
        found = []
        for annotation in both[0].ground_truth()["annotations"]:
            box = (np.array(annotation["bbox"]) * RNG.uniform(0.9, 1.1, 4)).tolist()
            found.append({**annotation, "bbox": box, "score": float(RNG.random())})
        one, two = (coco_average_precision(dataset.ground_truth(), found, evaluator) for dataset in both)
        assert one == two
        assert 0.1 < one[0]["AP"] < 1

    @pytest.mark.parametrize("kind", ["detr", "lsj"])
    def test_batches(self, folder, tfds_directory, kind):
        batches = []
        for directory in (folder, tfds_directory):
            config = tiny.config(directory)
            config.augmentation.update(kind=kind, strong_views=True)
            config.augmentation.lsj.side = tiny.SIDE
            dataset = load_dataset(config.data, "train", masks=kind == "lsj")
            views = make_views(config, dataset)
            assert (views.draw_donor is not None) == (kind == "lsj")
            loader = TrainLoader(make_plan(config, dataset), views, room_for_boxes(config, dataset, views))
            batches.append([loader[step] for step in range(9)])
        for one, two in zip(*batches):
            for name in ("images", "sizes", "boxes", "labels", "valid"):
                np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        assert any(batch.valid.any() for batch in batches[0])

    def test_evaluation(self, folder, tfds_directory):
        graph, state = nnx.split(tiny.detector())
        results = []
        for directory in (folder, tfds_directory):
            config = tiny.config(directory)
            results.append(Evaluator(config, load_dataset(config.data, "val"), graph).run(state))
        assert results[0] == results[1]
        assert len(results[0].detections) == 30

    def test_fingerprints(self, folder, tfds_directory, tmp_path):
        other = write_folder(tmp_path / "data")
        path = other / "annotations/instances_train2017.json"
        path.write_text(path.read_text().replace("123.4", "123.5"))
        changed = make_tfds(settings(other), tmp_path / "tfds")
        again = make_tfds(settings(folder), tmp_path / "again")
        prints = [load_dataset(settings(d), "train").fingerprint for d in (folder, other, tfds_directory, changed)]
        assert len(set(prints)) == 4
        assert all(len(bytes.fromhex(text)) == 32 for text in prints)
        assert load_dataset(settings(again), "train", masks=True).fingerprint == prints[2]

    def test_subset(self, both):
        for dataset in both:
            kept = dataset.subset(keep_empty=False, min_side=1)
            assert len(kept) == len(dataset) - 1
            assert [record.image_id for record in kept.records] == [r.image_id for r in dataset.records if len(r.boxes)]
            assert kept.count_masks() == dataset.count_masks()


def test_another_process_reads_records_without_tensorflow(tfds_directory, tmp_path):
    """Nor JAX: workers that load images have no use for it."""
    records = load_dataset(settings(tfds_directory), "train", masks=True).records
    records[0].image.read()
    assert len(pickle.dumps(records[0].image)) < 500
    (tmp_path / "records").write_bytes(pickle.dumps(records))
    code = (
        "import pickle, sys, hashlib; records = pickle.load(open(sys.argv[1], 'rb'));"
        "print(hashlib.sha256(b''.join(r.image.read() for r in records)).hexdigest(), 'tensorflow' in sys.modules, 'jax' in "
        "sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "records"], capture_output=True, text=True, check=True)
    expected = hashlib.sha256(b"".join(record.image.read() for record in records)).hexdigest()
    assert done.stdout.split() == [expected, "False", "False"]


def test_nothing_imports_tensorflow(folder, tmp_path):
    code = (
        "import sys; from pathlib import Path; import test_sources as t; from hpr_jax.data.sources import load_dataset;"
        "d = t.make_tfds(t.settings(sys.argv[1]), Path(sys.argv[2])); x = load_dataset(t.settings(d), 'val', masks=True);"
        "x.records[0].image.read(); x.ground_truth();"
        "print('tensorflow_datasets' in sys.modules, 'tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-c", code, folder, tmp_path / "tfds"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tiny.ROOT / "tests")
    assert done.stdout.split() == ["True", "False"]


def test_packed_records_are_those_that_were_packed():
    masks = ((np.ones((3, 2), np.float32), np.full((4, 2), 2, np.float32)), None, {"size": [9, 9], "counts": b"x"})
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
    boxes = np.arange(12, dtype=np.float32).reshape(3, 4)
    given = [
        Record(5, None, 9, 8, *none, (), (masks[2],)),
        Record(3, None, 7, 6, boxes, np.arange(3, dtype=np.int32), masks),
        Record(4, None, 7, 5, boxes[:1], np.ones(1, np.int32), (masks[0],), (masks[0], masks[2])),
    ]
    records = Records.pack(given, images=("a", "b", "c"), with_masks=True)
    for which in ([0, 1, 2], [2, 0], [1]):
        taken = pickle.loads(pickle.dumps(records.take(np.array(which))))
        assert taken.counts.tolist() == [len(given[index].boxes) for index in which]
        assert taken.count_masks() == sum(mask is not None for index in which for mask in given[index].masks)
        for record, index in zip(taken, which, strict=True):
            assert (record.image_id, record.height, record.width) == (
                given[index].image_id,
                given[index].height,
                given[index].width,
            )
            assert record.image == "abc"[index]
            np.testing.assert_array_equal(record.boxes, given[index].boxes)
            np.testing.assert_array_equal(record.labels, given[index].labels)
            same_masks(record.masks, given[index].masks)
            same_masks(record.crowds, given[index].crowds)


def build(directory, features, examples, splits=("train", "validation")):
    """A TFDS directory of a user's own, made in TFDS's own way."""
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


class TestOwnDirectories:
    @pytest.fixture
    def picture(self, tmp_path):
        """48 pixels wide and 40 high as stored, with a wrong word about its orientation."""
        path = tmp_path / "x.jpg"
        tiny.write_turned(path, RNG.integers(0, 255, (40, 48, 3)).astype(np.uint8), 3)
        return path

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
        stored = cv2.imread(str(picture), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)[..., ::-1]
        np.testing.assert_array_equal(read_annotated_image(record.image, 40, 48), stored)
        assert dataset.count_masks() == (0, 1)
        truth = dataset.ground_truth()
        assert [(a["iscrowd"], a["area"], a["category_id"]) for a in truth["annotations"]] == [(0, 77, 1), (1, 99, 0)]
        found = [{"image_id": 70, "category_id": 1, "bbox": [24, 10, 24, 20], "score": 0.5}]
        assert coco_average_precision(truth, found)[0]["AP"] == pytest.approx(1.0)

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
        assert dataset.ground_truth()["annotations"][0]["category_id"] == 9
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

    def test_images_that_cannot_be_read(self, tmp_path):
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


class TestMakeTfds:
    def test_what_is_there_stays(self, folder, tfds_directory):
        with pytest.raises(UserError, match="exists; delete it"):
            make_tfds(settings(folder), tfds_directory.parent.parent)

    def test_missing_images(self, tmp_path):
        directory = tiny.write_coco(tmp_path / "data")
        (directory / "val2017/1.jpg").unlink()
        with pytest.raises(UserError, match=r"1 of 3 images of .* are missing, like .*1\.jpg"):
            make_tfds(settings(directory), tmp_path / "tfds")
        assert not (tmp_path / "tfds").exists()

    def test_nothing_is_left_of_a_stopped_conversion(self, folder, tmp_path, monkeypatch):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("hpr_jax.make_tfds.clip_box", stop)
        with pytest.raises(KeyboardInterrupt):
            make_tfds(settings(folder), tmp_path / "tfds")
        assert not list((tmp_path / "tfds").iterdir())

    def test_many_files(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr("hpr_jax.make_tfds.SHARD", 3000)
        directory = make_tfds(settings(folder), tmp_path / "tfds")
        assert len(list(directory.glob("*train*"))) > 2
        expected = [record.image_id for record in load_dataset(settings(folder), "train").records]
        assert [record.image_id for record in load_dataset(settings(directory), "train").records] == expected

    def test_as_a_program(self, folder, tmp_path):
        command = [sys.executable, "-m", "hpr_jax.make_tfds", "--config", f"{tiny.ROOT}/configs/ddq.py"]
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


def test_files_of_a_folder_say_what_is_wrong(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"x\.jpg: No such file"):
        ImageFile(tmp_path / "x.jpg").read()

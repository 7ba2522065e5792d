"""COCO folders and TFDS directories give the same data, batches and numbers; a further format takes one line."""

import dataclasses
import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from flax import nnx
from folders import settings, write_folder

from hpr_jax.data import build
from hpr_jax.data.build import Format, load_dataset, make_plan, make_views, room_for_boxes
from hpr_jax.data.dataset import Classes, Dataset, ImageAnnotations, Records
from hpr_jax.data.images import ImageFile, UnreadableImageError
from hpr_jax.data.loading.batches import TrainLoader
from hpr_jax.data.sources.tfds_writer import make_tfds
from hpr_jax.evaluation.average_precision import coco_average_precision
from hpr_jax.evaluation.evaluator import Evaluator

RNG = np.random.default_rng(0)


@pytest.fixture(params=["train", "val"])
def both(request, folder, tfds_directory):
    """A split as the COCO folder and as the TFDS directory have it."""
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
        assert list(map(str, one.dropped_boxes)) == list(map(str, two.dropped_boxes)) != []
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
        one, two = (dataclasses.asdict(dataset.truth) for dataset in both)
        assert one.keys() == two.keys()
        for name, values in one.items():
            np.testing.assert_array_equal(values, two[name], err_msg=name)
        assert len(one["boxes"]) > 4
        assert one["crowd"].sum() == 1

    @pytest.mark.parametrize("evaluator", ["pycocotools", "auto"])
    def test_average_precision(self, both, evaluator):
        found, truth = [], both[0].truth
        for image, label, box in zip(truth.images, truth.labels, truth.boxes):
            ids = {"image_id": both[0].records.image_ids[image], "category_id": both[0].classes.category_ids[label]}
            found.append({**ids, "bbox": (box * RNG.uniform(0.9, 1.1, 4)).tolist(), "score": float(RNG.random())})
        one, two = (coco_average_precision(dataset, found, evaluator) for dataset in both)
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
            subset = dataset.subset(keep_empty=False, min_side=1)
            assert len(subset) == len(dataset) - 1
            assert [record.image_id for record in subset.records] == [r.image_id for r in dataset.records if len(r.boxes)]
            assert subset.count_masks() == dataset.count_masks()


def test_another_process_reads_records_without_tensorflow(tfds_directory, tmp_path):
    """It does not import JAX either: worker processes do without both."""
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
        "import sys; from pathlib import Path; from folders import settings; from hpr_jax.data.build import load_dataset;"
        "from hpr_jax.data.sources.tfds_writer import make_tfds;"
        "d = make_tfds(settings(sys.argv[1]), Path(sys.argv[2])); x = load_dataset(settings(d), 'val', masks=True);"
        "x.records[0].image.read();"
        "print('tensorflow_datasets' in sys.modules, 'tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-c", code, folder, tmp_path / "tfds"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tiny.ROOT / "tests/helpers")
    assert done.stdout.split() == ["True", "False"]


def test_packed_records_are_those_that_were_packed():
    masks = ((np.ones((3, 2), np.float32), np.full((4, 2), 2, np.float32)), None, {"size": [9, 9], "counts": b"x"})
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
    boxes = np.arange(12, dtype=np.float32).reshape(3, 4)
    given = [
        ImageAnnotations(5, 9, 8, *none, (), (masks[2],)),
        ImageAnnotations(3, 7, 6, boxes, np.arange(3, dtype=np.int32), masks),
        ImageAnnotations(4, 7, 5, boxes[:1], np.ones(1, np.int32), (masks[0],), (masks[0], masks[2])),
    ]
    images = [ImageFile(Path(name)) for name in "abc"]
    records = Records.pack(given, images, with_masks=True)
    for which in ([0, 1, 2], [2, 0], [1]):
        taken = pickle.loads(pickle.dumps(records.take(np.array(which))))
        assert taken.counts.tolist() == [len(given[index].boxes) for index in which]
        assert taken.count_masks() == sum(mask is not None for index in which for mask in given[index].masks)
        for record, index in zip(taken, which, strict=True):
            expected = given[index]
            assert (record.image_id, record.height, record.width) == (expected.image_id, expected.height, expected.width)
            assert record.image == images[index]
            np.testing.assert_array_equal(record.boxes, expected.boxes)
            np.testing.assert_array_equal(record.labels, expected.labels)
            same_masks(record.masks, expected.masks)
            same_masks(record.crowds, expected.crowds)


def test_a_format_is_added_by_one_line(coco, tmp_path, monkeypatch):
    def is_list(directory, images):
        return (directory / images / "list.txt").is_file()

    def load_list(directory, images, classes=None, *, masks=False):
        files = (directory / images / "list.txt").read_text().split()
        one = ImageAnnotations(1, 8, 9, np.ones((1, 4), np.float32), np.zeros(1, np.int32))
        records = Records.pack([one] * len(files), [ImageFile(directory / name) for name in files])
        return Dataset(images, "", classes or Classes(("cup",), (1,)), records, None)

    monkeypatch.setattr(build, "FORMATS", (*build.FORMATS, Format(is_list, load_list, ("images",))))
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017/list.txt").write_text("a.jpg b.jpg")
    dataset = load_dataset(settings(tmp_path), "val", Classes(("pen",), (5,)))
    assert (dataset.name, dataset.classes.names) == ("val2017", ("pen",))
    assert [record.image.name for record in dataset.records] == [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]
    # A directory of another format is read as before.
    assert len(load_dataset(settings(coco), "train")) == 6


def test_files_of_a_folder_say_what_is_wrong(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"x\.jpg: No such file"):
        ImageFile(tmp_path / "x.jpg").read()

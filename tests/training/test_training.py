"""Training, evaluating and predicting end to end at tiny size, and what stops a run."""

import json
import shutil
import time

import cv2
import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from workdirs import lines, weights

import hpr_jax
import hpr_jax.training.run as training
from hpr_jax.data.build import make_plan
from hpr_jax.errors import RunError, UserError
from hpr_jax.evaluation.evaluate import evaluate
from hpr_jax.evaluation.evaluator import Evaluator
from hpr_jax.inference.predict import predict
from hpr_jax.training.loop import TrainingLoop
from hpr_jax.training.run import train
from hpr_jax.weights.checkpoint import load_detector
from hpr_jax.weights.find_checkpoint import find_checkpoint


def test_a_run_leaves_everything_behind(trained):
    workdir, metrics = trained
    assert (workdir / "checkpoints/4/model").is_dir()
    assert (workdir / "best/4/model").is_dir()
    steps = [line["step"] for line in lines(workdir) if "loss" in line]
    assert steps == [1, 2, 4]
    logged = lines(workdir)[0]
    assert {"loss", "learning_rate", "images_per_second", "gradient_norm", "data_wait"} <= set(logged)
    assert sum(value for name, value in logged.items() if name.startswith("term/")) == pytest.approx(
        logged["loss"], rel=1e-4
    )
    assert 0 <= metrics["AP"] <= 1


def test_processes_share_an_evaluation(trained, coco, monkeypatch):
    detector, _ = load_detector(trained[0])
    config = tiny.config(coco)
    config.evaluate.batch_size = 1
    graph, state = nnx.split(detector)
    _, dataset = training.load_training_data(config)
    whole, shares = Evaluator(config, dataset, graph), []
    for number in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(jax, "process_index", lambda number=number: number)
            patched.setattr(jax, "process_count", lambda: 2)
            share = Evaluator(config, dataset, graph)
        share.detect = whole.detect
        shares.append(share.run(state).detections)
    assert [len(share) for share in shares] == [20, 10]
    expected = whole.run(state).detections
    assert sorted([*shares[0], *shares[1]], key=lambda one: one["image_id"]) == expected
    # The second process, when it hears from the first.
    monkeypatch.setattr("hpr_jax.evaluation.evaluator.gather", lambda found: [shares[0], found])
    assert share.run(state).detections == expected


class NoStep:
    """Takes the place of a training step: counts steps, and hands its batches to a function."""

    compilations = 0

    def __init__(self, see):
        self.see = see

    def __call__(self, state, batch, learning_rate):
        self.see(batch)
        numbers = {name: np.sum(count) for name, count in jax.device_get(batch.counts).items()}
        step = jax.device_put(np.int32(jax.device_get(state.step) + 1))
        return state.replace(step=step), {"loss": 0.0, "gradient_norm": 0.0, **numbers}


def with_strong_views(coco):
    """A config with large-scale jitter, pasted objects, weak and strong views."""
    config = tiny.config(coco)
    config.augmentation.update(kind="lsj", strong_views=True)
    config.augmentation.lsj.side = config.evaluate.canvas = tiny.SIDE
    return config


@pytest.mark.slow
def test_training_on_weak_and_strong_views(coco, tmp_path):
    config = with_strong_views(coco)
    config.train.steps = 2
    small = tiny.small()
    config.model, config.loss, config.train.initial_weights = small.model, small.loss, "random"
    # Batches of both kinds have the same shape, so that the step is compiled once.
    for config.augmentation.kind in ("lsj", "detr"):
        workdir = tmp_path / config.augmentation.kind
        metrics = train(config, workdir)
        assert 0 <= metrics["AP"] <= 1
        assert [line["step"] for line in lines(workdir) if "loss" in line] == [1, 2]


def test_a_resumed_run_sees_the_same_views(coco, tmp_path, monkeypatch):
    """Also, the log counts images and not views. Steps and evaluation are left out."""
    batches, images = [], []
    monkeypatch.setattr(training, "make_train_step", lambda *_: NoStep(lambda batch: batches.append(jax.device_get(batch))))
    monkeypatch.setattr(TrainingLoop, "evaluate", lambda *_: {"AP": 0.0})
    monkeypatch.setattr(TrainingLoop, "write_log", lambda self, step, numbers, interval, **_: images.append(interval.images))
    config = with_strong_views(coco)
    train(config, tmp_path / "whole")
    # First loaded by threads, then by worker processes.
    for config.train.steps, config.data.workers in ((2, 0), (4, 2)):
        train(config, tmp_path / "parts", accept_changes=True)
    assert len(batches) == 8
    for one, two in zip(batches[:4], batches[4:]):
        assert one.images.shape == (2, 2, 64, 64, 3)
        jax.tree.map(np.testing.assert_array_equal, one, two)
    assert not np.array_equal(batches[0].images, batches[3].images)
    # The log is written behind the steps 1, 2 and 4, each of two images; in parts behind 1 and 2, then 4.
    assert images == [2, 2, 4, 2, 2, 4]


def test_batches_are_fetched_while_steps_run_and_waiting_is_said_once(coco, tmp_path, monkeypatch, caplog):
    """Steps take no time here, and batches take some."""
    events = []

    class SlowBatches:
        def __init__(self, loader, start, stop, threads, workers):
            self.batches = (loader[step] for step in range(start, stop))

        def __next__(self):
            time.sleep(0.1)
            events.append("batch")
            return next(self.batches)

        def close(self):
            events.append("close")

    read_numbers = TrainingLoop.read_numbers

    def wait(*arguments):
        events.append("wait")
        read_numbers(*arguments)

    monkeypatch.setattr(TrainingLoop, "read_numbers", wait)
    monkeypatch.setattr(training, "train_batches", SlowBatches)
    monkeypatch.setattr(training, "make_train_step", lambda *_: NoStep(lambda batch: events.append("step")))
    monkeypatch.setattr(TrainingLoop, "evaluate", lambda *_: {"AP": 0.0})
    config = tiny.config(coco)
    config.train.update(steps=6, checkpoint_every=100)
    with caplog.at_level("WARNING", "hpr_jax"):
        train(config, tmp_path)
    assert lines(tmp_path)[1]["data_wait"] > 0.1
    (sentence,) = [message for message in caplog.messages if "waiting for data" in message]
    assert sentence.startswith("step 2: ")
    assert "raise config.data.workers (now 0" in sentence
    # A batch is fetched behind every step but the last. Then the numbers of the step before are waited for, and before the
    # log is written, behind the steps 1, 2, 4 and 6, those of the step itself.
    begin, logged, unlogged = ["batch"], ["step", "batch", "wait"], ["step", "batch", "step", "batch", "wait", "wait"]
    end = ["step", "batch", "step", "wait", "wait", "close"]
    assert events == begin + 2 * logged + unlogged + end


def test_evaluating_twice_is_equal(trained, tmp_path):
    workdir, metrics = trained
    first = evaluate(workdir, tmp_path / "a")
    second = evaluate(find_checkpoint(workdir), tmp_path / "b")
    assert first.detections == second.detections
    written = json.loads((tmp_path / "a/metrics.json").read_text())
    assert written["AP"] == metrics["AP"]
    assert set(written["per_class"]) == {"cup", "pen", "hat"}
    detections = json.loads((tmp_path / "b/detections.json").read_text())
    assert {d["category_id"] for d in detections} <= {2, 5, 9}
    assert {d["image_id"] for d in detections} == {7, 17, 27}
    assert detections == second.detections


def test_evaluating_on_other_classes_is_refused(trained, coco, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(coco, other)
    path = other / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="not those that the model knows"):
        evaluate(trained[0], tmp_path / "out", [("data.directory", str(other))])
    assert not (tmp_path / "out").exists()


def test_runs_on_nothing_are_refused_and_leave_nothing_behind(trained, coco, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(coco, other)
    path = other / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    for changes, sentence in (
        ({"annotations": []}, "no objects to evaluate on"),
        ({"annotations": [], "images": []}, "lists no images to evaluate on"),
    ):
        path.write_text(json.dumps({**content, **changes}))
        with pytest.raises(UserError, match=sentence):
            train(tiny.config(other), tmp_path / "run")
        with pytest.raises(UserError, match=sentence):
            evaluate(trained[0], tmp_path / "out", [("data.directory", str(other))])
    path.write_text(json.dumps(content))
    for image in (other / "val2017").iterdir():
        image.unlink()
    with pytest.raises(UserError, match=r"None of the 3 images of .* can be read, like: The folder .* is empty"):
        train(tiny.config(other), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_evaluating_another_model_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match=r"another model: config.model.hidden \(24 and 32\)"):
        evaluate(trained[0], tmp_path / "out", [("model.hidden", "32")])


def test_predict_writes_pictures_and_boxes_and_skips_broken_images(trained, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (100, 80, 3)).astype(np.uint8)
    cv2.imwrite(str(folder / "a.png"), picture)
    (folder / "b.jpg").write_bytes(b"broken")
    (folder / "notes.txt").write_text("no image")
    predict(trained[0], [folder, folder / "a.png"], tmp_path / "out", threshold=0.0)
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    assert content["skipped"] == [str(folder / "b.jpg")]
    assert [entry["picture"] for entry in content["images"]] == [
        str(tmp_path / "out/a.jpg"),
        str(tmp_path / "out/a_2.jpg"),
    ]
    entry = content["images"][0]
    assert (entry["width"], entry["height"]) == (80, 100)
    assert len(entry["detections"]) == 10
    same = hpr_jax.load(trained[0])(folder / "a.png", threshold=0.0)
    for found, box, score, category, name in zip(
        entry["detections"], same.boxes, same.scores, same.category_ids, same.names, strict=True
    ):
        assert found["box"] == pytest.approx(box, abs=0.006)
        assert found["score"] == pytest.approx(score, abs=6e-5)
        assert (found["category_id"], found["name"]) == (category, name)
    boxes = np.array([d["box"] for d in entry["detections"]])
    assert boxes.min() >= 0
    assert np.all(boxes <= [80, 100, 80, 100])
    drawn = cv2.imread(str(tmp_path / "out/a.jpg"))
    assert drawn is not None
    assert drawn.shape == (100, 80, 3)
    # Originals are never overwritten, even when pictures go to their folder.
    cv2.imwrite(str(folder / "c.jpg"), picture)
    before = (folder / "c.jpg").read_bytes()
    predict(trained[0], [folder / "c.jpg"], folder, threshold=0.0)
    assert (folder / "c.jpg").read_bytes() == before
    assert (folder / "c_2.jpg").is_file()
    for name in ("c.jpg", "c_2.jpg"):
        (folder / name).unlink()
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="None of the 2 files"):
        predict(trained[0], [folder], tmp_path / "none", threshold=0.5)
    assert not (tmp_path / "none").exists()


def test_three_lines_of_python(trained, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (48, 60, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), image[..., ::-1])
    detector = hpr_jax.load(trained[0])
    result = detector(image, threshold=0.0)
    assert len(result) == 10
    assert result.draw().shape == image.shape
    assert set(result.names) <= {"cup", "pen", "hat"}
    from_list = detector([image, tmp_path / "x.png", str(tmp_path / "x.png")], threshold=0.0)
    for other in from_list:
        np.testing.assert_array_equal(other.boxes, result.boxes)
    assert len(result.above(2.0)) == 0
    assert result.above(2.0).draw().shape == image.shape
    outputs = detector.outputs(image)
    stages = outputs.intermediates
    assert stages.memory.shape[0] == 1
    assert stages.reference_boxes.shape == (3, 1, 8, 4)
    assert stages.branch_hidden.shape[:2] == (2, 2)
    assert set(outputs.branches) == {"regional_attention", "dynamic_conv"}
    with pytest.raises(UserError, match="array of uint8 or uint16"):
        detector(image.astype(np.float32))
    with pytest.raises(UserError, match="missing"):
        detector(tmp_path / "missing.png")


def test_a_detector_from_a_config():
    detector = hpr_jax.load(f"{tiny.ROOT}/configs/ddq.py:demo", class_names=("a", "b"), overrides={"evaluate.detections": 3})
    assert detector.classes.names == ("a", "b")
    assert detector.config.evaluate.detections == 3
    with pytest.raises(UserError, match=r"did you mean config.evaluate.detections"):
        hpr_jax.load(f"{tiny.ROOT}/configs/ddq.py:demo", overrides={"evaluate.detection": 3})


@pytest.mark.slow
def test_swin_trains_by_epochs_and_evaluates_on_a_canvas(coco, tmp_path):
    """Swin has drop path. The checkpoint of a run that counts epochs can be evaluated, also on canvases."""
    config = tiny.config(coco, model="deformable_detr")
    config.model.refiner.auxiliaries = ()
    config.model.backbone = {"kind": "swin", "embed_channels": 8, "depths": (2, 2), "heads": (1, 2), "window": 4}
    config.model.backbone.update(drop_path=0.5, frozen_stages=-1)
    config.compute.remat = ("backbone", "encoder", "refiner")
    config.train.update(steps=0, epochs=1, evaluate_every=1, initial_weights="random")
    config.optimizer.milestones = (1,)
    metrics = train(config, tmp_path)
    assert [line["step"] for line in lines(tmp_path) if "val/AP" in line] == [3]
    assert evaluate(tmp_path, tmp_path / "same").metrics["AP"] == metrics["AP"]
    result = evaluate(tmp_path, tmp_path / "canvas", [("evaluate.canvas", "96"), ("evaluate.buckets", "3")])
    # Images of 60x48 pixels become 64x51 of a canvas of 96x96: boxes further to the right were found on the grey.
    corners = np.array([found["bbox"] for found in result.detections])
    assert np.all(corners[:, :2] + corners[:, 2:] <= [96 * 60 / 64 + 0.1, 96 * 48 / 51 + 0.1])
    assert np.max(corners[:, 0] + corners[:, 2]) > 60


def test_a_loss_that_is_not_finite_stops_the_run(coco, tmp_path):
    config = tiny.config(coco)
    config.train.steps = 2
    train(config, tmp_path)
    before = weights(tmp_path / "checkpoints")
    config.train.steps = 4
    config.optimizer.learning_rate = 1e30
    with pytest.raises(RunError, match=r"not finite at step 4: .*loss.*The checkpoint of step 2 is kept"):
        train(config, tmp_path, accept_changes=True)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")) == ["2"]
    assert all(np.array_equal(before[name], value) for name, value in weights(tmp_path / "checkpoints").items())


def test_too_few_images(coco):
    from hpr_jax.data.sources.coco import load_coco

    config = tiny.config(coco)
    config.train.batch_size = 7
    dataset = load_coco(coco, "train2017", "annotations/instances_train2017.json")
    with pytest.raises(UserError, match="6 images to train on, fewer than"):
        make_plan(config, dataset)


def test_checkpoints_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        load_detector(tmp_path)
    for item in ("model", "meta"):
        (tmp_path / "checkpoints/5" / item).mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoints/5 is damaged: meta/metadata is missing"):
        load_detector(tmp_path)

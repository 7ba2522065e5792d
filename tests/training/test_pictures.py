"""The pictures that a run leaves: which there are, what they show, and that the run is the same without them."""

import io
import json

import numpy as np
import pictures
import pytest
import tiny
import workdirs
from flax import nnx
from PIL import Image
from scripted_run import script

from hpr_jax.inference.sheets import draw_batch, draw_pair
from hpr_jax.training import curves
from hpr_jax.training import pictures as drawn
from hpr_jax.training.merges import merge_sizes
from hpr_jax.training.metric_reader import Metrics, read_metrics
from hpr_jax.training.run import train

CURVES = ("losses", "schedule", "precision")
FILES = ("first_batch.jpg", "labels.png", "predictions.jpg", *(f"{name}.png" for name in CURVES))


@pytest.fixture
def scripted(monkeypatch):
    return script(monkeypatch)


def settings(coco, **others):
    config = tiny.config(coco)
    config.train.update(steps=4, log_every=1, evaluate_every=2, plots=True, **others)
    return config


def images(workdir):
    """Step, name, and (width, height) of each image in TensorBoard's files."""
    return [(event.step, value.tag, value.image) for event, value in workdirs.values(workdir) if value.HasField("image")]


class TestFiles:
    def test_are_pictures_of_their_sizes(self, scripted, coco, tmp_path):
        train(settings(coco), tmp_path)
        assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(FILES)
        sizes = {}
        for name in FILES:
            with Image.open(tmp_path / "plots" / name) as image:
                image.load()
                sizes[name] = image.size
        assert sizes["schedule.png"] == sizes["precision.png"] == (1100, 352)
        assert sizes["losses.png"][0] == 1100
        # Two validation images have objects, and each is drawn twice: 400 x 320 pixels, a title, and a border.
        assert sizes["predictions.jpg"] == (4 * 408, 24 + 320 + 8)

    def test_go_to_tensorboard(self, scripted, coco, tmp_path):
        train(settings(coco), tmp_path)
        found = images(tmp_path)
        at_evaluations = [f"plots/{name}" for name in (*CURVES, "predictions")]
        assert [name for step, name, _ in found if step == 0] == ["plots/labels", "plots/first_batch"]
        assert [name for step, name, _ in found if step == 2] == at_evaluations
        assert [name for step, name, _ in found if step == 4] == at_evaluations
        for _, name, image in found:
            with Image.open(io.BytesIO(image.encoded_image_string)) as picture:
                assert picture.size == (image.width, image.height), name

    def test_the_first_batch_is_that_of_the_first_step(self, scripted, coco, tmp_path):
        train(settings(coco), tmp_path)
        before = (tmp_path / "plots/first_batch.jpg").read_bytes()
        config = settings(coco)
        config.train.steps = 6
        train(config, tmp_path, accept_changes=True)
        assert (tmp_path / "plots/first_batch.jpg").read_bytes() == before

    def test_there_are_none_if_they_are_switched_off(self, scripted, coco, tmp_path):
        config = settings(coco)
        config.train.plots = False
        train(config, tmp_path)
        assert not (tmp_path / "plots").exists()
        assert not images(tmp_path)

    def test_other_processes_draw_none(self, coco, tmp_path):
        made = drawn.RunPictures(None, None, {})
        made.draw_data(None)
        made.draw_evaluation(2, [])
        assert not list(tmp_path.iterdir())


class TestFailures:
    @pytest.mark.parametrize(
        "error", [RuntimeError("no ink"), ImportError("no matplotlib"), MemoryError(), OSError(28, "full")]
    )
    def test_are_one_warning(self, scripted, coco, tmp_path, monkeypatch, caplog, error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(curves, "draw_figure", fail)
        monkeypatch.setattr(drawn, "encode_image", fail)
        assert train(settings(coco), tmp_path)["AP"] == 0.5
        (sentence,) = [message for message in caplog.messages if "cannot be drawn" in message]
        assert sentence.startswith(f"plots/labels.png cannot be drawn ({type(error).__name__}: ")
        assert "--config.train.plots=False" in sentence
        assert not list(tmp_path.glob("plots/*"))

    def test_of_one_picture_leave_the_others(self, scripted, coco, tmp_path, monkeypatch, caplog):
        def unreadable(*_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(drawn, "read_annotated_image", unreadable)
        train(settings(coco), tmp_path)
        assert len([message for message in caplog.messages if "cannot be drawn" in message]) == 1
        assert {path.name for path in (tmp_path / "plots").iterdir()} == set(FILES) - {"predictions.jpg"}

    def test_a_folder_in_the_way(self, scripted, coco, tmp_path, caplog):
        (tmp_path / "plots").write_text("")
        train(settings(coco), tmp_path)
        assert len([message for message in caplog.messages if "cannot be drawn" in message]) == 1


def test_a_run_is_the_same_with_pictures(trained, coco, tmp_path):
    """All numbers and weights are equal to the last bit, although the pictures were drawn in between."""
    workdir, metrics = trained
    config = tiny.config(coco)
    config.train.plots = True
    state = np.random.get_state()[1].tolist()
    assert train(config, tmp_path) == metrics
    assert np.random.get_state()[1].tolist() == state
    assert workdirs.numbers(tmp_path) == workdirs.numbers(workdir)
    with_pictures, without = (workdirs.weights(folder / "checkpoints/4") for folder in (tmp_path, workdir))
    for name, array in without.items():
        np.testing.assert_array_equal(with_pictures[name], array, err_msg=name)
    assert (tmp_path / "plots/merges.png").is_file()
    merges = [name for name in workdirs.lines(tmp_path)[-1] if name.startswith("merge/")]
    paths = ("deformable", "regional_attention", "dynamic_conv")
    layers = range(config.model.refiner.layers)
    expected = [f"merge/{m}/layer_{layer}/{path}" for m in ("attention", "ffn") for layer in layers for path in paths]
    assert sorted(merges) == sorted(expected)
    assert {name for _, name, _ in workdirs.events(tmp_path)} >= set(merges)


class TestMerges:
    def params(self, weights):
        return nnx.State({"refiner": {"layers": {"merge_ffn": {"weights": nnx.Param(np.array(weights, np.float32))}}}})

    def test_sizes_are_means_over_channels(self):
        # One layer, two channels, three paths.
        sizes = merge_sizes(self.params([[[1, -2, 0], [-3, 2, 1]]]), ("deformable", "point", "region_fc"))
        names = [f"merge/ffn/layer_0/{path}" for path in ("deformable", "point", "region_fc")]
        assert sizes == dict(zip(names, (2.0, 2.0, 0.5)))

    def test_equal_refiners_are_numbered(self):
        sizes = merge_sizes(self.params([[1, 2, 3], [4, 5, 6]]), ("point", "deformable", "point"))
        assert list(sizes)[:3] == ["merge/ffn/layer_0/point_0", "merge/ffn/layer_0/deformable", "merge/ffn/layer_0/point_2"]
        assert list(sizes.values()) == [1, 2, 3, 4, 5, 6]


class TestCurves:
    @pytest.mark.parametrize(
        ("name", "parts"),
        [
            ("term/layer_1/class", ("primary", "layer", 1, "class")),
            ("term/dynamic_conv/denoising_0/l1", ("dynamic_conv", "denoising", 0, "l1")),
            ("term/dense_proposals/giou", ("primary", "dense_proposals", None, "giou")),
        ],
    )
    def test_terms_are_told_apart(self, name, parts):
        assert curves.split_term(name) == parts

    def test_losses_are_grouped(self):
        names = ["layer_0/class", "layer_1/class", "layer_1/giou", "point/layer_1/class", "dense_0/class", "proposals/l1"]
        groups = curves.loss_groups(Metrics([{"step": 1, **{f"term/{name}": 1.0 for name in names}}]))
        assert groups["class"] == {"class": ["term/layer_1/class"], "giou": ["term/layer_1/giou"]}
        assert groups["branch"] == {
            "primary": ["term/layer_0/class", "term/layer_1/class", "term/layer_1/giou"],
            "point": ["term/point/layer_1/class"],
        }
        assert groups["kind"] == {"dense": ["term/dense_0/class"], "proposals": ["term/proposals/l1"]}

    def test_there_is_no_figure_of_merges_without_merges(self):
        assert curves.draw_merges(Metrics([{"step": 1.0, "loss": 1.0}])) is None

    def test_many_values_and_none_can_be_drawn(self):
        lines = [{"step": step, "loss": 1 / step, "learning_rate": 1e-4, "gradient_norm": 1.0} for step in range(1, 500)]
        for metrics in (Metrics([]), Metrics([dict(line) for line in lines])):
            for draw in (curves.draw_losses, curves.draw_schedule, curves.draw_precision):
                assert draw(metrics).startswith(b"\x89PNG")

    def test_nothing_is_left_behind_in_matplotlib(self):
        import matplotlib
        from matplotlib import pyplot

        # Tests of other modules in the same process may have left figures of their own.
        before, figures = dict(matplotlib.rcParams), pyplot.get_fignums()
        curves.draw_schedule(Metrics([]))
        assert dict(matplotlib.rcParams) == before
        assert pyplot.get_fignums() == figures

    def test_strange_names_of_classes_are_no_formulas(self):
        names = ("$\\frac{", "\u732b", "a" * 99)
        classes = pictures.Classes(names, (1, 2, 3))
        data = pictures.dataset([pictures.plain(8, 8, pictures.RED)], [[[0, 0, 4, 4]]], [[1]], classes=classes)
        assert curves.draw_labels({"training": data, "validation": data}).startswith(b"\x89PNG")
        assert curves.label_counts(data).tolist() == [0, 1, 0]


class TestMetricsFiles:
    def test_broken_lines_are_counted(self, tmp_path):
        rows = [
            json.dumps({"step": 1, "loss": 2.0}),
            "{broken",
            '"text"',
            '{"loss": 3}',
            "[" * 9999,
            '{"step": 2, "val/AP": -1}',
        ]
        (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
        metrics = read_metrics(tmp_path / "metrics.jsonl")
        assert metrics.lines == [{"step": 1, "loss": 2.0}, {"step": 2, "val/AP": -1}]
        assert metrics.broken == 4
        steps, values = metrics.series("val/AP")
        assert steps == [2]
        assert np.isnan(values).all()

    def test_a_missing_file_has_no_lines(self, tmp_path):
        assert read_metrics(tmp_path / "metrics.jsonl") == Metrics([])


class TestSheets:
    def test_views_of_an_image_are_side_by_side(self, monkeypatch):
        titles = []
        monkeypatch.setattr("hpr_jax.inference.sheets.titled", lambda image, title: titles.append(title) or image)
        from hpr_jax.data.loading.batches import empty_batch

        batch = empty_batch(4, (16, 16), 2)
        batch.views = 2
        batch.sizes[:] = 16
        for place, colour in enumerate((pictures.RED, pictures.GREEN, pictures.BLUE, (9, 9, 9))):
            batch.images[place] = colour
        batch.records = [object()] * 4
        before = batch.images.copy()
        sheet = draw_batch(batch, ("cup",), 2)
        assert titles == ["weak view", "strong view"] * 2
        # Both views of the first image come before those of the second; each has 320 pixels and a border of 4.
        assert [sheet[160, 164 + 328 * column].tolist() for column in range(4)] == [
            list(pictures.RED),
            list(pictures.BLUE),
            list(pictures.GREEN),
            [9, 9, 9],
        ]
        np.testing.assert_array_equal(batch.images, before)

    def test_predictions_are_beside_the_truth(self, monkeypatch):
        calls, titles = [], []
        monkeypatch.setattr("hpr_jax.inference.sheets.draw", lambda image, *rest, **_: calls.append(rest) or image)
        monkeypatch.setattr("hpr_jax.inference.sheets.titled", lambda image, title: titles.append(title) or image)
        data = pictures.dataset([pictures.plain(100, 200, pictures.RED)], [[[10, 20, 30, 60]]], [[2]])
        found = [{"image_id": 10, "category_id": 5, "bbox": [1, 2, 3, 4], "score": 0.456}]
        draw_pair(pictures.plain(200, 400, pictures.RED), data.records[0], found, data.classes, 0.3)
        assert titles == ["prediction (score >= 0.3)", "truth"]
        (boxes, labels, captions), (true_boxes, true_labels, true_captions) = calls
        assert (boxes.tolist(), list(labels), captions) == ([[2, 4, 8, 12]], [1], ["pen 0.46"])
        assert (true_boxes.tolist(), list(true_labels), true_captions) == ([[20, 40, 60, 120]], [2], ["hat"])

    def test_the_same_images_are_drawn_every_time(self):
        count = 20
        boxes = [[[0, 0, 4, 4]] if number % 2 else [] for number in range(count)]
        data = pictures.dataset([pictures.plain(8, 8, pictures.RED)] * count, boxes)
        chosen = [record.image_id for record in drawn.chosen_records(data)]
        assert chosen == [11, 15, 19, 21, 25, 29]

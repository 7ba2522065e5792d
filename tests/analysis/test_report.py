"""The report: every section is there, with the right numbers, and nothing of it is taken for HTML or loads anything."""

import dataclasses
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pictures
import pytest
import tiny

from hpr_jax import main as command
from hpr_jax.analysis import report as reporting
from hpr_jax.analysis import report_sections
from hpr_jax.analysis.diagnosis import diagnose
from hpr_jax.analysis.recipes import nearest_recipe
from hpr_jax.analysis.report_page import drawn, page, paragraph, photograph, table, text
from hpr_jax.analysis.report_sections import SECTIONS, Subject, duration, training_seconds
from hpr_jax.analysis.speed import Speed, median_seconds
from hpr_jax.config import load_config, to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.evaluation.average_precision import LIMITS
from hpr_jax.evaluation.evaluator import EvaluationResult
from hpr_jax.evaluation.result_files import stored_detections, write_result
from hpr_jax.training.metric_reader import Metrics
from hpr_jax.weights.source import Source

# A class name that a page must not take for a part of itself.
EVIL = "<script src='https://evil.example/x.js'>&\""
CLASSES = Classes((EVIL, "pen", "hat"), (2, 5, 9))
METRICS = Metrics(
    [
        {
            "step": 1,
            "loss": 9.0,
            "learning_rate": 1e-4,
            "gradient_norm": 3.0,
            "images_per_second": 2.0,
            "term/layer_0/l1": 1.0,
        },
        {
            "step": 50,
            "loss": 4.0,
            "learning_rate": 1e-4,
            "gradient_norm": 2.0,
            "images_per_second": 2.0,
            "term/layer_0/l1": 0.5,
        },
        {"step": 50, "val/AP": 0.2, "val/AP50": 0.4, "merge/ffn/layer_0/deformable": 1.0},
    ],
    broken=2,
)


def split(count=2):
    image = pictures.plain(100, 100, pictures.GREEN)
    boxes, labels = [[[10, 10, 40, 40], [60, 60, 90, 90]], [[10, 10, 40, 40]]], [[0, 1], [0]]
    return pictures.dataset([image] * count, boxes[:count], labels[:count], classes=CLASSES)


DETECTIONS = [
    {"image_id": 10, "category_id": 2, "bbox": [10, 10, 30, 30], "score": 0.9},
    {"image_id": 11, "category_id": 5, "bbox": [10, 10, 30, 30], "score": 0.95},
]


def subject(detections=DETECTIONS, **others):
    config = tiny.config(Path("data <of> mine"))
    config.train.steps = 50
    source = Source(Path("run/best/50"), CLASSES, config, 50, {}, lambda compute: None)
    made = Subject(
        workdir=Path("run"),
        source=source,
        train=split(),
        diagnosis=diagnose(split(), detections, LIMITS),
        whole=2,
        metrics=METRICS,
        speed=Speed("cpu", (480, 640), 0.0425, 8, 31.25),
    )
    return dataclasses.replace(made, **others)


def whole_page(about):
    return page("Report on run", [(title, write(about)) for title, write in SECTIONS.items()])


class Reader(HTMLParser):
    """What a browser would see: the text of the page, its tags and their attributes."""

    def __init__(self, content):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += f"{data}\n"


@pytest.fixture(scope="module")
def content():
    return whole_page(subject())


@pytest.fixture(scope="module")
def reader(content):
    return Reader(content)


class TestPage:
    def test_each_section_is_there(self, reader):
        for place, title in enumerate(SECTIONS):
            assert ("section", {"id": f"part{place}"}) in reader.tags
            assert ("a", {"href": f"#part{place}"}) in reader.tags
            assert reader.text.count(f"\n{title}\n") >= 2, title

    def test_nothing_is_loaded_from_elsewhere(self, content, reader):
        without = re.sub(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", "", content)
        for _, attributes in reader.tags:
            for name in ("src", "href", "srcset"):
                assert attributes.get(name, "#").startswith(("#", "data:image/"))
        assert "url(" not in without
        assert "@import" not in without
        # The only address is the text of a class name, which is no link.
        assert without.count("://") == without.count("https://evil.example")
        assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "link", "iframe", "object", "base"})

    def test_strange_names_are_text(self, content, reader):
        assert EVIL in reader.text
        assert "<script" not in content
        assert "data <of> mine" in reader.text

    def test_pictures_are_for_light_and_dark(self, reader):
        sources = [attributes for tag, attributes in reader.tags if tag == "source"]
        assert len(sources) >= 8
        assert all(attributes["media"] == "(prefers-color-scheme: dark)" for attributes in sources)
        assert all(attributes["alt"] for tag, attributes in reader.tags if tag == "img")

    def test_everything_is_escaped(self):
        assert text("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"
        for made in (
            paragraph("<b>"),
            table(["<b>"], [["<b>"]]),
            photograph(b"", "<b>"),
            drawn(lambda theme: b"", "<b>"),
            page("<b>", [("<b>", paragraph("<b>"))]),
        ):
            assert "<b>" not in made


class TestNumbers:
    def test_summary(self, reader):
        assert "The run has taken 50 of 50 steps." in reader.text
        assert "that of step 50, has AP 0.252, AP50 0.252 and AP75 0.252 on all 2 images" in reader.text
        assert "trained on 2 images of 3 classes" in reader.text
        # 50 steps of 2 images, at 2 images a second.
        assert "The steps took about 50 seconds" in reader.text
        assert "score threshold 0.90" in reader.text
        # The pen in the place of the second cup.
        assert "The costliest kind of error is Cls (right place, wrong class)" in reader.text

    def test_classes(self, content):
        found = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", content)]
        # Of the recalls 0, 0.01, ..., 1, 51 are reached.
        assert [text(EVIL), "0.505", "0.505", "2"] in found
        assert ["pen", "0.000", "0.000", "1"] in found
        assert ["hat", "\u2013", "\u2013", "0"] in found
        assert ["Cls: right place, wrong class", "1"] in [row[:2] for row in found]
        # Both objects of the class: one is found, the other taken for a pen.
        assert [text(EVIL), "1", "1", "0", "0"] in found

    def test_speed(self, reader):
        assert "42.5 ms" in reader.text
        assert "31.2 images/s" in reader.text
        assert "640x480" in reader.text

    def test_label_errors(self, reader):
        assert f"1.png: pen (0.95); annotated as another class: {EVIL}" in reader.text

    def test_settings_that_differ_are_marked(self, content):
        marked = re.findall(r'<tr class="marked"><td>config\.(.*?)</td>', content)
        assert "train.steps" in marked
        assert "data.directory" in marked
        assert "model.levels" not in marked

    def test_broken_metrics_are_counted(self, reader):
        assert "2 lines of metrics.jsonl cannot be read" in reader.text

    def test_how_long_it_took(self):
        assert training_seconds(METRICS, 4) == 100
        assert training_seconds(Metrics([]), 4) == 0
        assert [duration(seconds) for seconds in (59.4, 150, 3600, 9000)] == [
            "59 seconds",
            "2 minutes",
            "60 minutes",
            "2 hours",
        ]


class TestNothingToTell:
    def test_no_detections(self):
        reader = Reader(whole_page(subject([])))
        for sentence in (
            "No detection is right.",
            "There are no detections, so every object is missed.",
            "nothing can be confused",
        ):
            assert sentence in reader.text
        assert "2 of 2 images have errors" in reader.text

    def test_no_errors(self):
        right = [
            {"image_id": 10, "category_id": 2, "bbox": [10, 10, 30, 30], "score": 0.9},
            {"image_id": 10, "category_id": 5, "bbox": [60, 60, 30, 30], "score": 0.9},
            {"image_id": 11, "category_id": 2, "bbox": [10, 10, 30, 30], "score": 0.9},
        ]
        reader = Reader(whole_page(subject(right)))
        assert "No image has an error." in reader.text
        assert "contradicts the annotations" in reader.text

    def test_no_metrics_no_training_split_no_image(self):
        reader = Reader(whole_page(subject(metrics=Metrics([]), train=None, speed=None)))
        assert "The workdir has no metrics.jsonl with numbers" in reader.text
        assert "on images that cannot be read here" in reader.text
        assert "speed was not measured" in reader.text

    def test_images_that_cannot_be_read(self, monkeypatch):
        monkeypatch.setattr("hpr_jax.analysis.plots.read", lambda record: None)
        reader = Reader(report_sections.worst_images(subject()))
        assert "(the image cannot be read)" in reader.text


class TestRecipes:
    def test_the_nearest_is_found(self):
        config = to_plain(load_config("configs/dino.py:small"))
        config["train"]["seed"] = 7
        name, recipe = nearest_recipe(config)
        assert name == "configs/dino.py:small"
        assert recipe["train"]["seed"] == 0


# Where the stored detections below come from.
ORIGIN = {"checkpoint": "best/50", "step": 50, "data": "0" * 64, "settings": {"evaluate.side": 64}}


class TestStoredDetections:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "checkpoint").mkdir()
        write_result(tmp_path / "evaluation", EvaluationResult({"AP": 0.5}, {}, DETECTIONS), ORIGIN)
        return tmp_path

    def stored(self, folder, **others):
        return stored_detections(folder / "evaluation", {**ORIGIN, **others}, folder / "checkpoint", split())

    def test_are_taken(self, folder):
        assert self.stored(folder) == DETECTIONS
        assert json.loads((folder / "evaluation/metrics.json").read_text())["AP"] == 0.5

    @pytest.mark.parametrize("other", [{"step": 51}, {"data": "1" * 64}, {"settings": {}}])
    def test_of_something_else_are_not(self, folder, other):
        assert self.stored(folder, **other) is None

    @pytest.mark.parametrize("damage", ["", "[", "null", "[1]", '[{"image_id": 99}]'])
    def test_that_are_damaged_are_not(self, folder, damage):
        (folder / "evaluation/detections.json").write_text(damage)
        assert self.stored(folder) is None

    def test_that_are_not_all_are_not(self, folder):
        (folder / "evaluation/detections.json").write_text(json.dumps(DETECTIONS[:1]))
        assert self.stored(folder) is None

    def test_older_than_the_checkpoint_are_not(self, folder):
        os.utime(folder / "evaluation/detections.json", (1, 1))
        assert self.stored(folder) is None

    def test_of_earlier_versions_are_not(self, folder):
        (folder / "evaluation/metrics.json").write_text('{"AP": 0.5}')
        assert self.stored(folder) is None


class TestFirstImages:
    def test_are_a_split_of_their_own(self):
        """Its ground truth is that of its images."""
        part = split().first(1)
        assert (len(part), part.records.image_ids, part.truth.labels.tolist()) == (1, (10,), [0, 1])
        diagnosis = diagnose(part, DETECTIONS[:1], LIMITS)
        assert [one.objects for one in diagnosis.classes] == [1, 1, 0]
        assert diagnosis.metrics["AP50"] == pytest.approx(0.5)

    def test_are_at_most_all(self):
        assert len(split().first(99)) == 2


@pytest.mark.slow
class TestCommand:
    @pytest.fixture(autouse=True)
    def _log(self, restored_log):
        """Commands send the log to the console."""

    def test_a_run_is_reported_on(self, trained, tmp_path, monkeypatch):
        workdir, metrics = trained
        speeds = []
        monkeypatch.setattr(
            reporting, "measure_speed", lambda *given: speeds.append(given) or Speed("cpu", (48, 60), 0.1, 2, 9.0)
        )
        output = tmp_path / "page.html"
        detected = []
        run_evaluator = reporting.Evaluator.run
        monkeypatch.setattr(reporting.Evaluator, "run", lambda *given: detected.append(1) or run_evaluator(*given))
        command.run(["report", "--workdir", str(workdir), "--output", str(output)])
        reader = Reader(output.read_text())
        assert f"has AP {metrics['AP']:.3f}" in reader.text
        assert all(title in reader.text for title in SECTIONS)
        # Another report takes the detections that the first one has left.
        command.run(["report", "--workdir", str(workdir), "--output", str(output), "--limit", "2"])
        assert len(detected) == 1
        assert "on the first 2 of 3 images" in Reader(output.read_text()).text

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ((), "A report needs --workdir DIR"),
            (("--workdir", "nowhere"), "There is no checkpoint in nowhere, which does not exist"),
            (("--workdir", ".", "--limit", "0"), "--limit is 0; it must be at least 1."),
            (("--workdir", ".", "--output", "."), "The output . is a folder; give a file, like report.html."),
            (("--workdir", "file"), "The workdir file is a file; give a folder."),
        ],
    )
    def test_mistakes(self, tmp_path, monkeypatch, arguments, sentence):
        monkeypatch.chdir(tmp_path)
        Path("file").write_text("")
        with pytest.raises(UserError, match=re.escape(sentence)):
            command.run(["report", *arguments])

    def test_data_that_is_gone(self, trained, tmp_path):
        with pytest.raises(UserError, match="nowhere"):
            command.run(["report", "--workdir", str(trained[0]), "--data", str(tmp_path / "nowhere")])


def test_the_median_leaves_out_the_first_time(monkeypatch):
    """Which compiles."""
    moments = iter([0.0, 1.0, 10.0, 12.0, 20.0, 29.0])
    monkeypatch.setattr("hpr_jax.analysis.speed.time.perf_counter", lambda: next(moments))
    calls = []
    assert median_seconds(lambda: calls.append(1)) == 2.0
    assert len(calls) == 4

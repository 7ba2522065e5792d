"""The files that the numbers of a run are written to."""

import json

from workdirs import events, session_starts

from hpr_jax.training.metric_writer import MetricWriter


def test_numbers_are_written_to_both_files(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss": 1.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "loss": 1.5}
    assert list(tmp_path.glob("events.*"))


def test_a_line_is_there_when_it_is_written(tmp_path):
    """Whatever ends the process next."""
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss": 1.5})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "loss": 1.5}


def test_a_run_goes_on_behind_its_checkpoint(tmp_path):
    """Lines behind the checkpoint are dropped, as their steps are made again, and so is half a line that a kill left."""
    path = tmp_path / "metrics.jsonl"
    lines = (
        '{"step": 2, "loss": 1.0}',
        '{"step": 3, "lo',
        '{"step": 4, "loss": 2.0}',
        '{"step": 6, "loss": 3.0}',
        '{"step"',
    )
    path.write_text("\n".join(lines))
    with MetricWriter(tmp_path, start=4) as writer:
        writer.write(6, {"loss": 4.0})
    assert [tuple(json.loads(line).values()) for line in path.read_text().splitlines()] == [(2, 1.0), (4, 2.0), (6, 4.0)]
    with MetricWriter(None) as writer:
        writer.write(6, {"loss": 4.0})


def test_tensorboard_is_told_which_steps_are_taken_again(tmp_path):
    """It drops what it has of the step that is named and of later ones."""
    with MetricWriter(tmp_path, start=4):
        pass
    assert session_starts(tmp_path) == [5]


def test_both_files_have_the_same_numbers(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss": 1.5, "term/layer_0/class": 0.25})
        writer.write(7, {"val/AP": 0.5})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 3, "loss": 1.5, "term/layer_0/class": 0.25},
        {"step": 7, "val/AP": 0.5},
    ]
    assert events(tmp_path) == [(3, "loss", 1.5), (3, "term/layer_0/class", 0.25), (7, "val/AP", 0.5)]

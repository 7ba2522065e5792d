"""The comparison of detectors with one refiner and with three, on made-up metrics of its runs."""

import itertools
import json

import compare_refiners
import pytest
from compare_refiners import MOST_STEPS, WAYS, Comparison, Result, table


@pytest.fixture
def comparison(tmp_path):
    return Comparison(tmp_path, "ddq.py:demo", tmp_path / "data", 40, every=10)


def write(comparison, name, rows):
    folder = comparison.folder / name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluations(*precisions, every=10):
    return [{"step": every * (i + 1), "val/AP": ap, "val/AP50": ap + 0.1} for i, ap in enumerate(precisions)]


def write_plateau_and_speeds(comparison, slowness=1.5):
    write(comparison, "plateau", evaluations(0.1, 0.3, 0.303, 0.302, 0.304))
    for kind, speed in (("plain", 12.0), ("HPR", 12.0 / slowness)):
        for turn in range(compare_refiners.TURNS):
            # The first lines have the compilation.
            slow = [{"step": 10, "loss": 1.0, "images_per_second": 0.1}]
            write(comparison, f"speed_{kind}_{turn}", slow + [{"step": 60, "loss": 1.0, "images_per_second": speed}])


def test_the_plateau_is_where_three_evaluations_have_gained_too_little_together(comparison):
    assert comparison.plateau() is None
    write(comparison, "plateau", evaluations(0.1, 0.3, 0.303, 0.302))
    assert comparison.plateau() is None
    (comparison.folder / "plateau/metrics.jsonl").unlink()
    (comparison.folder / "plateau").rmdir()
    write(comparison, "plateau", evaluations(0.1, 0.3, 0.303, 0.302, 0.304))
    assert comparison.plateau() == Result(50, 0.304, pytest.approx(0.404))


def test_a_run_that_never_reaches_one_ends(comparison):
    write(comparison, "plateau", [{"step": MOST_STEPS, "val/AP": 0.5, "val/AP50": 0.6}])
    assert comparison.plateau().steps == MOST_STEPS


def test_lengths_follow_from_the_plateau_and_the_speeds(comparison):
    write_plateau_and_speeds(comparison)
    assert comparison.slowness() == pytest.approx(1.5)
    assert [comparison.length(way) for way in WAYS] == [40, 60, 40, 90]


def test_runs_begin_at_the_plateau_or_from_scratch(comparison, monkeypatch):
    write_plateau_and_speeds(comparison)
    commands = []
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
    for way in WAYS:
        comparison.train(way, 2)
    plain, longer, hpr, scratch = (set(command) for command in commands)
    begun = f"--config.train.initial_weights={comparison.folder / 'plateau'}"
    assert begun in plain & longer & hpr
    assert begun not in scratch
    assert "--config.model.refiner.auxiliaries=()" in (plain & longer) - hpr - scratch
    assert "--config.model.refiner.merge_initial=(1.0,0.0,0.0)" in hpr - scratch
    milestones = ["(32,)", "(48,)", "(32,)", "(82,)"]
    for command, falls in zip((plain, longer, hpr, scratch), milestones):
        assert f"--config.optimizer.milestones={falls}" in command
        assert "--config.train.seed=2" in command
    folders = [command[command.index("--workdir") + 1] for command in commands]
    assert len(set(folders)) == len(WAYS)


def test_the_table(comparison):
    write_plateau_and_speeds(comparison)
    for way, seed in itertools.product(WAYS[:3:2], range(2)):
        ap = {"plain": 0.4, "HPR": 0.5}[way] + 0.1 * seed
        write(comparison, comparison._name(way, seed), [{"step": 40, "val/AP": ap, "val/AP50": ap + 0.1}])
    rows = table({"ddq": comparison}, range(3)).splitlines()
    assert [row.split(" | ")[1] for row in rows[2:]] == ["plateau", "plain", "HPR"]
    assert "| 40 | 1.00 | 0.400, 0.500 | 0.450 |  |  | 0.550 |" in rows[3]
    assert "| 40 | 1.50 | 0.500, 0.600 | 0.550 | +0.100, +0.100 | +0.100 | 0.650 |" in rows[4]


def test_half_a_line_of_a_stopped_run_is_left_out(comparison):
    write(comparison, "plateau", evaluations(0.1))
    with (comparison.folder / "plateau/metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "val/')
    assert [row["step"] for row in compare_refiners.metrics(comparison.folder / "plateau")] == [10]

"""The comparison of detectors with one refiner and with three."""

import argparse
import itertools
import json
from pathlib import Path

import compare_refiners


def arguments(tmp_path, **others):
    given = {"workdir": tmp_path, "models": ["ddq"], "seeds": 2, "steps": 40, "variant": "demo", "data": Path("a/data")}
    return argparse.Namespace(**{**given, **others})


def test_every_run_has_a_folder_of_its_own(tmp_path):
    settings = [{}, {"steps": 50}, {"variant": "small"}, {"data": Path("a/other")}]
    ways = itertools.product(settings, ("ddq", "dino"), compare_refiners.KINDS, range(3))
    folders = {
        compare_refiners.run_folder(arguments(tmp_path, **setting), model, kind, seed) for setting, model, kind, seed in ways
    }
    assert len(folders) == len(settings) * 2 * len(compare_refiners.KINDS) * 3


def test_the_table(tmp_path):
    """Means over seeds, and the gain of three refiners."""
    given = arguments(tmp_path)
    precisions = {"plain": (0.25, 0.35), "HPR": (0.4, 0.6)}
    for kind, values in precisions.items():
        for seed, precision in enumerate(values):
            folder = compare_refiners.run_folder(given, "ddq", kind, seed)
            folder.mkdir(parents=True)
            rows = [
                {"step": 40, "images_per_second": 8.0, "loss": 1.0},
                {"step": 40, "val/AP": precision, "val/AP50": 2 * precision - 0.2},
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain, hpr = compare_refiners.table(given).splitlines()[-2:]
    assert "0.250, 0.350 | 0.300 |" in plain
    assert "0.400, 0.600 | 0.500 | +0.200 |" in hpr

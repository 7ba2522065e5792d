"""The package as others install it: a wheel, in an environment of its own, away from the checkout."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import tiny

from hpr_jax.config import load_config
from hpr_jax.settings import leaves


def overrides(directory):
    """Options that make the packaged demo a run of `tiny.small`, whose programs other tests have compiled already."""
    plain, small = dict(leaves(load_config("deformable_detr:demo"))), dict(leaves(tiny.small(directory)))
    return [f"--config.{key}={value}" for key, value in small.items() if value != plain.get(key)]


@pytest.mark.slow
def test_a_wheel_trains_evaluates_and_predicts(tmp_path):
    def run(*command, **more):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, env=environment, **more)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    environment = {key: text for key, text in tiny.process_environment().items() if key != "PYTHONPATH"}
    # Building leaves folders behind, so it is done on a copy.
    unwanted = shutil.ignore_patterns(".*", "runs", "tests", "build", "*.egg-info")
    shutil.copytree(tiny.ROOT, tmp_path / "source", symlinks=True, ignore=unwanted)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "wheels", tmp_path / "source")
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert "hpr_jax/serving/page.html" in zipfile.ZipFile(wheel).namelist()
    run(sys.executable, "-m", "venv", "--without-pip", "env")
    run(sys.executable, "-m", "pip", "--python", "env/bin/python", "install", "--quiet", "--no-compile", wheel)

    where = run("env/bin/python", "-c", "import hpr_jax; print(hpr_jax.__file__)")
    assert where.startswith(str(tmp_path)), where
    run("env/bin/hpr_jax", "make-shapes", "shapes", "--train", 4, "--val", 2)
    settings = overrides(tiny.write_coco(tmp_path / "data"))
    packaged = ("--config", "configs/deformable_detr.py:demo")
    described = run("env/bin/hpr_jax", "describe", *packaged, "--classes", tiny.CLASSES, *settings)
    assert "backbone" in described
    trained = run("env/bin/hpr_jax", "--config", "deformable_detr:demo", *settings)
    assert trained.splitlines()[0] == "The run deformable_detr:demo is in runs/deformable_detr_demo."
    run("env/bin/hpr_jax", "evaluate", "--workdir", "runs/deformable_detr_demo")
    assert "AP" in json.loads((tmp_path / "runs/deformable_detr_demo/evaluation/metrics.json").read_text())
    run("env/bin/hpr_jax", "predict", "--workdir", "runs/deformable_detr_demo", "shapes/val2017", "--threshold", 0)
    predictions = json.loads((tmp_path / "runs/deformable_detr_demo/predictions/predictions.json").read_text())
    assert len(predictions["images"]) == 2

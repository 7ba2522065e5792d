"""The package as others install it: a wheel, in an environment of its own, away from the checkout."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny

# Settings that make the demo's detector tiny.
SMALL = {
    "model.channels": 16,
    "model.heads": 2,
    "model.hidden": 24,
    "model.points": 2,
    "model.encoder.layers": 1,
    "model.refiner.layers": 1,
    "model.backbone.base_channels": 8,
    "model.neck.groups": 4,
    "model.queries.count": 8,
    "model.denoising.queries": 4,
    "model.refiner.auxiliaries": "()",
    "compute.remat": "()",
    "train.batch_size": 2,
    "train.steps": 2,
    "train.evaluate_every": 2,
    "optimizer.milestones": "()",
    "augmentation.sides": "(64,)",
    "augmentation.max_side": 64,
    "evaluate.side": 64,
    "evaluate.max_side": 64,
}


@pytest.mark.slow
def test_a_wheel_trains_evaluates_and_predicts(tmp_path):
    def run(*command, **more):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, env=environment, **more)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    environment = {key: text for key, text in os.environ.items() if key not in ("PYTHONPATH", "JAX_COMPILATION_CACHE_DIR")}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    # Building leaves folders behind, so it is done on a copy.
    unwanted = shutil.ignore_patterns(".*", "runs", "tests", "build", "*.egg-info")
    shutil.copytree(tiny.ROOT, tmp_path / "source", symlinks=True, ignore=unwanted)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "wheels", tmp_path / "source")
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    run(sys.executable, "-m", "venv", "env")
    run("env/bin/python", "-m", "pip", "install", "--quiet", "--no-compile", wheel)

    where = run("env/bin/python", "-c", "import hpr_jax; print(hpr_jax.__file__)")
    assert where.startswith(str(tmp_path)), where
    described = run("env/bin/hpr_jax", "describe", "--config", "configs/ddq.py:demo", *overrides(SMALL))
    assert "backbone" in described
    run("env/bin/hpr_jax", "make-shapes", "runs/demo/data", "--train", 4, "--val", 2)
    trained = run("env/bin/hpr_jax", "--config", "ddq:demo", *overrides(SMALL))
    assert trained.splitlines()[0] == "The run ddq:demo is in runs/ddq_demo."
    run("env/bin/hpr_jax", "evaluate", "--workdir", "runs/ddq_demo")
    assert "AP" in json.loads((tmp_path / "runs/ddq_demo/evaluation/metrics.json").read_text())
    run("env/bin/hpr_jax", "predict", "--workdir", "runs/ddq_demo", "runs/demo/data/val2017", "--threshold", 0)
    predictions = json.loads((tmp_path / "runs/ddq_demo/predictions/predictions.json").read_text())
    assert len(predictions["images"]) == 2


def overrides(settings):
    return [f"--config.{key}={value}" for key, value in settings.items()]

"""Makes `unfinished_run/`: a tiny run that stopped halfway, and the values with which it ends.

    PYTHONPATH=tests:tests/helpers:scripts python tests/reference_values/make_unfinished_run.py

The folder has the drawn data set (`data/`), the workdir after half of the steps (`run/`), and in `expected.npz` the
detections of that checkpoint on the validation images and the weights after all steps. The stored one was made by commit
2f77c2f. If a later version reads it, detects equally and ends with the same weights, it has not changed the format of
checkpoints, the names of settings or the order of the optimizer's leaves. Whoever changes training on purpose makes it anew,
and says so.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  Sets how tests compile, which decides the last bits.
import numpy as np
import tiny
import workdirs

import hpr_jax
from hpr_jax.training.run import train

FOLDER = Path(__file__).parent / "unfinished_run"
STEPS, STOPPED = 6, 3


def config():
    """That of the tests' tiny DDQ detector, whose compiled programs other tests share, with a moving average."""
    # A relative path, so that no path of one machine is stored.
    c = tiny.config(Path("data"))
    c.train.update(steps=STEPS, log_every=1, checkpoint_every=STOPPED, evaluate_every=STEPS, ema_decay=0.9)
    c.optimizer.update(warmup_steps=2, milestones=(5,))
    return c


def detections(detector) -> dict[str, np.ndarray]:
    """Those in the validation images, in the order of their names."""
    found = [detector(path, threshold=0.0) for path in sorted((FOLDER / "data/val2017").iterdir())]
    return {field: np.stack([getattr(one, field) for one in found]) for field in ("boxes", "scores", "labels")}


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    tiny.write_coco(FOLDER / "data")
    os.chdir(FOLDER)
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        train(config(), workdir)
        last = workdirs.weights(workdir / f"checkpoints/{STEPS}")
        stopped = FOLDER / f"run/checkpoints/{STOPPED}"
        shutil.copytree(workdir / f"checkpoints/{STOPPED}", stopped)
        metrics = [line for line in workdirs.lines(workdir) if line["step"] <= STOPPED]
    (FOLDER / "run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    arrays: dict[str, Any] = {f"detections/{name}": array for name, array in detections(hpr_jax.load(stopped)).items()}
    arrays |= {f"last/{name}": array for name, array in last.items()}
    np.savez_compressed(FOLDER / "expected.npz", **arrays)


if __name__ == "__main__":
    main()

"""A run that an earlier version of this project left unfinished loads, detects and goes on as it did then.

`tests/reference_values/make_unfinished_run.py` made it and tells what is stored. On the kind of machine where it was made,
all values are equal to the last bit; elsewhere sums are rounded in another order.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import workdirs

import hpr_jax
from hpr_jax.config import from_plain
from hpr_jax.training.run import train
from hpr_jax.weights.checkpoint import read_meta

FOLDER = Path(__file__).parents[1] / "reference_values/unfinished_run"
# A difference between weights that counts, and the largest share of a tensor's weights that may differ so. Adam's first
# steps are nearly the signs of gradients. Rounding flips the signs of gradients that are almost zero, and their weights
# differ by the learning rate, 1e-3. If the optimizer's moments were in another order, most weights would differ.
LARGE, FEW = 1e-5, 0.02


@pytest.fixture
def stored(tmp_path):
    """A copy of the stored workdir, the values that the run had, and its config with the stored data's folder."""
    workdir = shutil.copytree(FOLDER / "run", tmp_path / "run")
    with np.load(FOLDER / "expected.npz") as file:
        expected = dict(file)
    config = from_plain(read_meta(workdir).config)
    config.data.directory = str(FOLDER / "data")
    return workdir, expected, config


def test_it_detects_as_then(stored):
    workdir, expected, _ = stored
    detector = hpr_jax.load(workdir)
    for number, path in enumerate(sorted((FOLDER / "data/val2017").iterdir())):
        found = detector(path, threshold=0.0)
        np.testing.assert_array_equal(found.labels, expected["detections/labels"][number])
        np.testing.assert_allclose(found.scores, expected["detections/scores"][number], rtol=1e-5)
        np.testing.assert_allclose(found.boxes, expected["detections/boxes"][number], atol=1e-3)


def test_it_ends_with_the_weights_of_then(stored):
    workdir, expected, config = stored
    train(config, workdir)
    last = workdirs.weights(workdir / f"checkpoints/{config.train.steps}")
    known = {name.removeprefix("last/"): array for name, array in expected.items() if name.startswith("last/")}
    assert set(last) == set(known)
    share, worst = max((np.mean(np.abs(last[name] - array) > LARGE), name) for name, array in known.items())
    assert share <= FEW, f"{share:.0%} of {worst} differ"

"""What the comparison of two runs finds."""

import check_resume
import numpy as np
import pytest

RUN = {
    "names in best/": ["4"],
    "checkpoints/4: ['model']['a']": np.array([1.0, 2.0], np.float32),
    "checkpoints/4: meta": {"step": 4},
    "metrics.jsonl": [{"step": 4, "loss": 1.5}],
}


def test_equal_runs():
    again = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in RUN.items()}
    assert check_resume.differences(RUN, again) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("checkpoints/4: ['model']['a']", np.array([1.0, np.nextafter(np.float32(2), np.float32(3))], np.float32)),
        ("checkpoints/4: ['model']['a']", np.array([1.0, 2.0])),
        ("checkpoints/4: ['model']['a']", np.array([[1.0, 2.0]], np.float32)),
        ("checkpoints/4: meta", {"step": 5}),
        ("metrics.jsonl", [{"step": 4, "loss": 1.25}]),
        ("more", 1),
    ],
)
def test_every_difference_is_named(name, value):
    other = {**RUN, name: value}
    assert check_resume.differences(RUN, other) == [name]
    assert check_resume.differences(other, RUN) == [name]

"""Inference in float32, whose products are TF32 on a GPU unless one asks for more."""

from gpu_report.parts import inference
from gpu_report.recorder import Recorder


def run(recorder: Recorder, small: bool) -> None:
    inference.run(recorder, small, dtype="float32")

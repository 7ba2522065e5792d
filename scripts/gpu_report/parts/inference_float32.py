"""Inference in float32. Its matrix products are in TF32 on a GPU, unless JAX is told otherwise."""

from gpu_report.parts import inference
from gpu_report.recorder import Recorder


def run(recorder: Recorder, small: bool) -> None:
    inference.run(recorder, small, dtype="float32")

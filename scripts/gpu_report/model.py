"""The detector that is timed, and its settings."""

from pathlib import Path
from typing import Any

import model as bench_model

from hpr_jax.runtime.host_memory import return_memory_of_compiling

FOLDER = Path(__file__).resolve().parent
SIDES, SMALL_SIDES = (800, 1344), (64, 96)


def make_bench(small: bool, **settings: Any) -> bench_model.Bench:
    """The benchmark of HPR-DDQ R50 at full size, or of the rehearsal's detector.

    Args:
      small: takes the rehearsal's detector.
      settings: options of scripts/benchmarks/model.py.
    """
    return_memory_of_compiling()
    config = FOLDER / "rehearsal_config.py" if small else FOLDER.parent.parent / "configs/ddq.py:r50_1x"
    height, width = SMALL_SIDES if small else SIDES
    options = {"config": config, "height": height, "width": width, "weights": "quick", **settings}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return bench_model.Bench(bench_model.make_parser().parse_args(words))

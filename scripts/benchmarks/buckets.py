"""Calculates how many buckets, static image shapes, pay: more of them mean less padding and more compilations.

    python scripts/benchmarks/buckets.py [--config configs/ddq.py:r50_1x] [--compile SECONDS] [--step SECONDS] [--steps N]
        [--data]

For each number of buckets it prints the pixels that padding adds to an epoch of training images, and the hours of a run. A
run is one compilation a bucket, and steps whose time grows with the padded pixels. --compile is the time to compile one
bucket and --step that of a step without padding, both as `model.py` measures them on the machine in question. The images
are photographs of common sizes in about COCO's proportions, or with --data those of the config's data set.
"""

import argparse
from pathlib import Path

import numpy as np

from hpr_jax.analysis.costs import photographs
from hpr_jax.config import load_config
from hpr_jax.data.build import load_training_data, make_plan
from hpr_jax.data.loading.batch_plan import smallest_bucket
from hpr_jax.training.build import in_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parents[2] / "configs/ddq.py:r50_1x"))
    parser.add_argument("--compile", type=float, default=60.0, help="seconds to compile one bucket (default 60)")
    parser.add_argument("--step", type=float, default=0.5, help="seconds of a step without padding (default 0.5)")
    parser.add_argument("--steps", type=int, default=0, help="length of the run; default: the config's")
    parser.add_argument("--data", action="store_true", help="take the sizes of the config's data set")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    # With a few thousand images, shares are exact to a percent.
    dataset = load_training_data(config)[0] if arguments.data else photographs(4000)
    print(f"{'buckets':>8} {'padding':>8} {'largest':>10} {'compile h':>10} {'run h':>8}")
    for count in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24):
        config.data.buckets = count
        plan = make_plan(config, dataset)
        steps = arguments.steps or in_steps(config, plan.steps_per_epoch).train.steps
        sizes = [geometry.size for geometry in plan.draw(np.random.default_rng(1))]
        padded = [np.prod(smallest_bucket(plan.buckets, size)) for size in sizes]
        growth = sum(padded) / sum(np.prod(size) for size in sizes)
        compiling, running = len(plan.buckets) * arguments.compile / 3600, steps * arguments.step * growth / 3600
        largest = "x".join(map(str, plan.buckets[-1]))
        print(
            f"{len(plan.buckets):8} {growth - 1:8.1%} {largest:>10} {compiling:10.2f} {compiling + running:8.2f}", flush=True
        )


if __name__ == "__main__":
    main()

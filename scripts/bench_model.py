"""Times a full-size detector on one image: inference, forward and backward, the matcher; memory and compile time.

    python scripts/bench_model.py [--config configs/ddq.py:r50_1x] [--height 800] [--width 1333] [--objects 7] [--repeats 3]

Every phase runs in a process of its own, so that its peak memory is its own. The last column is the ratio to the official
PyTorch implementation, where its figures on two CPU cores are known (HPR-DDQ R50, one 800x1333 image, float32).
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

# Medians of the official implementation on two cores of a machine of the same kind: seconds, GB.
OFFICIAL = {"inference": (17.9, 2.5), "forward and backward": (90.5, 13.5)}
PHASES = ("inference", "forward and backward", "matcher")


def build(arguments):
    """The config, a random detector, an image and its size."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hpr_jax.config import load_config
    from hpr_jax.models.build import build_detector

    config = load_config(arguments.config)
    key = jax.random.key(0, impl="rbg")
    detector = nnx.jit(
        lambda key: build_detector(config.model, arguments.classes, compute=config.compute, rngs=nnx.Rngs(key))
    )(key)
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.integers(0, 256, (1, arguments.height, arguments.width, 3)), jnp.uint8)
    return config, detector, image, jnp.array([[arguments.height, arguments.width]], jnp.int32)


def timed(function, inputs, repeats: int) -> dict[str, float]:
    """Compile time and median run time in seconds, peak memory of the process in GB."""
    import jax

    start = time.perf_counter()
    compiled = jax.jit(function).lower(*inputs).compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds": float(np.median(seconds)), "compile": compile_seconds, "memory": peak}


def inference(arguments) -> dict[str, float]:
    import jax

    from hpr_jax.models.detector import detections

    config, detector, image, size = build(arguments)

    def detect(detector, image, size):
        outputs = detector(detector.normalize(image, size), size)
        return detections(jax.tree.map(lambda x: x[-1], outputs.primary.matching), size, config.evaluate.detections)

    return timed(detect, (detector, image, size), arguments.repeats)


def forward_and_backward(arguments) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hpr_jax.recipe import make_criterion
    from hpr_jax.types import Targets

    config, detector, image, size = build(arguments)
    criterion = make_criterion(config)
    rng = np.random.default_rng(0)
    center, side = rng.uniform(0.3, 0.7, (1, arguments.objects, 2)), rng.uniform(0.05, 0.4, (1, arguments.objects, 2))
    targets = Targets(
        boxes=jnp.asarray(np.concatenate([center, side], axis=-1), jnp.float32),
        labels=jnp.asarray(rng.integers(0, arguments.classes, (1, arguments.objects)), jnp.int32),
        valid=jnp.ones((1, arguments.objects), bool),
        sizes=size,
    )
    graph, params, rest = nnx.split(detector, nnx.Param, ...)
    del detector

    def step(params, rest, image, targets, key):
        def loss(params):
            detector = nnx.merge(graph, params, rest)
            denoising = detector.denoiser.draw(key, targets) if detector.denoiser is not None else None
            outputs = detector(detector.normalize(image, size), size, denoising=denoising, train=True, key=key)
            return sum(jnp.sum(term) for term in criterion(outputs, targets, denoising).values())

        return jax.value_and_grad(loss)(params)

    return timed(step, (params, rest, image, targets, jax.random.key(0)), arguments.repeats)


def matcher(arguments) -> dict[str, float]:
    """Host time of one step's matching: all layers, branches and dense queries of one image in one call."""
    from hpr_jax.config import load_config
    from hpr_jax.losses.assignment import solve_on_host
    from hpr_jax.recipe import make_criterion

    config = load_config(arguments.config)
    criterion, queries = make_criterion(config), config.model.queries
    layers, branches = config.model.refiner.layers, 1 + len(config.model.refiner.auxiliaries)
    requests = [(queries.count, (criterion.proposal_repeats, *(criterion.repeats or (1,) * layers) * branches))]
    if queries.kind == "distinct":
        dense = int(queries.count * queries.dense_ratio)
        requests.append((dense, (criterion.dense.positives,) * (1 + layers * branches)))
    rng = np.random.default_rng(0)
    costs = [rng.normal(size=(len(repeats), 1, count, arguments.objects)).astype(np.float32) for count, repeats in requests]
    valid = [np.ones(cost.shape[:3], bool) for cost in costs]
    seconds = []
    for _ in range(10 * arguments.repeats):
        start = time.perf_counter()
        solve_on_host(costs, valid, np.ones((1, arguments.objects), bool), [repeats for _, repeats in requests])
        seconds.append(time.perf_counter() - start)
    return {"seconds": float(np.median(seconds))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parent.parent / "configs/ddq.py:r50_1x"))
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--objects", type=int, default=7)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--phase", choices=PHASES, help="run one phase and print its numbers as JSON")
    arguments = parser.parse_args()
    if arguments.phase:
        phase = dict(zip(PHASES, (inference, forward_and_backward, matcher)))[arguments.phase]
        print(json.dumps(phase(arguments)))
        return
    print(f"{'phase':22} {'seconds':>9} {'compile s':>10} {'peak GB':>8} {'x official time':>16} {'x official GB':>14}")
    for name in PHASES:
        command = [sys.executable, __file__, *sys.argv[1:], "--phase", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(output.splitlines()[-1])
        line = f"{name:22} {row['seconds']:9.4f}"
        if "compile" in row:
            line += f" {row['compile']:10.1f} {row['memory']:8.2f}"
            seconds, memory = OFFICIAL[name]
            line += f" {row['seconds'] / seconds:16.2f} {row['memory'] / memory:14.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()

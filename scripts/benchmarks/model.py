"""Times a full-size detector: inference, forward and backward, training steps, matching, and the stages of the network.

    python scripts/benchmarks/model.py [--config configs/ddq.py:r50_1x] [--batch 1] [--height 800] [--width 1333]
        [--objects 7] [--views 1] [--dtype float32|bfloat16] [--accumulation-steps 1] [--repeats 3] [--phase PHASE]
        [--cache DIR] [--official INFERENCE_S,INFERENCE_GB,TRAINING_S,TRAINING_GB]

Each phase runs in a process of its own, so that its peak memory is its own: that of the GPU if there is one, else of the
process. Times are medians. "compile" is how much longer the first call takes than the others; with --cache, compiled
programs are kept in DIR, and a second run shows how much that saves. The last columns are ratios to the official PyTorch
implementation, whose numbers --official gives. They must be measured on the same machine in the same hour.
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from timing import peak_memory

PHASES = ("inference", "forward and backward", "training step", "matching", "stages")


class Bench:
    """A random detector, and a batch of random images with ground truth."""

    def __init__(self, arguments: argparse.Namespace):
        import jax.numpy as jnp

        from hpr_jax.config import load_config
        from hpr_jax.models.build import random_detector

        self.arguments, self.config = arguments, load_config(arguments.config)
        if arguments.dtype:
            self.config.compute.dtype = arguments.dtype
        make = random_detector if arguments.weights == "initial" else quick_detector
        self.detector = make(self.config.model, arguments.classes, compute=self.config.compute)
        shape = (arguments.views * arguments.batch, arguments.height, arguments.width, 3)
        self.images = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        self.targets = self.targets_of(arguments.objects)

    def targets_of(self, objects: int) -> Any:
        """Ground truth with `objects` objects in each image, and room for at least `--room` of them."""
        import jax.numpy as jnp

        from hpr_jax.types import Targets

        arguments, rng, images = self.arguments, np.random.default_rng(1), len(self.images)
        places = (images, max(objects, arguments.room))
        center, side = rng.uniform(0.3, 0.7, (*places, 2)), rng.uniform(0.05, 0.4, (*places, 2))
        return Targets(
            boxes=jnp.asarray(np.concatenate([center, side], axis=-1), jnp.float32),
            labels=jnp.asarray(rng.integers(0, arguments.classes, places), jnp.int32),
            valid=jnp.asarray(np.broadcast_to(np.arange(places[1]) < objects, places)),
            sizes=jnp.asarray(np.tile(np.array([[arguments.height, arguments.width]], np.int32), (images, 1))),
        )

    def timed(self, run: Callable[[], Any]) -> dict[str, float]:
        """Seconds of a call (median), how much longer the first took, images a second, and peak memory in GB."""
        import jax

        seconds = []
        for _ in range(1 + self.arguments.repeats):
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds.append(time.perf_counter() - start)
        median = float(np.median(seconds[1:]))
        return {
            "seconds": median,
            "compile": seconds[0] - median,
            "memory": peak_memory(),
            "images_per_second": len(self.images) / median,
        }

    def step(self) -> tuple[Any, Any, Any]:
        """The training step, its first state and its batch. The bench gives its detector away, to hold the weights once."""
        import jax.numpy as jnp
        from flax import nnx

        from hpr_jax.losses.build import make_criterion
        from hpr_jax.runtime.devices import replicate
        from hpr_jax.training.build import make_optimizer
        from hpr_jax.training.state import TrainState
        from hpr_jax.training.step import TrainStep

        optimizer = make_optimizer(self.config)
        graph, variables = nnx.split(self.detector)
        params, frozen = nnx.split_state(variables, nnx.Param, ...)
        del variables
        del self.detector
        step = TrainStep(graph, make_criterion(self.config), optimizer, 0, parts=self.arguments.accumulation_steps)
        state = TrainState(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params))
        return step, replicate(step.mesh, state), self.batch_of(step, self.targets)

    def batch_of(self, step: Any, targets: Any) -> Any:
        """The images with ground truth as a batch of the training step."""
        import jax

        from hpr_jax.runtime.devices import shard
        from hpr_jax.training.step import DeviceBatch

        views = self.arguments.views
        batch = jax.tree.map(lambda x: x.reshape(views, -1, *x.shape[1:]), DeviceBatch(self.images, targets))
        return shard(step.mesh, batch, axis=1)


def quick_detector(config: Any, num_classes: int, *, compute: Any) -> Any:
    """A detector whose weights NumPy draws, with a variance that keeps features in range.

    At full size, the program that draws initial weights takes minutes to compile.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hpr_jax.models.build import abstract_detector

    graph, state = nnx.split(abstract_detector(config, num_classes, compute))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        names = {str(getattr(key, "key", key)) for key in path}
        if names & {"bias", "mean"}:
            return jnp.asarray(np.zeros(leaf.shape, leaf.dtype))
        if names & {"scale", "variance", "weights"}:
            return jnp.asarray(np.ones(leaf.shape, leaf.dtype))
        # The last axis is that of results; of stacked layers the first one counts layers, not what is summed.
        summed = max(int(np.prod(leaf.shape[:-1])), 1)
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / np.sqrt(summed), leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def inference(bench: Bench) -> dict[str, float]:
    from flax import nnx

    from hpr_jax.inference.detect import make_detect

    graph, state = nnx.split(bench.detector)
    detect = make_detect(graph, bench.config.evaluate.detections)
    return bench.timed(lambda: detect(state, bench.images, bench.targets.sizes))


def forward_and_backward(bench: Bench) -> dict[str, float]:
    step, state, batch = bench.step()
    state = dataclasses.replace(state, optimizer=None)
    return bench.timed(lambda: step.gradients(state, batch))


def training_step(bench: Bench) -> dict[str, float]:
    step, state, batch = bench.step()

    def run():
        nonlocal state
        state, numbers = step(state, batch, 1e-4)
        return state, numbers

    return bench.timed(run)


def matching(bench: Bench) -> dict[str, float]:
    """Transfer to the host and solution of the matching problems of a step: all layers, branches and kinds of queries."""
    import jax.numpy as jnp
    from flax import nnx

    from hpr_jax.losses.build import make_criterion
    from hpr_jax.losses.matching import Request
    from hpr_jax.training.build import make_optimizer
    from hpr_jax.training.step import TrainStep

    model, criterion = bench.config.model, make_criterion(bench.config)
    layers, branches = model.refiner.layers, 1 + len(model.refiner.auxiliaries)
    shapes = [(model.queries.count, (criterion.proposal_repeats, *(criterion.repeats or (1,) * layers) * branches))]
    if model.queries.kind == "distinct":
        dense = int(model.queries.count * model.queries.dense_ratio)
        shapes.append((dense, (criterion.dense.positives,) * (1 + layers * branches)))
    step = TrainStep(nnx.graphdef(bench.detector), criterion, make_optimizer(bench.config), 0, matching="scipy")
    rng, (batch, objects) = np.random.default_rng(0), bench.targets.valid.shape
    requests = []
    for queries, repeats in shapes:
        cost = jnp.asarray(rng.normal(size=(len(repeats), batch, objects, queries)), jnp.float32)
        requests.append(Request(cost, jnp.ones((len(repeats), batch, queries), bool), repeats))

    def run():
        # New arrays, since an array whose values were fetched once keeps them on the host.
        fresh = [dataclasses.replace(request, cost=request.cost + 0.0) for request in requests]
        return step.solve(fresh, bench.targets.valid)

    return bench.timed(run) | {"problems": sum(len(repeats) for _, repeats in shapes) * batch}


def stages(bench: Bench) -> dict[str, dict[str, float]]:
    """Seconds of each stage: the time of the network up to this stage less the time up to the stage before.

    Forward is as in inference; forward and backward has no losses, no denoising and no dense queries.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    graph, variables = nnx.split(bench.detector)
    params, rest = nnx.split_state(variables, nnx.Param, ...)
    del variables
    del bench.detector
    sizes = bench.targets.sizes

    def up_to(stage, params, images):
        detector = nnx.merge(graph, params, rest)
        images = detector.normalize(images, sizes)
        if stage == "backbone":
            return detector.backbone(images.astype(detector.dtype), sizes)[0]
        outputs = detector(images, sizes)
        inner = outputs.intermediates
        return {
            "neck and encoder": inner.memory,
            "initial queries": (inner.initial_content, outputs.proposals.logits, outputs.proposals.boxes),
            "refiner": (inner.hidden, inner.branch_hidden, inner.reference_boxes),
            "heads": [(b.matching.logits, b.matching.boxes) for b in (outputs.primary, *outputs.branches.values())],
        }[stage]

    def loss(stage, params, images):
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(up_to(stage, params, images)))

    found: dict[str, dict[str, float]] = {}
    before = {"forward": 0.0, "forward and backward": 0.0}
    for stage in ("backbone", "neck and encoder", "initial queries", "refiner", "heads"):
        forward, backward = jax.jit(up_to, static_argnums=0), jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
        now = {
            "forward": bench.timed(functools.partial(forward, stage, params, bench.images))["seconds"],
            "forward and backward": bench.timed(functools.partial(backward, stage, params, bench.images))["seconds"],
        }
        found[stage] = {name: now[name] - before[name] for name in now}
        before = now
    return found


def run_phase(arguments: argparse.Namespace) -> None:
    import jax

    from hpr_jax.runtime.host_memory import return_memory_of_compiling

    return_memory_of_compiling()
    if arguments.cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(arguments.cache).resolve()))
    functions = (inference, forward_and_backward, training_step, matching, stages)
    print(json.dumps(dict(zip(PHASES, functions))[arguments.phase](Bench(arguments))))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parents[2] / "configs/ddq.py:r50_1x"))
    for name, default in (("batch", 1), ("height", 800), ("width", 1333), ("objects", 7), ("classes", 80), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of activations; default: the config's")
    parser.add_argument("--accumulation-steps", type=int, default=1, help="parts of the batch of a training step")
    parser.add_argument("--views", type=int, default=1, help="views of each image of a training step")
    parser.add_argument(
        "--room", type=int, default=0, help="room for objects in an image; default: for those that there are"
    )
    parser.add_argument(
        "--weights", choices=("initial", "quick"), default="initial", help="quick: drawn by NumPy, with nothing to compile"
    )
    parser.add_argument("--cache", help="folder that keeps compiled programs")
    parser.add_argument("--official", help="the official implementation's seconds and GB of inference, then of training")
    parser.add_argument(
        "--phase", choices=PHASES, help="run one phase and print its numbers as JSON; default: all in a table"
    )
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    if arguments.phase:
        run_phase(arguments)
        return
    numbers = [float(number) for number in arguments.official.split(",")] if arguments.official else []
    official = dict(zip(("inference", "forward and backward"), zip(numbers[::2], numbers[1::2])))
    print(f"{'phase':22} {'seconds':>9} {'images/s':>9} {'compile s':>10} {'peak GB':>8} {'x time':>7} {'x GB':>6}")
    for name in PHASES:
        command = [sys.executable, __file__, *sys.argv[1:], "--phase", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name:22} failed")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        if name == "stages":
            print(f"\n{'stage':22} {'forward s':>10} {'forward and backward s':>24}")
            for stage, seconds in row.items():
                print(f"{stage:22} {seconds['forward']:10.4f} {seconds['forward and backward']:24.4f}")
            continue
        line = f"{name:22} {row['seconds']:9.4f} {row['images_per_second']:9.3f} {row['compile']:10.1f} {row['memory']:8.2f}"
        if name in official:
            line += f" {row['seconds'] / official[name][0]:7.2f} {row['memory'] / official[name][1]:6.2f}"
        if name == "matching":
            line += f"   ({row['problems']} problems)"
        print(line, flush=True)


if __name__ == "__main__":
    main()

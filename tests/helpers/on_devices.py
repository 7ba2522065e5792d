"""Makes training steps on one batch that is split in several ways; test_devices.py runs it in a process with eight devices.

It prints as JSON the numbers of the steps of each way, and how far its weights are from those of one device.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny
from flax import nnx

from hpr_jax.data.build import load_training_data
from hpr_jax.data.loading.batches import empty_batch
from hpr_jax.evaluation.evaluator import Evaluator
from hpr_jax.losses.build import make_criterion
from hpr_jax.runtime.devices import data_mesh
from hpr_jax.training.build import make_optimizer
from hpr_jax.training.loop import to_devices
from hpr_jax.training.state import initial_state
from hpr_jax.training.step import TrainStep

IMAGES, VIEWS, STEPS = 16, 2, 2
# The recipes' learning rate. Adam's first steps follow the signs of gradients, and rounding flips signs of tiny gradients.
RATE = 1e-4
# Ways to split a batch: over so many devices, each of which computes so many parts; and what solves the matching problems.
WAYS = ((1, 1, "scipy"), (8, 2, "pallas"))


def batch(step):
    """A random batch: weak views of all images, then strong ones. Some have no boxes."""
    rng = np.random.default_rng(step)
    made = empty_batch(VIEWS * IMAGES, (tiny.SIDE, tiny.SIDE), 4)
    made.views = VIEWS
    made.images[:] = rng.integers(0, 255, made.images.shape)
    made.sizes[:] = rng.integers(40, tiny.SIDE + 1, made.sizes.shape)
    targets = tiny.targets(rng.integers(0, 5, VIEWS * IMAGES).tolist(), 4, made.sizes, step)
    made.boxes, made.labels, made.valid = (np.array(x) for x in (targets.boxes, targets.labels, targets.valid))
    return made


def run(config, devices, parts, matching):
    mesh = data_mesh(jax.devices()[:devices])
    graph, state = initial_state(config, tiny.CLASSES, mesh)
    how = {"average_decay": 0.5, "parts": parts, "mesh": mesh, "matching": matching}
    step = TrainStep(graph, make_criterion(config), make_optimizer(config), 0, **how)
    rows, compiled, start = [], [], jax.device_get(state.params)
    for number in range(STEPS):
        on_devices = to_devices(batch(number), mesh, {"reports": 3})
        with jax.transfer_guard("disallow"):
            state, numbers = step(state, on_devices, RATE)
        compiled.append(step.compilations)
        rows.append({name: float(value) for name, value in numbers.items()})
    recompiled = compiled[-1] - compiled[0]
    moved = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (start, jax.device_get(state.params)))))
    return rows, jax.device_get((state.params, state.average)), recompiled, float(moved), graph, state


def main(directory):
    config = tiny.config(Path(directory))
    config.train.ema_decay = 0.5
    # Auxiliary branches are split like the primary one, and gradients of a backbone like others: they take long to compile.
    config.model.refiner.auxiliaries = ()
    config.model.backbone.update(norm="frozen_batch", frozen_stages=4)
    found: dict[str, Any] = {}
    first = None
    for devices, parts, matching in WAYS:
        rows, weights, recompiled, moved, graph, state = run(config, devices, parts, matching)
        first = weights if first is None else first
        distance = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (first, weights))))
        found[f"{devices} x {parts}"] = {"numbers": rows, "distance": distance, "moved": moved, "recompiled": recompiled}
    _, val = load_training_data(config)
    on_all = Evaluator(config, val, graph)
    assert on_all.mesh.size == 8
    found["detections"] = on_all.run(nnx.merge_state(state.params, state.frozen)).detections
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])

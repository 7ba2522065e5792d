"""The programs of a detector, traced on shapes alone: what inference and a training step run on a device."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from hpr_jax.data.loading.batch_plan import Shape
from hpr_jax.inference.detect import detections
from hpr_jax.losses.build import make_criterion
from hpr_jax.models.detector import Detector
from hpr_jax.runtime.devices import EVERYWHERE, data_mesh, split_at
from hpr_jax.training.build import make_optimizer
from hpr_jax.training.state import TrainState
from hpr_jax.training.step import DeviceBatch, TrainStep
from hpr_jax.types import Targets

# What arrays hold that a batch brings or makes.
BATCH, GRADIENTS, SAVED = "batch", "gradients", "saved for the backward pass"


@dataclasses.dataclass(frozen=True)
class Traced:
    """Programs that run one after the other, and the arrays that they leave to one another.

    Attributes:
      programs: by name, in the order in which they run.
      lasting: bytes of arrays that stay from one batch to the next, by what they hold.
      passing: bytes of arrays that a batch brings or makes, by what they hold.
      present: by program, what there is of `passing` before it runs.
    """

    programs: dict[str, jax.stages.Traced]
    lasting: dict[str, int]
    passing: dict[str, int]
    present: dict[str, tuple[str, ...]]


def abstract(*shape: int, dtype: Any = jnp.float32, sharding: NamedSharding | None = None) -> Any:
    """An abstract array. Its type is Any, as it takes the place of arrays."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree; they may be abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def traced_inference(config: ConfigDict, detector: Detector, image: Shape, images: int, mesh: Mesh | None = None) -> Traced:
    """The program that detects objects in a batch.

    Args:
      detector: may be abstract.
      image: (height, width) of the images.
      images: of a batch.
      mesh: of one device, which may be absent; None for JAX's default device.
    """
    graph, state = nnx.split(detector)
    everywhere = NamedSharding(mesh or data_mesh(jax.devices()[:1]), EVERYWHERE)
    batch = abstract(images, *image, 3, dtype=jnp.uint8), abstract(images, 2, dtype=jnp.int32)

    # A function of its own, so that JAX does not take what it has traced for another platform.
    def detect(state: nnx.State, images: jax.Array, sizes: jax.Array) -> Any:
        return detections(graph, config.evaluate.detections, state, images, sizes)

    traced = jax.jit(detect).trace(*placed((state, *batch), everywhere))
    passing = {BATCH: num_bytes(batch)}
    return Traced({"inference": traced}, {"parameters": num_bytes(state)}, passing, {"inference": (BATCH,)})


def traced_training(
    config: ConfigDict, detector: Detector, image: Shape, images: int, max_boxes: int, mesh: Mesh | None = None
) -> Traced:
    """The programs of a training step.

    Args:
      detector: may be abstract.
      image: (height, width) of the images.
      images: of a batch, each of which has all its views.
      max_boxes: room for ground-truth boxes in each view.
      mesh: of one device, which may be absent; None for JAX's default device.
    """
    mesh = mesh or data_mesh(jax.devices()[:1])
    everywhere, by_image = NamedSharding(mesh, EVERYWHERE), NamedSharding(mesh, split_at(1))
    graph, everything = nnx.split(detector)
    params, frozen = nnx.split_state(everything, nnx.Param, ...)
    optimizer, settings = make_optimizer(config), config.train
    moments = jax.eval_shape(optimizer.init, params)
    average = params if settings.ema_decay else None
    state = placed(TrainState(abstract(dtype=jnp.int32), params, frozen, moments, average), everywhere)
    views = 1 + config.augmentation.strong_views
    targets = abstract_targets(views, images, max_boxes)
    batch = placed(DeviceBatch(abstract(views, images, *image, 3, dtype=jnp.uint8), targets), by_image)
    number, rate = abstract(dtype=jnp.int32, sharding=everywhere), abstract(sharding=everywhere)

    parts, variables = settings.accumulation_steps, dataclasses.replace(state, optimizer=None, average=None)
    decay = settings.ema_decay
    step = TrainStep(graph, make_criterion(config), optimizer, settings.seed, average_decay=decay, parts=parts, mesh=mesh)
    programs = {"forward": step.forward.trace(variables, batch, number)}
    forward = programs["forward"].out_info
    requests = placed(forward.requests, by_image)
    if step.solves_on_device:
        valid = placed(forward.target_valid, NamedSharding(mesh, split_at(0)))
        programs["matching"] = step.solve_on_device.trace(requests, valid)
    assigned = [abstract(*request.query_valid.shape, dtype=jnp.int32, sharding=by_image) for request in requests]
    outputs, denoising = placed((forward.outputs, forward.denoising), everywhere)
    programs["loss"] = step.loss.trace(batch, [outputs] * parts, denoising, [assigned] * parts)
    _, cotangents = programs["loss"].out_info
    programs["backward"] = step.backward.trace(variables, *placed((forward.pullback, cotangents[-1]), everywhere))
    gradients = programs["backward"].out_info
    programs["update"] = step.update.trace(state, placed(gradients, everywhere), rate)
    return Traced(
        programs,
        {"parameters": num_bytes((params, frozen, average)), "optimizer moments": num_bytes(moments)},
        {
            BATCH: num_bytes(batch),
            GRADIENTS: num_bytes(gradients) * min(parts, 2),
            SAVED: num_bytes(forward),
        },
        {"forward": (BATCH,), "update": (BATCH, GRADIENTS)}
        | dict.fromkeys(("matching", "loss", "backward"), (BATCH, SAVED)),
    )


def abstract_targets(*batch_and_boxes: int) -> Targets:
    """Abstract ground truth, whose shape is that of `Targets.valid`."""
    *batch, boxes = batch_and_boxes
    return Targets(
        boxes=abstract(*batch, boxes, 4),
        labels=abstract(*batch, boxes, dtype=jnp.int32),
        valid=abstract(*batch, boxes, dtype=bool),
        sizes=abstract(*batch, 2, dtype=jnp.int32),
    )


def placed(tree: Any, sharding: NamedSharding) -> Any:
    """A tree of abstract arrays, each on the devices of a sharding."""
    return jax.tree.map(lambda leaf: abstract(*leaf.shape, dtype=leaf.dtype, sharding=sharding), tree)

"""How much memory a training step takes, by the compiler's plan, for shapes in place of arrays. Nothing runs on a device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from hpr_jax.data.loading.batch_plan import Shape
from hpr_jax.losses.build import make_criterion
from hpr_jax.models.detector import Detector
from hpr_jax.runtime.devices import EVERYWHERE, split_at
from hpr_jax.training.build import make_optimizer
from hpr_jax.training.state import TrainState
from hpr_jax.training.step import DeviceBatch, TrainStep, make_train_step
from hpr_jax.types import Targets


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step takes on each device, by what they hold.

    Attributes:
      parameters: of the detector, with those that are not trained, and their moving average.
      moments: of the optimizer.
      batch: images and ground truth of one batch.
      saved: what the forward pass leaves for the backward pass, outputs included.
      cotangents: gradients of the outputs.
      gradients: of the parameters; with several parts of a batch, those of two parts.
      temporaries: of each program, by its name, while it runs.
    """

    parameters: int
    moments: int
    batch: int
    saved: int
    cotangents: int
    gradients: int
    temporaries: dict[str, int]

    def at_peak(self) -> dict[str, int]:
        """What is in memory while that program runs with which there is most: what is alive, and the program's temporaries.
        The next batch is on its way meanwhile."""
        saved, cotangents, gradients = (
            {"saved for the backward pass": self.saved},
            {"gradients of outputs": self.cotangents},
            {"gradients": self.gradients},
        )
        alive = {
            "forward": saved,
            "loss": saved | cotangents,
            "backward": saved | cotangents | gradients,
            "update": gradients,
        }
        always = {"parameters": self.parameters, "optimizer moments": self.moments, "two batches": 2 * self.batch}
        moments = [{**always, **held, "temporaries": self.temporaries[name]} for name, held in alive.items()]
        return max(moments, key=lambda held: sum(held.values()))

    @property
    def peak(self) -> int:
        """The most that is in memory at once."""
        return sum(self.at_peak().values())


class StepPlanner:
    """Plans a training step for batches of any size; a call compiles its programs.

    Args:
      config: of the run; its batch size is not read.
      detector: may be abstract.
      mesh: the devices.
      image: (height, width) of the padded images.
      max_boxes: room for ground-truth boxes in each view.
    """

    def __init__(self, config: ConfigDict, detector: Detector, mesh: Mesh, image: Shape, max_boxes: int):
        self._mesh, self._image, self._max_boxes, self._views = mesh, image, max_boxes, 1 + config.augmentation.strong_views
        graph, variables = nnx.split(detector)
        params, frozen = nnx.split_state(variables, nnx.Param, ...)
        optimizer, settings = make_optimizer(config), config.train
        moments = jax.eval_shape(optimizer.init, params)
        average = params if settings.ema_decay else None
        count: Any = jax.ShapeDtypeStruct((), jnp.int32)
        state = TrainState(count, params, frozen, moments, average)
        self._state = self._placed(state, EVERYWHERE)
        self._parts = settings.accumulation_steps
        # That of the run, which finds the compiled programs in the compilation cache.
        self._step: TrainStep = make_train_step(
            graph,
            make_criterion(config),
            optimizer,
            settings.seed,
            settings.ema_decay,
            settings.accumulation_steps,
            mesh,
            settings.matching,
        )

    def _placed(self, tree: Any, spec: PartitionSpec) -> Any:
        """Abstract arrays with the shapes and types of the given ones, on the devices as `spec` says."""
        sharding = NamedSharding(self._mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def batch(self, size: int) -> DeviceBatch:
        """An abstract batch of so many images."""

        def array(*shape: int, dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct((self._views, size, *shape), dtype)

        room = self._max_boxes
        targets = Targets(array(room, 4), array(room, dtype=jnp.int32), array(room, dtype=bool), array(2, dtype=jnp.int32))
        images, targets = self._placed((array(*self._image, 3, dtype=jnp.uint8), targets), split_at(1))
        counts = jax.ShapeDtypeStruct((self._mesh.size,), jnp.int32)
        # What the loop counts: reports about the data, and requests to stop.
        return DeviceBatch(images, targets, self._placed({"reports": counts, "stop": counts}, split_at(0)))

    def __call__(self, size: int) -> StepMemory | None:
        """The memory of a step on so many images; None if the backend does not tell."""
        step, parts, state, batch = self._step, self._parts, self._state, self.batch(size)
        variables = dataclasses.replace(state, optimizer=None, average=None)
        part = self._placed(jax.ShapeDtypeStruct((), jnp.int32), EVERYWHERE)
        forward, passed = _compiled(step.forward, variables, batch, part)
        assigned = [
            self._placed(jax.ShapeDtypeStruct(request.query_valid.shape, jnp.int32), split_at(1))
            for request in passed.requests
        ]
        losses = batch, [passed.outputs] * parts, passed.denoising, [assigned] * parts
        loss, (_, cotangents) = _compiled(step.loss, *losses)
        backward, gradients = _compiled(step.backward, variables, passed.pullback, cotangents[-1])
        rate = self._placed(jax.ShapeDtypeStruct((), jnp.float32), EVERYWHERE)
        update, _ = _compiled(step.update, state, gradients, rate)
        plans = {"forward": forward, "loss": loss, "backward": backward, "update": update}
        if any(plan is None for plan in plans.values()):
            return None
        devices = self._mesh.size
        return StepMemory(
            parameters=num_bytes(dataclasses.replace(state, optimizer=None)),
            moments=num_bytes(state.optimizer),
            batch=num_bytes(batch) // devices,
            saved=forward.output_size_in_bytes + (parts - 1) * num_bytes(passed.outputs) // devices,
            cotangents=loss.output_size_in_bytes,
            gradients=backward.output_size_in_bytes * min(parts, 2),
            temporaries={name: plan.temp_size_in_bytes for name, plan in plans.items()},
        )


def num_bytes(tree: Any) -> int:
    """The size of all arrays of a tree, which may be abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _compiled(function: Callable, *inputs: Any) -> tuple[Any, Any]:
    """The plan of the memory of a jitted function, None if there is none, and its abstract results where it puts them."""
    lowered = function.lower(*inputs)  # type: ignore[attr-defined]
    program = lowered.compile()
    results = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        program.output_shardings,
    )
    return program.memory_analysis(), results

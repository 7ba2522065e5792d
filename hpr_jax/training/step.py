"""One optimisation step: four compiled programs, and between the first two a solver of the matching problems.

    forward   every device, for its images: outputs, matching costs, and what the backward pass needs
    solve     solves the matching problems: every process, on the host, for its images; or a kernel on every device
    loss      for all images: loss terms, and the gradients of the outputs
    backward  every device, for its images: gradients of the parameters
    update    sums the gradients over the devices, clips them, and changes the parameters

Only `loss` and the drawing of denoising queries look at several images at once, and they look at the whole batch. So a
batch has the same normalisers and the same gradient however it is split, over devices or over parts that a device computes
one after the other.

The host's solver is no callback of a program: programs with callbacks are never kept in the compilation cache, and with
several devices on few cores their callbacks can block one another forever.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from hpr_jax.kernels import assignment
from hpr_jax.losses.criterion import Criterion
from hpr_jax.losses.matching import Request, solve_on_device, solve_on_host
from hpr_jax.runtime.devices import EVERYWHERE, data_mesh, local_part, replicate, shard, split_at
from hpr_jax.runtime.host_memory import return_freed_memory
from hpr_jax.training.optimizer import Optimizer, global_norm, moving_average
from hpr_jax.training.parts import OUTPUTS, at_batch_axis, join_parts, part_of, side_by_side, sum_over_devices, take_part
from hpr_jax.training.pullback import join_floats, split_floats, with_variables, without_variables
from hpr_jax.training.state import TrainState
from hpr_jax.types import DenoisingQueries, Outputs, Targets


@flax.struct.dataclass
class DeviceBatch:
    """A batch on the devices: V views of B images. The axis of images is split over the devices.

    Attributes:
      images: uint8 `[V, B, H, W, 3]`.
      targets: `[V, B, ...]`.
      counts: by name, int32 `[devices]`, split over the devices. The step's numbers have their sums: so every process learns
        what the others counted.
    """

    images: jax.Array
    targets: Targets
    counts: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


# What a step tells about itself, by name: numbers `[]`.
StepNumbers = dict[str, jax.Array]

# Compiler options of the backward program on CPUs. By default XLA's CPU programs compute early whatever they can, so that
# all rematerialised values would be in memory at once. With this schedule they take half of the memory, in the same time.
CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@flax.struct.dataclass
class ForwardPass:
    """What the forward program returns for one part of a batch.

    Attributes:
      outputs: of the detector, without intermediates; images in order, the views of an image side by side.
      requests: the matching problems.
      target_valid: bool `[images, N]`, as in `Targets`.
      pullback: maps gradients of the outputs' floats to gradients of the parameters; None where it is not needed. Its arrays
        differ from device to device, and are joined at their first axis; at another axis XLA would copy what the layers of a
        stack save for the backward pass. In place of the state's arrays and of numbers it has `Variable`s and `Scalar`s.
      denoising: the queries that were drawn for the whole batch, or None.
    """

    outputs: Outputs
    requests: list[Request]
    target_valid: jax.Array
    pullback: Any
    denoising: DenoisingQueries | None = None


# How a forward pass is split over devices: a tree of partition specs in place of arrays.
FORWARD_PASS = ForwardPass(
    OUTPUTS, requests=cast(Any, split_at(1)), target_valid=cast(Any, split_at(0)), pullback=split_at(0)
)


class TrainStep:
    """Takes a state, a batch and the learning rate; returns the new state and numbers, and donates the old state.

    The numbers are every loss term, `loss`, `gradient_norm`, and the sums of the batch's counts. The state should be on all
    devices (`devices.replicate`), and the batch split over them (`devices.shard` at axis 1). Otherwise the second step,
    which gets the first one's state, compiles its programs again.

    Args:
      graph: structure of the detector.
      seed: of denoising queries and drop path.
      average_decay: of the moving average of the parameters, where the state has one.
      parts: number of parts of a batch, which are computed one after the other. It saves memory, and costs a second forward
        pass of all parts but the last.
      mesh: the devices; by default the first one.
      matching: what solves the matching problems: `scipy` on the host, a `pallas` kernel, or `auto`: the kernel on NVIDIA
        GPUs, else SciPy. Problems with more queries than the kernel takes are solved on the host.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        criterion: Criterion,
        optimizer: Optimizer,
        seed: int,
        *,
        average_decay: float = 0.0,
        parts: int = 1,
        mesh: Mesh | None = None,
        matching: str = "auto",
    ):
        self.graph, self.criterion, self.optimizer, self.seed = graph, criterion, optimizer, seed
        self.average_decay, self.parts = average_decay, parts
        self.mesh = data_mesh(jax.devices()[:1]) if mesh is None else mesh
        platform = self.mesh.devices.flat[0].platform
        self.on_cpu = platform == "cpu"
        self.solves_on_device = matching == "pallas" or (matching == "auto" and platform == "gpu")
        everywhere = NamedSharding(self.mesh, EVERYWHERE)
        self.forward = jax.jit(self._forward)
        self.outputs = jax.jit(lambda *arguments: dataclasses.replace(self._forward(*arguments), pullback=None))
        # A kernel runs on GPUs; elsewhere it is interpreted, which is for tests.
        solver = partial(solve_on_device, interpret=platform != "gpu")
        self.solve_on_device = jax.jit(self._on_each_device(solver, (split_at(1), split_at(0)), split_at(1)))
        self.loss = jax.jit(self._loss)
        self.backward = jax.jit(self._backward, compiler_options=CPU_OPTIONS if self.on_cpu else None)
        self.add = jax.jit(partial(jax.tree.map, jnp.add), donate_argnums=0)
        self.update = jax.jit(self._update, donate_argnums=0, out_shardings=everywhere)

    @property
    def compilations(self) -> int:
        """How many programs were compiled so far."""
        programs = (self.forward, self.outputs, self.solve_on_device, self.loss, self.backward, self.add, self.update)
        # The number of compiled programs of a jitted function has no public name, nor a type.
        return sum(cast(Any, program)._cache_size() for program in programs)

    def __call__(self, state: TrainState, batch: DeviceBatch, learning_rate: float) -> tuple[TrainState, StepNumbers]:
        numbers, gradients = self.gradients(state, batch)
        state, norm = self.update(state, gradients, replicate(self.mesh, np.float32(learning_rate)))
        return state, {**numbers, "gradient_norm": norm}

    def gradients(self, state: TrainState, batch: DeviceBatch) -> tuple[StepNumbers, nnx.State]:
        """All of a step but the update: the numbers without `gradient_norm`, and the gradients of the parameters.

        The gradients have a leading axis of devices, over which they are not summed yet.
        """
        # The optimizer's arrays are not needed before the update.
        variables = dataclasses.replace(state, optimizer=None, average=None)
        *others, last = [replicate(self.mesh, np.int32(part)) for part in range(self.parts)]
        passes = [self.outputs(variables, batch, part) for part in others] + [self.forward(variables, batch, last)]
        # While the host solves the matching problems of one part, the devices compute the next part.
        assigned = [self.solve(one.requests, one.target_valid) for one in passes]
        numbers, cotangents = self.loss(batch, [one.outputs for one in passes], passes[-1].denoising, assigned)
        if self.on_cpu:
            # The backward pass needs most of the memory, and the forward pass has left unused gaps in it.
            return_freed_memory()
        # Popped, so that the last part's memory is free when the next one's is needed.
        gradients = self.backward(variables, passes.pop().pullback, cotangents.pop())
        for part, cotangent in zip(others, cotangents):
            more = self.backward(variables, self.forward(variables, batch, part).pullback, cotangent)
            gradients = self.add(gradients, more)
        return numbers, gradients

    def _forward(self, state: TrainState, batch: DeviceBatch, part: jax.Array) -> ForwardPass:
        targets, views = side_by_side(batch.targets), len(batch.images)
        # Random numbers are drawn for the whole batch, so that they do not depend on how it is split.
        draw_key, drop_key = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), state.step))
        drop_keys = jax.random.split(drop_key, len(targets.valid))
        denoiser = nnx.merge(self.graph, state.params, state.frozen).denoiser
        denoising = denoiser.draw(draw_key, targets, views) if denoiser is not None else None
        forward = self._on_each_device(
            self._forward_part,
            (EVERYWHERE, split_at(1), split_at(0), split_at(0), split_at(0), EVERYWHERE),
            FORWARD_PASS,
        )(state, batch.images, targets, denoising, drop_keys, part)
        return dataclasses.replace(forward, denoising=denoising)

    def _forward_part(
        self,
        state: TrainState,
        images: jax.Array,
        targets: Targets,
        denoising: DenoisingQueries | None,
        drop_keys: jax.Array,
        part: jax.Array,
    ) -> ForwardPass:
        """The forward pass of part number `part` on one device, which has these images `[V, B, H, W, 3]`."""
        if self.parts > 1:
            images = part_of(images, part, self.parts, axis=1)
            targets, denoising, drop_keys = jax.tree.map(
                lambda x: part_of(x, part, self.parts), (targets, denoising, drop_keys)
            )
        normalize = nnx.merge(self.graph, state.params, state.frozen).normalize
        images = normalize(side_by_side(images), targets.sizes)

        def predict(params):
            detector = nnx.merge(self.graph, params, state.frozen)
            outputs = detector(images, targets.sizes, denoising=denoising, train=True, keys=drop_keys)
            return split_floats(dataclasses.replace(outputs, intermediates=None))

        floats, pullback, others = jax.vjp(predict, state.params, has_aux=True)
        outputs = join_floats(floats, others)
        requests = self.criterion.requests(outputs, targets)
        return ForwardPass(outputs, requests, targets.valid, without_variables(pullback, state))

    def solve(self, requests: Sequence[Request], target_valid: jax.Array) -> list[jax.Array]:
        """Solves matching problems; on the host, it waits for the costs of this process's images.

        Args:
          requests: each has P problems of every image, split over the devices at the axis of images.
          target_valid: bool `[B, N]`, split alike.

        Returns:
          For each request the index of the box that a query is matched with, or -1: int32 `[P, B, Q]`, split alike.
        """
        most_queries = max(request.query_valid.shape[-1] for request in requests)
        if self.solves_on_device and most_queries <= assignment.MOST_QUERIES:
            return self.solve_on_device(requests, target_valid)
        solved = solve_on_host(
            [local_part(request.cost, axis=1) for request in requests],
            [local_part(request.query_valid, axis=1) for request in requests],
            local_part(target_valid),
            [request.repeats for request in requests],
        )
        return shard(self.mesh, solved, axis=1)

    def _loss(
        self,
        batch: DeviceBatch,
        outputs: Sequence[Outputs],
        denoising: DenoisingQueries | None,
        assigned: Sequence[Sequence[jax.Array]],
    ) -> tuple[StepNumbers, list[Outputs]]:
        """The step's numbers, and for each part the gradients of its outputs' floats.

        Args:
          outputs: of each part.
          assigned: of each part what `solve` returned for it.
        """
        targets, devices = side_by_side(batch.targets), self.mesh.size
        joined = at_batch_axis(lambda axis, *parts: join_parts(parts, devices, axis), *outputs)
        all_assigned = [join_parts(parts, devices, axis=1) for parts in zip(*assigned)]
        floats, others = split_floats(joined)

        def loss_of(floats):
            terms = self.criterion.terms(join_floats(floats, others), targets, denoising, all_assigned)
            terms = {name: jnp.sum(term) for name, term in terms.items()}
            return sum(terms.values()), terms

        (loss, terms), gradients = jax.value_and_grad(loss_of, has_aux=True)(floats)
        counts = {name: jnp.sum(count) for name, count in batch.counts.items()}
        numbers = jax.lax.with_sharding_constraint({**terms, **counts, "loss": loss}, NamedSharding(self.mesh, EVERYWHERE))
        cotangents = [
            at_batch_axis(
                lambda axis, x, part=part: jax.lax.with_sharding_constraint(
                    take_part(x, part, len(outputs), devices, axis), NamedSharding(self.mesh, split_at(axis))
                ),
                gradients,
            )
            for part in range(len(outputs))
        ]
        return numbers, cotangents

    def _backward(self, state: TrainState, pullback: Any, cotangent: Outputs) -> nnx.State:
        """Gradients of the parameters from one part of a batch, each with a leading axis of devices."""

        def of_device(state, pullback, cotangent):
            (gradients,) = with_variables(pullback, state)(cotangent)
            return jax.tree.map(lambda x: x[None], gradients)

        specs = (EVERYWHERE, split_at(0), OUTPUTS)
        return self._on_each_device(of_device, specs, split_at(0))(state, pullback, cotangent)

    def _update(self, state: TrainState, gradients: nnx.State, learning_rate: jax.Array) -> tuple[TrainState, jax.Array]:
        """The next state, and the norm of the gradients."""
        gradients = sum_over_devices(gradients)
        params, moments = self.optimizer.update(gradients, state.optimizer, state.params, learning_rate)
        average = state.average
        if average is not None:
            average = moving_average(average, params, self.average_decay, state.step)
        state = dataclasses.replace(state, step=state.step + 1, params=params, optimizer=moments, average=average)
        return state, global_norm(gradients)

    def _on_each_device(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """The function, run by every device on its own part of the arguments."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@functools.lru_cache(maxsize=8)
def make_train_step(
    graph: nnx.GraphDef,
    criterion: Criterion,
    optimizer: Optimizer,
    seed: int,
    average_decay: float,
    parts: int,
    mesh: Mesh,
    matching: str = "auto",
) -> TrainStep:
    """A `TrainStep`; the same one for the same arguments, so that a run resumed in one process does not compile again."""
    return TrainStep(
        graph,
        criterion,
        optimizer,
        seed,
        average_decay=average_decay,
        parts=parts,
        mesh=mesh,
        matching=matching,
    )

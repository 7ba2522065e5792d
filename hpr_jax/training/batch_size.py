"""The batch size of runs whose config says `auto`: the largest whose step fits the memory, by the compiler's plan."""

import dataclasses
import json
import logging
import math
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hpr_jax.data.build import most_boxes, training_shapes, wants_masks
from hpr_jax.data.dataset import Dataset
from hpr_jax.errors import UserError
from hpr_jax.models.build import abstract_detector
from hpr_jax.runtime.devices import agree, gather
from hpr_jax.runtime.host_memory import available_memory
from hpr_jax.settings import AUTO
from hpr_jax.training.build import with_batch_size
from hpr_jax.training.memory_plan import StepPlanner, num_bytes
from hpr_jax.weights.checkpoint import META_FILE, checkpoint_damage
from hpr_jax.weights.find_checkpoint import BEST, LATEST, checkpoints_in

# The part of the free memory that a step may plan to take. The rest is for programs, libraries and gaps.
FRACTION = 0.9
# An epoch has at least so many steps, if it can: fewer, larger batches would train little on few images.
STEPS_OF_AN_EPOCH = 10
# Bytes that a process which loads data takes beside its batches.
WORKER = 250_000_000

log = logging.getLogger("hpr_jax")


@dataclasses.dataclass(frozen=True)
class ChosenBatch:
    """A batch size, and what it rests on.

    Attributes:
      size: images of a batch, on all devices together.
      planned: bytes that a step is planned to take on each device.
      limit: bytes that it may take.
      larger: the next size, with the bytes that its step is planned to take, infinite if it cannot be compiled; None if it
        was not tried.
    """

    size: int
    planned: int
    limit: int
    larger: tuple[int, float] | None


def resolve_batch_size(
    config: ConfigDict, workdir: Path, dataset: Dataset, mesh: Mesh
) -> tuple[ConfigDict, ChosenBatch | None]:
    """The config with a number for its batch size. A run that goes on has the number that it began with.

    Args:
      dataset: the images that are trained on.

    Returns:
      The config; and how its batch size was chosen, or None if it was not.

    Raises:
      UserError: no batch fits, or the device does not tell its memory.
    """
    if config.train.batch_size != AUTO:
        return config, None
    size = stored_batch_size(workdir)
    if size is not None:
        return with_batch_size(config, size), None
    chosen = choose_batch_size(config, dataset, mesh)
    return with_batch_size(config, chosen.size), chosen


def stored_batch_size(workdir: Path) -> int | None:
    """The batch size of the run that goes on in a workdir; None if it begins."""

    def look() -> int | None:
        for path in (*reversed(checkpoints_in(workdir / LATEST)), *checkpoints_in(workdir / BEST)):
            if checkpoint_damage(path) is None:
                return json.loads((path / META_FILE).read_bytes())["config"]["train"]["batch_size"]
        return None

    return agree(look)


def choose_batch_size(config: ConfigDict, dataset: Dataset, mesh: Mesh) -> ChosenBatch:
    """The largest batch whose step fits the memory, for the largest images with the most boxes. All processes choose alike;
    raises as `resolve_batch_size` does."""
    log.info("The batch size is chosen: programs are compiled for batches of several sizes, which may take minutes.")
    height, width = image = training_shapes(config, dataset)[-1]
    boxes = most_boxes(config, dataset, pasting=wants_masks(config) and dataset.count_masks()[0] > 0)
    detector = abstract_detector(config.model, len(dataset.classes.names), config.compute)
    planner = StepPlanner(config, detector, mesh, image, boxes)
    limit = memory_limit(mesh, config.data.workers)
    on_cpu, ahead = mesh.devices.flat[0].platform == "cpu", 2 * (config.data.workers or config.data.threads)

    def planned(size: int) -> float:
        try:
            plan = planner(size)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return math.inf
        if plan is None:
            raise UserError(_untold(mesh))
        # On CPUs, batches that are loaded ahead are in the same memory.
        return plan.peak + (ahead * num_bytes(planner.batch(size)) // mesh.size if on_cpu else 0)

    def memory(size: int) -> float:
        # The same number in all processes, which must look at the same sizes.
        most = max(gather(planned(size)))
        log.info("A step on %d images of %dx%d is planned to take %s.", size, height, width, _gigabytes(most))
        return most

    unit = mesh.size * config.train.accumulation_steps
    chosen = largest_batch(memory, limit, unit, len(dataset) // STEPS_OF_AN_EPOCH)
    if isinstance(chosen, ChosenBatch):
        return chosen
    needed = "cannot be compiled" if math.isinf(chosen) else f"takes {_gigabytes(chosen)}"
    raise UserError(
        f"config.train.batch_size is {AUTO!r}, and a step on the smallest batch, {unit} images of {height}x{width}, "
        f"{needed} of the {_gigabytes(limit)} that each device has for it; set config.compute.remat to all parts, or "
        "smaller config.augmentation.sides and max_side."
    )


def largest_batch(memory: Callable[[int], float], limit: int, unit: int, most: int) -> ChosenBatch | float:
    """The largest batch that fits, one of `sizes`. A line through known sizes tells which one to try next.

    Args:
      memory: bytes of each device that a step on so many images takes; infinite if it cannot be compiled. It rises with the
        size, nearly along a line.
      limit: bytes that it may take.
      unit: batches are multiples of it.
      most: the largest batch, unless it is smaller than `unit`.

    Returns:
      The batch; or if not even the smallest one fits, the bytes that its step takes.
    """
    choices = list(sizes(unit, most))
    known: dict[int, float] = {}
    # The places of the largest size that fits, and of the smallest that does not.
    fitting, too_large, place = -1, len(choices), 0
    while fitting < place < too_large:
        size = choices[place]
        known[size] = memory(size)
        if known[size] <= limit:
            fitting = place
        else:
            too_large = place
        predicted = _predicted(known, limit)
        reached = fitting + 1 if predicted is None else sum(size <= predicted for size in choices) - 1
        place = min(reached, too_large - 1)
    if fitting < 0:
        return known[choices[0]]
    larger = choices[too_large] if too_large < len(choices) else None
    return ChosenBatch(
        choices[fitting], int(known[choices[fitting]]), limit, None if larger is None else (larger, known[larger])
    )


def sizes(unit: int, most: int) -> Iterator[int]:
    """Sizes of batches, from `unit` up to `most`: its multiples by 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    yield unit
    power = 2
    while power * unit <= most:
        yield power * unit
        if 3 * power // 2 * unit <= most:
            yield 3 * power // 2 * unit
        power *= 2


def _predicted(known: dict[int, float], limit: int) -> float | None:
    """The size whose memory is the limit, on the line through the two largest known sizes; None if that says nothing."""
    points = sorted((size, taken) for size, taken in known.items() if math.isfinite(taken))[-2:]
    if len(points) < 2 or points[1][1] <= points[0][1]:
        return None
    (small, less), (large, more) = points
    return large + (limit - more) * (large - small) / (more - less)


def memory_limit(mesh: Mesh, workers: int) -> int:
    """Bytes that a step may take on each device: the smallest number of all processes.

    The devices of a CPU share the memory of the host, with one another, with other processes, and with those that load data.

    Raises:
      UserError: the device does not tell.
    """
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        neighbours = gather(socket.gethostname()).count(socket.gethostname())
        free = (available_memory() // neighbours - workers * WORKER) // len(mesh.local_devices)
    else:
        facts = device.memory_stats()
        if not facts or "bytes_limit" not in facts:
            raise UserError(_untold(mesh))
        free = facts["bytes_limit"] - facts.get("bytes_in_use", 0)
    return int(FRACTION * min(gather(free)))


def log_choice(chosen: ChosenBatch, config: ConfigDict) -> None:
    """Logs how a batch size was chosen, and what of the recipe was made for another one.

    Args:
      config: as it was given; its length may be in epochs.
    """
    larger = ""
    if chosen.larger is not None and math.isfinite(chosen.larger[1]):
        larger = f"; {_gigabytes(chosen.larger[1])} with {chosen.larger[0]}"
    log.info(
        "Batches have %d images: a step is planned to take %s of the %s that each device has for it%s.",
        chosen.size,
        _gigabytes(chosen.planned),
        _gigabytes(chosen.limit),
        larger,
    )
    made_for, rate, steps = config.optimizer.recipe_batch_size, config.optimizer.learning_rate, config.train.steps
    if made_for != chosen.size:
        log.warning(
            "config.optimizer.learning_rate stays %g%s: recipes are made for a batch size, this one for %d. Many multiply "
            "the rate by the square root of the ratio, which gives %.2g.",
            rate,
            f", and config.train.steps {steps}" if steps else "",
            made_for,
            rate * (chosen.size / made_for) ** 0.5,
        )


def _untold(mesh: Mesh) -> str:
    """The sentence about devices that do not tell their memory."""
    platform = mesh.devices.flat[0].platform
    return f"config.train.batch_size is {AUTO!r}, and the platform {platform} does not tell its memory; give a number."


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB"

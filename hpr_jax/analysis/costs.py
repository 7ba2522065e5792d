"""What a detector costs: parameters and FLOPs by module, static shapes, and memory.

All of it follows from shapes: no data is read, no weights are made, nothing runs on the device.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr
from ml_collections import ConfigDict

from hpr_jax.analysis.flops import flops_by_scope
from hpr_jax.analysis.programs import abstract, abstract_targets, traced_inference, traced_training
from hpr_jax.analysis.scopes import module_names
from hpr_jax.data.augmentation.crop_resize_flip import evaluation_geometries
from hpr_jax.data.build import make_plan
from hpr_jax.data.dataset import Classes, Dataset, ImageAnnotations, Records
from hpr_jax.data.images import ImageFolder
from hpr_jax.data.loading.batch_plan import Shape, choose_buckets, smallest_bucket
from hpr_jax.inference.detect import detections
from hpr_jax.models.detector import Detector
from hpr_jax.models.pyramid import flatten
from hpr_jax.models.refiner.merge import MERGE_POINTS

# Sizes (height, width) of common photographs, and how many of a thousand have each: assumed, close to COCO.
PHOTOGRAPHS = {
    (480, 640): 290,
    (427, 640): 220,
    (640, 480): 100,
    (375, 500): 100,
    (640, 427): 80,
    (360, 640): 50,
    (333, 500): 50,
    (500, 375): 40,
    (640, 640): 40,
    (500, 333): 30,
}


@dataclasses.dataclass(frozen=True)
class ModuleCost:
    """Parameters of a module, and its floating-point operations for one image.

    Attributes:
      name: of the module, or of several that are counted together.
      trained, frozen: how many numbers its variables have.
      flops: twice its multiply-adds.
      within: name of the module that it is a part of, or "".
    """

    name: str
    trained: int
    frozen: int
    flops: int
    within: str = ""


@dataclasses.dataclass(frozen=True)
class StaticShapes:
    """The static sizes that a detector has for one image of a bucket.

    Attributes:
      image: (height, width) of the bucket.
      levels: (height, width) of each level of the feature pyramid.
      matching, denoising, dense: numbers of queries.
    """

    image: Shape
    levels: tuple[Shape, ...]
    matching: int
    denoising: int
    dense: int

    @property
    def tokens(self) -> int:
        """Number of tokens of all levels."""
        return sum(h * w for h, w in self.levels)


def module_costs(detector: Detector, shape: Shape, primary: str = "primary") -> list[ModuleCost]:
    """Parameters of each module, and the FLOPs that it takes to detect objects in one image.

    The detector is traced as a whole, without what no detection depends on. A module's operations are those in the scope of
    its name.

    Args:
      detector: may be abstract.
      shape: (height, width) of the image.
      primary: name of the primary refiner, for the table.
    """
    graph, state = nnx.split(detector)

    def detect(state: nnx.State, images: jax.Array, sizes: jax.Array) -> Any:
        # All pairs of query and class are scored, however many of them are taken.
        return detections(graph, 1, state, images, sizes)

    inputs = abstract(1, *shape, 3, dtype=jnp.uint8), abstract(1, 2, dtype=jnp.int32)
    jaxpr = jax.make_jaxpr(detect)(state, *inputs).jaxpr
    needed, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    flops = flops_by_scope(needed, module_names(detector))
    variables = [(tuple(map(str, path)), variable) for path, variable in nnx.to_flat_state(state)]

    def cost(name: str, *scopes: str, within: str = "") -> ModuleCost:
        """The cost of what is in any of these scopes, like `refiner/layers`."""
        prefixes = [tuple(scope.split("/")) for scope in scopes]

        def is_in(path: tuple[str, ...]) -> bool:
            return any(path[: len(prefix)] == prefix for prefix in prefixes)

        sizes = [(isinstance(variable, nnx.Param), variable.size) for path, variable in variables if is_in(path)]
        trained = sum(size for is_trained, size in sizes if is_trained)
        frozen = sum(size for is_trained, size in sizes if not is_trained)
        return ModuleCost(name, trained, frozen, sum(count for path, count in flops.items() if is_in(path)), within)

    modules = [name for name, value in vars(detector).items() if isinstance(value, nnx.Module)]
    # In the order in which they compute; last come those that only training needs.
    order = list(dict.fromkeys(path[0] for path in flops if path))
    rows = [cost(name, name) for name in sorted(modules, key=lambda name: (order + modules).index(name))]
    place = next(place for place, row in enumerate(rows) if row.name == "refiner")
    layers = "refiner/layers"
    inside = [
        cost(f"{primary} (primary)", f"{layers}/primary", within="refiner"),
        *(
            cost(name, f"{layers}/auxiliaries/{index}", within="refiner")
            for index, name in enumerate(detector.refiner.branches)
        ),
        cost("merges", *(f"{layers}/merge_{point}" for point in MERGE_POINTS), within="refiner"),
        cost("RoIAlign", "refiner/regions", within="refiner"),
    ]
    counted = total([dataclasses.replace(row, within="") for row in inside])
    rest = {field: getattr(rows[place], field) - getattr(counted, field) for field in ("trained", "frozen", "flops")}
    inside.append(ModuleCost("positions, box offsets, norms", **rest, within="refiner"))
    return [*rows[: place + 1], *inside, *rows[place + 1 :]]


def total(costs: Sequence[ModuleCost]) -> ModuleCost:
    """The sum of the costs of all modules."""
    outer = [cost for cost in costs if not cost.within]
    return ModuleCost("total", *(sum(getattr(cost, field) for cost in outer) for field in ("trained", "frozen", "flops")))


def photographs(at_least: int = 1) -> Dataset:
    """A data set without images or objects: sizes of at least so many photographs, in the proportions of PHOTOGRAPHS."""
    sizes = [size for size, count in PHOTOGRAPHS.items() for _ in range(count)]
    sizes *= -(-at_least // len(sizes))
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
    records = (ImageAnnotations(index, height, width, *nothing) for index, (height, width) in enumerate(sizes))
    nowhere = ImageFolder(Path(), [""] * len(sizes))
    return Dataset("photographs", "", Classes((), ()), Records.pack(records, nowhere), None)


def evaluation_buckets(config: ConfigDict) -> dict[Shape, float]:
    """Buckets of evaluation, smallest first, and the share of common photographs in each."""
    settings = config.evaluate
    sizes = [g.size for g in evaluation_geometries(photographs().sizes, settings.side, settings.max_side, settings.canvas)]
    return _shares(choose_buckets(np.array(sizes), settings.buckets), sizes)


def training_buckets(config: ConfigDict) -> dict[Shape, float]:
    """Buckets of training, smallest first, and the share of images in each in one epoch on common photographs."""
    plan = make_plan(config, photographs(config.train.batch_size))
    return _shares(plan.buckets, [geometry.size for geometry in plan.draw(np.random.default_rng(config.train.seed))])


def _shares(buckets: Sequence[Shape], sizes: Sequence[Shape]) -> dict[Shape, float]:
    """The share of the sizes that is padded to each bucket."""
    used = [smallest_bucket(buckets, size) for size in sizes]
    return {bucket: used.count(bucket) / len(used) for bucket in buckets}


def static_shapes(detector: Detector, image: Shape, max_boxes: int | None = None) -> StaticShapes:
    """The static sizes that a detector has for one image.

    Args:
      detector: may be abstract.
      image: (height, width).
      max_boxes: room for ground-truth boxes in training; None for evaluation.
    """

    def run(detector, images, sizes, targets):
        maps, map_sizes = detector.neck(*detector.backbone(images, sizes, None))
        memory = flatten(maps, map_sizes, sizes)
        matching, dense = detector.query_init(memory, train=targets is not None)
        drawn = None
        if targets is not None and detector.denoiser is not None:
            drawn = detector.denoiser.draw(jax.random.key(0), targets).used
        return memory, matching.content, drawn, dense and dense.content

    targets = None if max_boxes is None else abstract_targets(1, max_boxes)
    sizes = abstract(1, 2, dtype=jnp.int32)
    memory, *queries = jax.eval_shape(run, detector, abstract(1, *image, 3), sizes, targets)
    return StaticShapes(image, memory.spatial_shapes, *(0 if kind is None else kind.shape[1] for kind in queries))


def inference_memory(config: ConfigDict, detector: Detector, image: Shape) -> dict[str, int]:
    """Bytes that inference takes for one batch of images of (height, width) `image`, by what they hold."""
    traced = traced_inference(config, detector, image, config.evaluate.batch_size)
    return {**traced.lasting, **traced.passing, **compiled_memory(traced.programs["inference"])}


def training_memory(config: ConfigDict, detector: Detector, image: Shape, max_boxes: int) -> dict[str, int]:
    """Bytes that a training step takes for images of (height, width) `image`, by what they hold.

    Args:
      max_boxes: room for ground-truth boxes in each view.
    """
    traced = traced_training(config, detector, image, config.train.batch_size, max_boxes)
    programs = [compiled_memory(program) for program in traced.programs.values()]
    temporaries = {"temporaries": max(program["temporaries"] for program in programs)} if all(programs) else {}
    return {**traced.lasting, **traced.passing, **temporaries}


def compiled_memory(program: jax.stages.Traced) -> dict[str, int]:
    """Bytes that XLA plans for a program: `results` that do not overwrite arguments, and `temporaries`.

    Returns:
      An empty dict if the backend does not tell.
    """
    memory = program.lower().compile().memory_analysis()
    if memory is None:
        return {}
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"results": results, "temporaries": memory.temp_size_in_bytes}

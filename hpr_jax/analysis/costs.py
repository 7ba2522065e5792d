"""What a detector costs: parameters and FLOPs by module, static shapes, and memory.

All of it follows from shapes: no data is read, no weights are made, nothing runs on the device.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr
from ml_collections import ConfigDict

from hpr_jax.analysis.flops import product_flops
from hpr_jax.data.augmentation.geometry import whole
from hpr_jax.data.build import make_plan
from hpr_jax.data.dataset import Classes, Dataset, Record, Records
from hpr_jax.data.loading.buckets import Shape, choose_buckets, smallest_bucket
from hpr_jax.inference.detect import make_detect
from hpr_jax.losses.build import make_criterion
from hpr_jax.models.detector import Detector
from hpr_jax.models.layers import layer
from hpr_jax.models.pyramid import Pyramid, flatten
from hpr_jax.models.refiner.hybrid import DecoderInput, HybridRefiner
from hpr_jax.models.refiner.interaction import Surroundings
from hpr_jax.models.refiner.layer import MERGE_POINTS, RefinerLayer
from hpr_jax.training.build import make_optimizer
from hpr_jax.training.state import TrainState
from hpr_jax.training.step import DeviceBatch, TrainStep
from hpr_jax.types import Targets

# (height, width) of common photographs, and how many of a thousand have it: about as in COCO, by assumption.
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
class Part:
    """Parameters of a module (how many numbers), and its floating-point operations for one image.

    Attributes:
      within: the part that this one belongs to, or "".
    """

    name: str
    trained: int
    frozen: int
    flops: int
    within: str = ""


@dataclasses.dataclass(frozen=True)
class StaticShapes:
    """What a bucket makes of the detector's static sizes, for one image.

    Attributes:
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
        return sum(h * w for h, w in self.levels)


def _trace(function: Callable, *inputs: Any) -> tuple[int, Any]:
    """FLOPs and abstract outputs of a function of abstract inputs; what the outputs do not depend on does not count."""
    jaxpr, outputs = jax.make_jaxpr(function, return_shape=True)(*inputs)
    needed, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.out_avals))
    return product_flops(needed), outputs


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _elements(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _part(name: str, modules: Iterable[nnx.Module | None], flops: int, within: str = "") -> Part:
    modules = [module for module in modules if module is not None]
    trained = sum(_elements(nnx.state(module, nnx.Param)) for module in modules)
    everything = sum(_elements(nnx.state(module)) for module in modules)
    return Part(name, trained, everything - trained, flops, within)


def parts_of(detector: Detector, shape: Shape, primary: str = "primary") -> list[Part]:
    """Parameters, and FLOPs of the detections in one image, module by module.

    Args:
      detector: may be abstract.
      shape: (height, width) of the image.
      primary: name of the refiner's primary path.
    """
    sizes = _array(1, 2, dtype=jnp.int32)
    backbone, (maps, map_sizes) = _trace(lambda m, *x: m(*x, None), detector.backbone, _array(1, *shape, 3), sizes)
    neck, (maps, map_sizes) = _trace(lambda m, *x: m(*x), detector.neck, maps, map_sizes)
    encoder, memory = _trace(lambda m, *x: m(flatten(*x)), detector.encoder, maps, map_sizes, sizes)

    def initial(query_init, memory):
        matching, _ = query_init(memory, with_dense=False)
        # The logits of the chosen are the losses'.
        return matching.content, matching.proposals.boxes, matching.duplicates

    query_init, (content, boxes, duplicates) = _trace(initial, detector.query_init, memory)
    count = content.shape[1]
    queries = DecoderInput(
        content=content,
        reference_boxes=boxes,
        mask=_array(1, count, count, dtype=bool),
        duplicates=duplicates,
        num_denoising=0,
        num_matching=count,
        num_dense=0,
    )
    refiner, decoded = _trace(lambda m, *x: m(*x), detector.refiner, queries, memory, detector.heads)
    heads, _ = _trace(
        lambda m, hidden, boxes: m.predict(hidden, boxes[:-1], 0), detector.heads, decoded.hidden, decoded.reference_boxes
    )
    inside = _refiner_parts(detector.refiner, queries, memory, refiner, primary)
    return [
        _part("backbone", [detector.backbone], backbone),
        _part("neck", [detector.neck], neck),
        _part("encoder", [detector.encoder], encoder),
        _part("query_init", [detector.query_init], query_init),
        _part("denoiser", [detector.denoiser], 0),
        _part("refiner", [detector.refiner], sum(part.flops for part in inside)),
        *inside,
        _part("heads", [detector.heads], heads),
        _part("branch_heads", [detector.branch_heads], 0),
    ]


def total(parts: Sequence[Part]) -> Part:
    """The sum of the parts."""
    parts = [part for part in parts if not part.within]
    return Part("total", *(sum(getattr(part, field) for part in parts) for field in ("trained", "frozen", "flops")))


def _refiner_parts(refiner: HybridRefiner, queries: DecoderInput, memory: Pyramid, flops: int, primary: str) -> list[Part]:
    """The paths of the refiner, their merges, and the rest; `flops` are those of all that the refiner computes."""
    layers = refiner.layers
    single: RefinerLayer = jax.eval_shape(lambda layers: layer(layers, 0), layers)
    depth = jax.tree.leaves(layers)[0].shape[0]
    content, mask, boxes = queries.content, queries.mask, queries.reference_boxes
    roi_align, regions = _trace(lambda m, *x: m.regions(*x), refiner, memory, boxes)
    surroundings = Surroundings(memory, boxes, regions)

    def path_flops(path):
        """Of a path's parts in all layers, in the order of MERGE_POINTS."""
        attention, _ = _trace(lambda m, x, mask: m.self_attention(x, x, mask), path.attention, content, mask)
        interaction, _ = _trace(lambda m, x, around: m(x, x, around), path.interaction, content, surroundings)
        ffn, _ = _trace(lambda m, x: m(x), path.ffn, content)
        return [depth * part for part in (attention, interaction, ffn)]

    paths = [single.primary, *single.auxiliaries]
    computed = [path_flops(path) for path in paths]
    # What auxiliary paths do behind the last merge is for their branches alone, which only training reads.
    merged = [getattr(single, f"merge_{point}") is not None for point in MERGE_POINTS]
    read = max((place + 1 for place, here in enumerate(merged) if here), default=0)
    used = [sum(computed[0]), *(sum(parts[:read]) for parts in computed[1:])]
    needing = [path.interaction.needs_regions for path in paths]
    sampling = depth * roi_align * any(needing)
    sampling_used = sampling * (needing[0] or read > MERGE_POINTS.index("interaction"))

    names = [f"{primary} (primary)", *refiner.branches]
    rest = [refiner.position, refiner.norm, refiner.branch_norms]
    return [
        *(_part(*row, "refiner") for row in zip(names, ([p] for p in (layers.primary, *layers.auxiliaries)), used)),
        _part("merges", [getattr(layers, f"merge_{point}") for point in MERGE_POINTS], 0, "refiner"),
        _part("RoIAlign", [], sampling_used, "refiner"),
        _part("positions, box offsets, norms", rest, flops - sampling - sum(map(sum, computed)), "refiner"),
    ]


def photographs(at_least: int = 1) -> Dataset:
    """A data set of photographs of common sizes, which has sizes alone; `at_least` so many."""
    sizes = [size for size, count in PHOTOGRAPHS.items() for _ in range(count)]
    sizes *= -(-at_least // len(sizes))
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
    records = (Record(index, None, height, width, *nothing) for index, (height, width) in enumerate(sizes))
    return Dataset("photographs", "", dict, Classes((), ()), Records.pack(records, images=()))


def evaluation_buckets(config: ConfigDict) -> dict[Shape, float]:
    """Buckets of evaluation, smallest first, and the share of photographs in each."""
    settings = config.evaluate
    sizes = [g.size for g in whole(photographs().sizes, settings.side, settings.max_side, settings.canvas)]
    return _shares(choose_buckets(np.array(sizes), settings.buckets), sizes)


def training_buckets(config: ConfigDict) -> dict[Shape, float]:
    """Buckets of training, smallest first, and the share of images in each in one epoch."""
    plan = make_plan(config, photographs(config.train.batch_size))
    return _shares(plan.buckets, [geometry.size for geometry in plan.draw(np.random.default_rng(config.train.seed))])


def _shares(buckets: Sequence[Shape], sizes: Sequence[Shape]) -> dict[Shape, float]:
    used = [smallest_bucket(buckets, size) for size in sizes]
    return {bucket: used.count(bucket) / len(used) for bucket in buckets}


def static_shapes(detector: Detector, image: Shape, max_boxes: int | None = None) -> StaticShapes:
    """Sizes for one image of (height, width) `image`; in training if there is room for `max_boxes` boxes."""

    def run(detector, images, sizes, targets):
        memory = flatten(*detector.neck(*detector.backbone(images, sizes, None)), sizes)
        matching, dense = detector.query_init(memory, with_dense=targets is not None)
        drawn = None
        if targets is not None and detector.denoiser is not None:
            drawn = detector.denoiser.draw(jax.random.key(0), targets).used
        return memory, matching.content, drawn, dense and dense.content

    targets = None if max_boxes is None else _targets(1, max_boxes)
    sizes = _array(1, 2, dtype=jnp.int32)
    memory, *queries = jax.eval_shape(run, detector, _array(1, *image, 3), sizes, targets)
    return StaticShapes(image, memory.spatial_shapes, *(0 if kind is None else kind.shape[1] for kind in queries))


def _targets(batch: int, max_boxes: int) -> Targets:
    return Targets(
        boxes=_array(batch, max_boxes, 4),
        labels=_array(batch, max_boxes, dtype=jnp.int32),
        valid=_array(batch, max_boxes, dtype=bool),
        sizes=_array(batch, 2, dtype=jnp.int32),
    )


def inference_memory(config: ConfigDict, detector: Detector, image: Shape) -> dict[str, int]:
    """Bytes of what inference on one batch of (height, width) `image` keeps in memory, by what it is."""
    graph, state = nnx.split(detector)
    batch = config.evaluate.batch_size
    inputs = _array(batch, *image, 3, dtype=jnp.uint8), _array(batch, 2, dtype=jnp.int32)
    detect = make_detect(graph, config.evaluate.detections)
    return {"parameters": _bytes(state), "batch": _bytes(inputs), **compiled_memory(detect, state, *inputs)}


def training_memory(config: ConfigDict, detector: Detector, image: Shape, max_boxes: int) -> dict[str, int]:
    """The same of one training step."""
    graph, params, frozen = nnx.split(detector, nnx.Param, ...)
    optimizer, settings = make_optimizer(config), config.train
    moments = jax.eval_shape(optimizer.init, params)
    average = params if settings.ema_decay else None
    state = TrainState(_array(dtype=jnp.int32), params, frozen, moments, average)
    views = 1 + config.augmentation.strong_views
    images = _array(views, settings.batch_size, *image, 3, dtype=jnp.uint8)
    targets = jax.tree.map(lambda x: _array(views, settings.batch_size, *x.shape[1:], dtype=x.dtype), _targets(1, max_boxes))
    batch, part = DeviceBatch(images=images, targets=targets), _array(dtype=jnp.int32)
    parts, variables = settings.accumulation_steps, state.replace(optimizer=None, average=None)
    step = TrainStep(graph, make_criterion(config), optimizer, settings.seed, parts=parts)
    forward = jax.eval_shape(step.forward, variables, batch, part)
    assigned = [_array(*request.cost.shape[:3], dtype=jnp.int32) for request in forward.requests]
    losses = batch, [forward.outputs] * parts, forward.denoising, [assigned] * parts
    _, cotangents = jax.eval_shape(step.loss, *losses)
    gradients = jax.eval_shape(step.backward, variables, forward.pullback, cotangents[-1])
    programs = (
        compiled_memory(step.forward, variables, batch, part),
        compiled_memory(step.loss, *losses),
        compiled_memory(step.backward, variables, forward.pullback, cotangents[-1]),
        compiled_memory(step.update, state, gradients, 0.0),
    )
    return {
        "parameters": _bytes((params, frozen, average)),
        "optimizer moments": _bytes(moments),
        "batch": _bytes(batch),
        "gradients": _bytes(gradients) * min(parts, 2),
        "kept for the backward pass": _bytes(forward),
        **({"temporaries": max(program["temporaries"] for program in programs)} if all(programs) else {}),
    }


def compiled_memory(function: Callable, *inputs: Any) -> dict[str, int]:
    """Bytes of the results that do not replace inputs, and of all temporaries, as XLA plans them; {} if it does not tell."""
    memory = function.lower(*inputs).compile().memory_analysis()
    if memory is None:
        return {}
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"results": results, "temporaries": memory.temp_size_in_bytes}

"""What a detector costs: parameters and FLOPs by module, static shapes, and memory.

All of it follows from shapes: no data is read, no weights are made, nothing runs on the device.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr
from ml_collections import ConfigDict

from hpr_jax.analysis.flops import product_flops
from hpr_jax.data.augmentation.crop_resize_flip import evaluation_geometries
from hpr_jax.data.build import make_plan
from hpr_jax.data.dataset import Classes, Dataset, ImageAnnotations, Records
from hpr_jax.data.images import ImageFolder
from hpr_jax.data.loading.batch_plan import Shape, choose_buckets, smallest_bucket
from hpr_jax.inference.detect import make_detect
from hpr_jax.losses.build import make_criterion
from hpr_jax.models.detector import Detector
from hpr_jax.models.layers import layer
from hpr_jax.models.pyramid import Pyramid, flatten
from hpr_jax.models.refiner.hybrid import DecoderInput, HybridRefiner
from hpr_jax.models.refiner.interaction import Surroundings
from hpr_jax.models.refiner.layer import RefinerLayer
from hpr_jax.models.refiner.merge import MERGE_POINTS
from hpr_jax.training.build import make_optimizer
from hpr_jax.training.state import TrainState
from hpr_jax.training.step import DeviceBatch, TrainStep
from hpr_jax.types import Targets

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


def _trace(function: Callable, *inputs: Any) -> tuple[int, Any]:
    """FLOPs and abstract outputs of a function of abstract inputs. Operations that no output depends on do not count."""
    jaxpr, outputs = jax.make_jaxpr(function, return_shape=True)(*inputs)
    needed, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.out_avals))
    return product_flops(needed), outputs


def _array(*shape: int, dtype: Any = jnp.float32) -> Any:
    """An abstract array. Its type is Any, as it takes the place of arrays."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _num_elements(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _cost(name: str, modules: Iterable[Any], flops: int, within: str = "") -> ModuleCost:
    """The cost of several modules together; None stands for a module that the detector lacks."""
    present = [module for module in modules if module is not None]
    trained = sum(_num_elements(nnx.state(module, nnx.Param)) for module in present)
    everything = sum(_num_elements(nnx.state(module)) for module in present)
    return ModuleCost(name, trained, everything - trained, flops, within)


def module_costs(detector: Detector, shape: Shape, primary: str = "primary") -> list[ModuleCost]:
    """Parameters of each module, and the FLOPs that it takes to detect objects in one image.

    Args:
      detector: may be abstract.
      shape: (height, width) of the image.
      primary: name of the primary refiner, for the table.
    """
    sizes = _array(1, 2, dtype=jnp.int32)
    backbone, (maps, map_sizes) = _trace(lambda m, *x: m(*x, None), detector.backbone, _array(1, *shape, 3), sizes)
    neck, (maps, map_sizes) = _trace(lambda m, *x: m(*x), detector.neck, maps, map_sizes)
    encoder, memory = _trace(lambda m, *x: m(flatten(*x)), detector.encoder, maps, map_sizes, sizes)

    def initial(query_init, memory):
        matching, _ = query_init(memory, train=False)
        # Logits of the selected proposals are left out: the losses alone read them.
        return matching.content, matching.proposals.boxes, matching.duplicates, matching.position

    query_init, (content, boxes, duplicates, position) = _trace(initial, detector.query_init, memory)
    count = content.shape[1]
    queries = DecoderInput(
        content=content,
        reference_boxes=boxes,
        mask=_array(1, count, count, dtype=bool),
        duplicates=duplicates,
        num_denoising=0,
        num_matching=count,
        num_dense=0,
        position=position,
    )
    refiner, decoded = _trace(lambda m, *x: m(*x), detector.refiner, queries, memory, detector.heads)
    heads, _ = _trace(
        lambda m, hidden, boxes: m.predict(hidden, boxes[:-1], 0), detector.heads, decoded.hidden, decoded.reference_boxes
    )
    inside = _refiner_costs(detector.refiner, queries, memory, refiner, primary)
    return [
        _cost("backbone", [detector.backbone], backbone),
        _cost("neck", [detector.neck], neck),
        _cost("encoder", [detector.encoder], encoder),
        _cost("query_init", [detector.query_init], query_init),
        _cost("denoiser", [detector.denoiser], 0),
        _cost("refiner", [detector.refiner], sum(cost.flops for cost in inside)),
        *inside,
        _cost("heads", [detector.heads], heads),
        _cost("branch_heads", [detector.branch_heads], 0),
    ]


def total(costs: Sequence[ModuleCost]) -> ModuleCost:
    """The sum of the costs of all modules."""
    outer = [cost for cost in costs if not cost.within]
    return ModuleCost("total", *(sum(getattr(cost, field) for cost in outer) for field in ("trained", "frozen", "flops")))


def _refiner_costs(
    refiner: HybridRefiner, queries: DecoderInput, memory: Pyramid, flops: int, primary: str
) -> list[ModuleCost]:
    """The costs of the refiner's paths, of their merges, and of the rest.

    Args:
      flops: of everything that the refiner computes.
      primary: name of the primary refiner.
    """
    layers = refiner.layers
    one_layer: RefinerLayer = jax.eval_shape(lambda layers: layer(layers, 0), layers)
    depth = jax.tree.leaves(layers)[0].shape[0]
    content, mask, boxes = queries.content, queries.mask, queries.reference_boxes
    roi_align, regions = _trace(lambda m, *x: m.regions(*x), refiner, memory, boxes)
    surroundings = Surroundings(memory, boxes, regions)

    def path_flops(path):
        """FLOPs of a path in all layers: of its self-attention, interaction and FFN, in the order of MERGE_POINTS."""
        attention, _ = _trace(lambda m, x, mask: m.self_attention(x, x, mask), path.attention, content, mask)
        interaction, _ = _trace(lambda m, x, around: m(x, x, around), path.interaction, content, surroundings)
        ffn, _ = _trace(lambda m, x: m(x), path.ffn, content)
        return [depth * count for count in (attention, interaction, ffn)]

    paths = [one_layer.primary, *one_layer.auxiliaries]
    computed = [path_flops(path) for path in paths]
    # Behind the last merge, auxiliary paths compute for their branches alone, which detections do not depend on.
    merged = [getattr(one_layer, f"merge_{point}") is not None for point in MERGE_POINTS]
    num_merged = max((place + 1 for place, is_merged in enumerate(merged) if is_merged), default=0)
    used = [sum(computed[0]), *(sum(counts[:num_merged]) for counts in computed[1:])]
    needs_regions = [path.interaction.needs_regions for path in paths]
    sampling = depth * roi_align * any(needs_regions)
    sampling_used = sampling * (needs_regions[0] or num_merged > MERGE_POINTS.index("interaction"))

    names = [f"{primary} (primary)", *refiner.branches]
    rest = [refiner.position, refiner.norm, refiner.branch_norms]
    return [
        *(
            _cost(name, [path], count, "refiner")
            for name, path, count in zip(names, (layers.primary, *layers.auxiliaries), used)
        ),
        _cost("merges", [getattr(layers, f"merge_{point}") for point in MERGE_POINTS], 0, "refiner"),
        _cost("RoIAlign", [], sampling_used, "refiner"),
        _cost("positions, box offsets, norms", rest, flops - sampling - sum(map(sum, computed)), "refiner"),
    ]


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

    targets = None if max_boxes is None else _targets(1, max_boxes)
    sizes = _array(1, 2, dtype=jnp.int32)
    memory, *queries = jax.eval_shape(run, detector, _array(1, *image, 3), sizes, targets)
    return StaticShapes(image, memory.spatial_shapes, *(0 if kind is None else kind.shape[1] for kind in queries))


def _targets(batch: int, max_boxes: int) -> Targets:
    """Abstract ground truth."""
    return Targets(
        boxes=_array(batch, max_boxes, 4),
        labels=_array(batch, max_boxes, dtype=jnp.int32),
        valid=_array(batch, max_boxes, dtype=bool),
        sizes=_array(batch, 2, dtype=jnp.int32),
    )


def inference_memory(config: ConfigDict, detector: Detector, image: Shape) -> dict[str, int]:
    """Bytes that inference takes for one batch of images of (height, width) `image`, by what they hold."""
    graph, state = nnx.split(detector)
    batch = config.evaluate.batch_size
    inputs = _array(batch, *image, 3, dtype=jnp.uint8), _array(batch, 2, dtype=jnp.int32)
    detect = make_detect(graph, config.evaluate.detections)
    return {"parameters": _num_bytes(state), "batch": _num_bytes(inputs), **compiled_memory(detect, state, *inputs)}


def training_memory(config: ConfigDict, detector: Detector, image: Shape, max_boxes: int) -> dict[str, int]:
    """Bytes that a training step takes for images of (height, width) `image`, by what they hold.

    Args:
      max_boxes: room for ground-truth boxes in each view.
    """
    graph, everything = nnx.split(detector)
    params, frozen = nnx.split_state(everything, nnx.Param, ...)
    optimizer, settings = make_optimizer(config), config.train
    moments = jax.eval_shape(optimizer.init, params)
    average = params if settings.ema_decay else None
    state = TrainState(_array(dtype=jnp.int32), params, frozen, moments, average)
    views = 1 + config.augmentation.strong_views
    images = _array(views, settings.batch_size, *image, 3, dtype=jnp.uint8)
    targets = jax.tree.map(lambda x: _array(views, settings.batch_size, *x.shape[1:], dtype=x.dtype), _targets(1, max_boxes))
    batch, part = DeviceBatch(images=images, targets=targets), _array(dtype=jnp.int32)
    parts, variables = settings.accumulation_steps, dataclasses.replace(state, optimizer=None, average=None)
    step = TrainStep(graph, make_criterion(config), optimizer, settings.seed, parts=parts)
    forward = jax.eval_shape(step.forward, variables, batch, part)
    assigned = [_array(*request.query_valid.shape, dtype=jnp.int32) for request in forward.requests]
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
        "parameters": _num_bytes((params, frozen, average)),
        "optimizer moments": _num_bytes(moments),
        "batch": _num_bytes(batch),
        "gradients": _num_bytes(gradients) * min(parts, 2),
        "saved for the backward pass": _num_bytes(forward),
        **({"temporaries": max(program["temporaries"] for program in programs)} if all(programs) else {}),
    }


def compiled_memory(function: jax.stages.Wrapped, *inputs: Any) -> dict[str, int]:
    """Bytes that XLA plans for a compiled function: `results` that do not overwrite inputs, and `temporaries`.

    Args:
      function: jitted.
      inputs: may be abstract.

    Returns:
      An empty dict if the backend does not tell.
    """
    memory = function.lower(*inputs).compile().memory_analysis()
    if memory is None:
        return {}
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"results": results, "temporaries": memory.temp_size_in_bytes}

"""From a config to a detector: the one file of the models that reads configs."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.backbones.resnet import ResNet
from hpr_jax.models.backbones.swin import SwinTransformer
from hpr_jax.models.detector import Detector
from hpr_jax.models.encoder import Encoder
from hpr_jax.models.heads import DecoderHeads, PredictionHead
from hpr_jax.models.neck import ChannelMapper
from hpr_jax.models.queries.denoising import Denoiser
from hpr_jax.models.queries.distinct import DistinctQueries
from hpr_jax.models.queries.top import TopQueries
from hpr_jax.models.refiner.deformable import DeformableRefiner
from hpr_jax.models.refiner.dynamic_conv import DynamicConv
from hpr_jax.models.refiner.global_attention import GlobalAttention
from hpr_jax.models.refiner.hybrid import HybridRefiner, RegionSettings
from hpr_jax.models.refiner.interaction import InteractionFactory
from hpr_jax.models.refiner.layer import RefinerLayer
from hpr_jax.models.refiner.point import PointRefiner
from hpr_jax.models.refiner.region_fc import RegionFC
from hpr_jax.models.refiner.regional_attention import RegionalAttention
from hpr_jax.ops.dispatch import IMPLEMENTATIONS

Config = Mapping[str, Any]


DTYPES = ("float32", "bfloat16")
# Sampling and RoIAlign; `auto` takes the kernels on NVIDIA GPUs.
OPERATIONS = ("auto", *IMPLEMENTATIONS)
# Parts that can compute their inner values again in the backward pass.
REMAT = ("backbone", "encoder", "refiner")


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a detector computes, which says nothing of its weights: the `compute` section of a config.

    Attributes:
      dtype: of activations, one of `DTYPES`.
      operations: one of `OPERATIONS`.
      remat: some of `REMAT`.

    Raises:
      UserError: a value that is none of these, or kernels where there is no GPU.
    """

    dtype: str = "float32"
    operations: str = "auto"
    remat: Sequence[str] = ("encoder", "refiner")

    def __post_init__(self):
        for key, values, known in (
            ("dtype", (self.dtype,), DTYPES),
            ("operations", (self.operations,), OPERATIONS),
            ("remat", self.remat, REMAT),
        ):
            for value in values:
                if value not in known:
                    raise UserError(f"config.compute.{key} names {value!r}; known are {', '.join(known)}.")
        if self.operations == "pallas" and jax.default_backend() != "gpu":
            raise UserError(
                f"config.compute.operations 'pallas' needs an NVIDIA GPU, and JAX has found only the platform "
                f"{jax.default_backend()}; set it to 'auto'."
            )

    @property
    def implementation(self) -> str | None:
        return None if self.operations == "auto" else self.operations


def random_detector(config: Config, num_classes: int, *, compute: Config | None = None, seed: int = 0) -> Detector:
    """`build_detector` with random weights, compiled."""
    # This generator's programs compile several times faster than the default one's.
    key = jax.random.key(seed, impl="rbg")
    return nnx.merge(*builder(config, num_classes, compute)(key))


def builder(
    config: Config, num_classes: int, compute: Config | None
) -> Callable[[jax.Array], tuple[nnx.GraphDef, nnx.State]]:
    """Jitted: key -> `build_detector`'s detector, split. Not cached: at full size the program takes 200 MB, and a process
    needs it once."""
    return jax.jit(lambda key: nnx.split(build_detector(config, num_classes, compute=compute, rngs=nnx.Rngs(key))))


def build_detector(config: Config, num_classes: int, *, compute: Config | None = None, rngs: nnx.Rngs) -> Detector:
    """Detector of the `model` section of a config, which computes as its `compute` section says.

    Raises:
      UserError: a setting that names nothing known, or settings that do not fit one another.
    """
    _check_counts(config)
    compute = Compute(**(compute or {}))
    channels, levels, strides = config["channels"], config["levels"], config["refiner"]["region"]["strides"]
    backbone = _backbone(config["backbone"], "backbone" in compute.remat, rngs)
    if levels < len(backbone.out_channels) or levels != len(strides):
        raise UserError(
            f"config.model.levels is {levels}; it must be at least {len(backbone.out_channels)}, the maps of the backbone, "
            f"and the number of config.model.refiner.region.strides, {len(strides)}."
        )
    neck = ChannelMapper(
        backbone.out_channels,
        channels,
        config["levels"],
        groups=config["neck"]["groups"],
        bias=config["neck"]["bias"],
        rngs=rngs,
    )
    encoder = Encoder(
        layers=config["encoder"]["layers"],
        channels=channels,
        heads=config["heads"],
        levels=config["levels"],
        points=config["points"],
        hidden=config["hidden"],
        position_temperature=config["encoder"]["position_temperature"],
        position_offset=config["encoder"]["position_offset"],
        remat="encoder" in compute.remat,
        implementation=compute.implementation,
        rngs=rngs,
    )
    refiner = _refiner(config, compute, rngs)
    head = PredictionHead(channels, num_classes, rngs=rngs)
    distinct = config["queries"]["kind"] == "distinct"
    # The official heads of all layers start as copies of one; DDQ's branches start from the primary branch's, too.
    branch_heads = [head if distinct else PredictionHead(channels, num_classes, rngs=rngs) for _ in refiner.branches]
    layers, denoising = config["refiner"]["layers"], config["denoising"]
    return Detector(
        backbone=backbone,
        neck=neck,
        encoder=encoder,
        query_init=_query_init(config, head, rngs),
        denoiser=Denoiser(num_classes, channels, rngs=rngs, **denoising) if denoising["queries"] else None,
        refiner=refiner,
        heads=DecoderHeads(head, layers, with_dense=distinct),
        branch_heads=[DecoderHeads(branch_head, layers, with_dense=distinct) for branch_head in branch_heads],
        pixel_mean=config["pixel_mean"],
        pixel_std=config["pixel_std"],
        dtype=compute.dtype,
    )


def _query_init(config: Config, head: PredictionHead, rngs: nnx.Rngs) -> TopQueries | DistinctQueries:
    queries, channels = config["queries"], config["channels"]
    if queries["kind"] == "top":
        return TopQueries(_copy(head), channels, queries=queries["count"], rngs=rngs)
    if queries["kind"] != "distinct":
        raise UserError(f"config.model.queries.kind is {queries['kind']!r}; known are top and distinct.")
    for key in ("dense_ratio", "nms_threshold"):
        if key not in queries:
            raise UserError(f"config.model.queries.kind 'distinct' needs config.model.queries.{key}; see configs/ddq.py.")
    return DistinctQueries(
        _copy(head),
        _copy(head),
        channels,
        queries=queries["count"],
        dense_ratio=queries["dense_ratio"],
        nms_threshold=queries["nms_threshold"],
        rngs=rngs,
    )


def interactions(config: Config, implementation: str | None = None) -> dict[str, InteractionFactory]:
    """The refiners that settings can name, by name."""
    channels, refiner, levels = config["channels"], config["refiner"], config["levels"]
    size = refiner["region"]["output_size"]
    return {
        "deformable": lambda rngs: DeformableRefiner(
            channels, config["heads"], levels, config["points"], implementation=implementation, rngs=rngs
        ),
        "dynamic_conv": lambda rngs: DynamicConv(channels, region_size=size, rngs=rngs, **refiner["dynamic_conv"]),
        "regional_attention": lambda rngs: RegionalAttention(
            channels, region_size=size, rngs=rngs, **refiner["regional_attention"]
        ),
        "global_attention": lambda rngs: GlobalAttention(channels, levels=levels, rngs=rngs, **refiner["global_attention"]),
        "region_fc": lambda rngs: RegionFC(channels, region_size=size, rngs=rngs, **refiner["region_fc"]),
        "point": lambda rngs: PointRefiner(channels, rngs=rngs),
    }


def _refiner(config: Config, compute: Compute, rngs: nnx.Rngs) -> HybridRefiner:
    refiner, channels = config["refiner"], config["channels"]
    known = interactions(config, compute.implementation)
    names = (refiner["primary"], *refiner["auxiliaries"])
    for name in names:
        if name not in known:
            raise UserError(f"config.model.refiner names the refiner {name!r}; known are {', '.join(sorted(known))}.")
    if len(set(names)) != len(names):
        raise UserError(f"config.model.refiner names a refiner twice: {', '.join(names)}.")
    if refiner["merge_xavier"] and (refiner["merge_initial"] or refiner["merge"] != "learned_vector"):
        raise UserError(
            "config.model.refiner.merge_xavier draws the weights of a learned_vector at random; for other merges and "
            "initial weights set --config.model.refiner.merge_xavier=False."
        )

    def make_layer(rngs):
        return RefinerLayer(
            known[names[0]],
            [known[name] for name in names[1:]],
            channels,
            config["heads"],
            config["hidden"],
            merge=refiner["merge"],
            merge_points=refiner["merge_points"],
            merge_initial="xavier" if refiner["merge_xavier"] else tuple(refiner["merge_initial"]),
            rngs=rngs,
        )

    return HybridRefiner(
        make_layer,
        layers=refiner["layers"],
        channels=channels,
        branches=names[1:],
        nms_threshold=config["queries"].get("nms_threshold"),
        region=RegionSettings(
            **{**refiner["region"], "strides": tuple(refiner["region"]["strides"])}, implementation=compute.implementation
        ),
        remat="refiner" in compute.remat,
        rngs=rngs,
    )


def _backbone(config: Config, remat: bool, rngs: nnx.Rngs) -> ResNet | SwinTransformer:
    kinds = {"resnet": ResNet, "swin": SwinTransformer}
    if config["kind"] not in kinds:
        raise UserError(f"config.model.backbone.kind is {config['kind']!r}; known are {', '.join(kinds)}.")
    make, settings = kinds[config["kind"]], {key: value for key, value in config.items() if key != "kind"}
    for key in settings:
        if key == "remat" or key not in inspect.signature(make.__init__).parameters:
            raise UserError(f"config.model.backbone.{key} does not suit the kind {config['kind']!r}; see configs/common.py.")
    return make(rngs=rngs, remat=remat, **settings)


def _check_counts(config: Config) -> None:
    """Sizes below one."""
    refiner = config["refiner"]
    sections = {
        "": config,
        "encoder.": config["encoder"],
        "queries.": config["queries"],
        "refiner.": refiner,
        **{f"refiner.{key}.": value for key, value in refiner.items() if hasattr(value, "items")},
    }
    counts = ("channels", "heads", "levels", "points", "hidden", "layers", "count", "samples")
    for prefix, section in sections.items():
        for key in (*counts, "output_size", "sampling_ratio", "temperature", "position_temperature"):
            if key in section and section[key] <= 0:
                raise UserError(f"config.model.{prefix}{key} is {section[key]}; it must be at least 1.")
    denoising = config["denoising"]
    if denoising["queries"] < 0 or denoising["views_per_chunk"] < 1:
        raise UserError("config.model.denoising.queries must be at least 0, and views_per_chunk at least 1.")


def _copy(module):
    return jax.tree.map(lambda leaf: leaf.copy(), module)


def abstract_detector(
    model_config: Mapping[str, Any], num_classes: int, compute: Mapping[str, Any] | None = None
) -> Detector:
    """A detector of shapes without values, to be filled."""
    return nnx.eval_shape(lambda: build_detector(model_config, num_classes, compute=compute, rngs=nnx.Rngs(0)))

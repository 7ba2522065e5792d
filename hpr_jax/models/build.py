"""From a config to a detector. No other file of the models reads a config; this one reads its sections model and compute.

A word in a config is the name of a file: `backbone.kind` in backbones/, `queries.kind` in queries/, and the names of
refiners in refiner/.

How to add a refiner, say `my_refiner`:

1. Write refiner/my_refiner.py with a module for its interaction with the image, an `Interaction`. Its constructor takes
   `SharedSettings`, then its own settings by keyword, then `rngs`.
2. Import the module here, and add the line `"my_refiner": MyRefiner,` to `INTERACTIONS`.

Then `refiner.primary` and `refiner.auxiliaries` can name it. If it has settings of its own, they are the section
`refiner.my_refiner` (defaults in configs/common.py), which is passed to it as it is. A backbone is added in the same way, to
`BACKBONES`; its settings are the section `backbone`. The table of settings.py, which checks configs before JAX is imported,
lists the same words and each setting's range. A refiner of another program, or of a notebook, needs no line here: that
program calls `register_refiner`.
"""

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.backbones.resnet import ResNet
from hpr_jax.models.backbones.swin import SwinTransformer
from hpr_jax.models.detector import Backbone, Detector, QueryInit
from hpr_jax.models.encoder import Encoder
from hpr_jax.models.heads import DecoderHeads, PredictionHead
from hpr_jax.models.layers import freeze
from hpr_jax.models.neck import ChannelMapper
from hpr_jax.models.queries.denoising import Denoiser
from hpr_jax.models.queries.distinct import DistinctQueries
from hpr_jax.models.queries.positions import PositionQueries
from hpr_jax.models.queries.top import TopQueries
from hpr_jax.models.refiner.deformable import DeformableInteraction
from hpr_jax.models.refiner.dynamic_conv import DynamicConv
from hpr_jax.models.refiner.global_attention import GlobalAttention
from hpr_jax.models.refiner.hybrid import HybridRefiner, RegionSettings
from hpr_jax.models.refiner.interaction import Interaction, InteractionFactory, SharedSettings
from hpr_jax.models.refiner.layer import RefinerLayer
from hpr_jax.models.refiner.point import PointInteraction
from hpr_jax.models.refiner.region_fc import RegionFC
from hpr_jax.models.refiner.regional_attention import RegionalAttention
from hpr_jax.ops.platform import target_platform
from hpr_jax.settings import DTYPES, OPERATIONS, PRECISIONS, REFINERS, REMAT, SETTINGS, check_refiners

Config = Mapping[str, Any]
AnyInteraction = TypeVar("AnyInteraction", bound=type[Interaction])

# The interactions of the refiners that `config.model.refiner` can name.
INTERACTIONS: dict[str, Callable[..., Interaction]] = {
    "deformable": DeformableInteraction,
    "dynamic_conv": DynamicConv,
    "global_attention": GlobalAttention,
    "point": PointInteraction,
    "region_fc": RegionFC,
    "regional_attention": RegionalAttention,
}
# The names of those that come with this package.
_OWN_REFINERS = frozenset(INTERACTIONS)
# The values of `config.model.backbone.kind`.
BACKBONES: dict[str, Callable[..., Backbone]] = {"resnet": ResNet, "swin": SwinTransformer}
# The values of `config.model.queries.kind`.
QUERIES: dict[str, Callable[..., QueryInit]] = {
    "top": TopQueries,
    "positions": PositionQueries,
    "distinct": DistinctQueries,
}


def register_refiner(name: str) -> Callable[[AnyInteraction], AnyInteraction]:
    """Adds a refiner, which `config.model.refiner` can name from then on: a decorator of the class of its interaction.

    @hpr_jax.register_refiner("my_refiner")
    class MyRefiner(nnx.Module): ...  # an `Interaction`

    The constructor takes `SharedSettings`, then settings of its own by keyword, then `rngs`. Its settings have defaults, or
    are the section `config.model.refiner.my_refiner` of a config. Checkpoints store the name alone: a program that loads one
    registers the class first. Another class may follow under the same name, as when a notebook's cell runs again.

    Args:
      name: small letters, digits and underscores.

    Raises:
      UserError: the name is taken, or is no such name; or what is decorated is no interaction.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"A refiner cannot have the name {name!r}; take small letters, digits and underscores.")
    if name in _OWN_REFINERS or any(f"{key}.".startswith(f"model.refiner.{name}.") for key in SETTINGS):
        raise UserError(f"The name {name!r} has a meaning in config.model.refiner already; choose another for your refiner.")

    def register(interaction: AnyInteraction) -> AnyInteraction:
        if not (isinstance(interaction, type) and issubclass(interaction, nnx.Module)):
            raise UserError(f"The refiner {name!r} must be a subclass of flax.nnx.Module.")
        if not isinstance(getattr(interaction, "needs_regions", None), bool):
            raise UserError(
                f"The refiner {name!r} must say by a class attribute, needs_regions = True or False, whether it reads "
                "surroundings.regions."
            )
        INTERACTIONS[name] = interaction
        if name not in REFINERS:
            REFINERS.append(name)
        return interaction

    return register


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a detector computes, whatever its weights: the section `compute` of a config.

    Attributes:
      dtype: type of activations, one of `DTYPES`.
      operations: how sampling and RoIAlign are computed, one of `OPERATIONS`; `auto` takes the kernels on NVIDIA GPUs.
      remat: parts whose inner values the backward pass computes again, some of `REMAT`.
      precision: of products of float32 numbers, one of `PRECISIONS`; see `ops.precision`.

    Raises:
      UserError: a value that is none of these, or kernels where there is no GPU.
    """

    dtype: str = "float32"
    operations: str = "auto"
    remat: Sequence[str] = ("encoder", "refiner")
    precision: str = "default"

    def __post_init__(self):
        for key, values, known in (
            ("dtype", (self.dtype,), DTYPES),
            ("operations", (self.operations,), OPERATIONS),
            ("remat", self.remat, REMAT),
            ("precision", (self.precision,), PRECISIONS),
        ):
            for value in values:
                if value not in known:
                    raise UserError(f"config.compute.{key} names {value!r}; known are {', '.join(known)}.")
        if self.operations == "pallas" and target_platform() != "gpu":
            raise UserError(
                f"config.compute.operations 'pallas' needs an NVIDIA GPU, and JAX has found only the platform "
                f"{target_platform()}; set it to 'auto'."
            )

    @property
    def implementation(self) -> str | None:
        """The argument of that name of the operations that have a kernel."""
        return None if self.operations == "auto" else self.operations


def random_detector(config: Config, num_classes: int, *, compute: Config | None = None, seed: int = 0) -> Detector:
    """The detector of `build_detector` with random weights, drawn by a compiled program."""
    # Programs that draw with this generator compile several times faster than with the default one.
    key = jax.random.key(seed, impl="rbg")
    return nnx.merge(*builder(config, num_classes, compute)(key))


def builder(
    config: Config, num_classes: int, compute: Config | None
) -> Callable[[jax.Array], tuple[nnx.GraphDef, nnx.State]]:
    """A compiled function from a random key to the detector of `build_detector`, split. It is not cached: at full size the
    program takes 200 MB, and a process needs it once."""
    return jax.jit(lambda key: nnx.split(build_detector(config, num_classes, compute=compute, rngs=nnx.Rngs(key))))


def build_detector(config: Config, num_classes: int, *, compute: Config | None = None, rngs: nnx.Rngs) -> Detector:
    """The detector that the section `model` of a config describes.

    Args:
      config: the section `model`.
      num_classes: K.
      compute: the section `compute`, which says how it computes; None: with the default values of `Compute`.

    Raises:
      UserError: a setting that names nothing known, or settings that do not fit one another.
    """
    computing = Compute(**(compute or {}))
    channels, levels, strides = config["channels"], config["levels"], config["refiner"]["region"]["strides"]
    backbone = _backbone(config["backbone"], "backbone" in computing.remat, rngs)
    if levels < len(backbone.out_channels) or levels != len(strides):
        raise UserError(
            f"config.model.levels is {levels}; it must be at least {len(backbone.out_channels)}, the maps of the backbone, "
            f"and the number of config.model.refiner.region.strides, {len(strides)}."
        )
    with _section("neck"):
        neck = ChannelMapper(
            backbone.out_channels,
            channels,
            levels,
            groups=config["neck"]["groups"],
            bias=config["neck"]["bias"],
            rngs=rngs,
        )
    with _section("heads"):
        encoder = Encoder(
            layers=config["encoder"]["layers"],
            channels=channels,
            heads=config["heads"],
            levels=levels,
            points=config["points"],
            hidden=config["hidden"],
            position_temperature=config["encoder"]["position_temperature"],
            position_offset=config["encoder"]["position_offset"],
            remat="encoder" in computing.remat,
            implementation=computing.implementation,
            rngs=rngs,
        )
    refiner = _refiner(config, computing, rngs)
    head = PredictionHead(channels, num_classes, rngs=rngs)
    distinct = config["queries"]["kind"] == "distinct"
    # As published, the heads of a branch's layers start as copies of one head; in DDQ it is the same head for all branches.
    branch_heads = [head if distinct else PredictionHead(channels, num_classes, rngs=rngs) for _ in refiner.branches]
    layers, denoising = config["refiner"]["layers"], config["denoising"]
    detector = Detector(
        backbone=backbone,
        neck=neck,
        encoder=encoder,
        query_init=_query_init(config, computing, head, rngs),
        denoiser=Denoiser(num_classes, channels, rngs=rngs, **denoising) if denoising["queries"] else None,
        refiner=refiner,
        heads=DecoderHeads(head, layers, with_dense=distinct),
        branch_heads=[DecoderHeads(branch_head, layers, with_dense=distinct) for branch_head in branch_heads],
        pixel_mean=config["pixel_mean"],
        pixel_std=config["pixel_std"],
        dtype=computing.dtype,
        precision=computing.precision,
    )
    for part in config["frozen_parts"]:
        for module in _modules_of(part, detector):
            freeze(module)
    return detector


def _modules_of(part: str, detector: Detector) -> list[nnx.Module]:
    """The modules of a part that `config.model.frozen_parts` names."""
    refiner, layers = detector.refiner, detector.refiner.layers
    modules: dict[str, list[Any]] = {
        "backbone": [detector.backbone],
        "neck": [detector.neck],
        "encoder": [detector.encoder],
        "queries": [detector.query_init],
        "primary": [layers.primary, refiner.position, refiner.norm, detector.heads],
        "merges": [layers.merge_attention, layers.merge_interaction, layers.merge_ffn],
    }
    return [module for module in modules[part] if module is not None]


@contextlib.contextmanager
def _section(key: str) -> Iterator[None]:
    """Puts the name of a section or setting in front of what a module says about its arguments: modules know no config."""
    try:
        yield
    except UserError as error:
        # An inner section has been named already.
        if str(error).startswith("config."):
            raise
        raise UserError(f"config.model.{key}: {error}") from error


def _query_init(config: Config, compute: Compute, head: PredictionHead, rngs: nnx.Rngs) -> QueryInit:
    """The initial queries of the section `queries`; their heads start as copies of `head`."""
    queries, channels = config["queries"], config["channels"]
    if queries["kind"] not in QUERIES:
        raise UserError(f"config.model.queries.kind is {queries['kind']!r}; known are {', '.join(QUERIES)}.")
    if queries["kind"] != "distinct":
        return QUERIES[queries["kind"]](_copy(head), channels, queries=queries["count"], rngs=rngs)
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
        implementation=compute.implementation,
        rngs=rngs,
    )


def _interaction(name: str, config: Config, compute: Compute) -> InteractionFactory:
    """What makes the interaction of the refiner of that name."""
    refiner = config["refiner"]
    shared = SharedSettings(
        channels=config["channels"],
        heads=config["heads"],
        levels=config["levels"],
        points=config["points"],
        region_size=refiner["region"]["output_size"],
        implementation=compute.implementation,
    )

    def make(rngs: nnx.Rngs) -> Interaction:
        with _section(f"refiner.{name}"):
            return INTERACTIONS[name](shared, **refiner.get(name, {}), rngs=rngs)

    return make


def _refiner(config: Config, compute: Compute, rngs: nnx.Rngs) -> HybridRefiner:
    """The hybrid refiner of the section `refiner`."""
    refiner, channels = config["refiner"], config["channels"]
    primary, auxiliaries = refiner["primary"], tuple(refiner["auxiliaries"])
    names = (primary, *auxiliaries)
    for name in names:
        if name not in INTERACTIONS:
            raise UserError(f"config.model.refiner names the refiner {name!r}; known are {', '.join(sorted(INTERACTIONS))}.")
    check_refiners(config)

    def make_layer(rngs: nnx.Rngs) -> RefinerLayer:
        return RefinerLayer(
            _interaction(primary, config, compute),
            [_interaction(name, config, compute) for name in auxiliaries],
            channels,
            config["heads"],
            config["hidden"],
            merge=refiner["merge"],
            merge_points=refiner["merge_points"],
            merge_initial="xavier" if refiner["merge_xavier"] else tuple(refiner["merge_initial"]),
            implementation=compute.implementation,
            rngs=rngs,
        )

    region = {**refiner["region"], "strides": tuple(refiner["region"]["strides"])}
    with _section("refiner"):
        return HybridRefiner(
            make_layer,
            layers=refiner["layers"],
            channels=channels,
            branches=auxiliaries,
            encodes_boxes=config["queries"]["kind"] != "positions",
            final_norm=refiner["final_norm"],
            look_forward_twice=refiner["look_forward_twice"],
            refine_epsilon=refiner["refine_epsilon"],
            output_epsilon=refiner["output_epsilon"],
            nms_threshold=config["queries"].get("nms_threshold"),
            region=RegionSettings(**region),
            remat="refiner" in compute.remat,
            implementation=compute.implementation,
            rngs=rngs,
        )


def _backbone(config: Config, remat: bool, rngs: nnx.Rngs) -> Backbone:
    """The backbone of the section `backbone`, all of whose settings but `kind` are passed to it."""
    if config["kind"] not in BACKBONES:
        raise UserError(f"config.model.backbone.kind is {config['kind']!r}; known are {', '.join(BACKBONES)}.")
    make, settings = BACKBONES[config["kind"]], {key: value for key, value in config.items() if key != "kind"}
    # Flax modules hide the signature of their constructor from `inspect.signature(make)`.
    known = inspect.signature(inspect.getattr_static(make, "__init__")).parameters
    for key in settings:
        if key == "remat" or key not in known:
            raise UserError(f"config.model.backbone.{key} does not suit the kind {config['kind']!r}; see configs/common.py.")
    with _section("backbone"):
        return make(rngs=rngs, remat=remat, **settings)


def _copy(module: PredictionHead) -> PredictionHead:
    return jax.tree.map(lambda leaf: leaf.copy(), module)


def abstract_detector(
    model_config: Mapping[str, Any], num_classes: int, compute: Mapping[str, Any] | None = None
) -> Detector:
    """The detector of `build_detector` with shapes instead of values, which are filled in later."""
    return nnx.eval_shape(lambda: build_detector(model_config, num_classes, compute=compute, rngs=nnx.Rngs(0)))

"""Official PyTorch weights, by name, to and from a detector of this project.

Both directions rest on one table from our module paths to official names. Weights are NumPy arrays in PyTorch layout;
nothing here needs PyTorch.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.backbones.swin import SwinTransformer
from hpr_jax.models.backbones.window_attention import relative_positions
from hpr_jax.models.detector import Detector
from hpr_jax.models.refiner.deformable import DeformableInteraction

# Buffers without information, and names that trained DDQ files hold a second time.
IGNORED = re.compile(r"\.num_batches_tracked$|\.relative_position_index$")
ALIASES = {"decoder.aux_reg_branches.": "bbox_head.aux_reg_branches."}

# Official attribute prefix, module name and branch number of each auxiliary refiner.
_AUXILIARY = {"regional_attention": ("ca_", "regional_ca", 0), "dynamic_conv": ("dyconv_", "dy_conv", 1)}
# Official merge weights have the columns primary, dynamic convolution, regional attention.
_MERGE_ORDER = ("dynamic_conv", "regional_attention")

# Path patterns, ours -> official. `{l}` is the layer of a stack, `{even}` and `{odd}` are 2l and 2l + 1, `{last}` is the
# number of decoder layers. Applied in turn, so that later rules see the replacements of earlier ones.
Rules = Sequence[tuple[str, Any]]
_RESNET_RULES: Rules = (
    (r"^backbone\.stem_norm", "backbone.bn1"),
    (r"^backbone\.stem", "backbone.conv1"),
    (r"^backbone\.stages\.(\d+)\.(\d+)\.", lambda m: f"backbone.layer{int(m[1]) + 1}.{m[2]}."),
    (r"\.norm(\d)", r".bn\1"),
    (r"\.shortcut_norm", ".downsample.1"),
    (r"\.shortcut", ".downsample.0"),
)
_SWIN_RULES: Rules = (
    (r"\.patch_embed\.(kernel|bias)$", r".patch_embed.projection.\1"),
    (r"\.norms\.(\d)", r".norm\1"),
    (r"\.pairs\.plain", ".blocks.{even}"),
    (r"\.pairs\.shifted", ".blocks.{odd}"),
    (r"\.attention\.position_bias", ".attn.w_msa.relative_position_bias_table"),
    (r"\.attention\.qkv", ".attn.w_msa.qkv"),
    (r"\.attention\.project", ".attn.w_msa.proj"),
    (r"\.mlp\.expand", ".ffn.layers.0.0"),
    (r"\.mlp\.contract", ".ffn.layers.1"),
    (r"\.merge\.", ".downsample."),
)
_RULES: Rules = (
    (r"^neck\.projections\.(\d+)\.bias", r"neck.convs.\1.conv.bias"),
    (r"^neck\.extra\.(\d+)\.bias", r"neck.extra_convs.\1.conv.bias"),
    (r"^neck\.projections\.(\d+)", r"neck.convs.\1"),
    (r"^neck\.extra\.(\d+)", r"neck.extra_convs.\1"),
    (r"^(neck.*)\.norm", r"\1.gn"),
    (r"^encoder\.level_embedding", "level_embed"),
    (r"^encoder\.layers", "encoder.layers.{l}"),
    (r"^(encoder.*)\.attention\.", r"\1.self_attn."),
    (r"^refiner\.layers", "decoder.layers.{l}"),
    (r"^(decoder.*)\.primary\.attention\.", r"\1.self_attn.attn."),
    (r"^(decoder.*)\.primary\.interaction\.attention\.", r"\1.cross_attn."),
    (r"^(decoder.*)\.primary\.", r"\1."),
    (r"^(decoder.*)\.merge_attention", r"\1.merger_SA"),
    (r"^(decoder.*)\.merge_ffn", r"\1.merger_FFN"),
    (r"norm(\d)\.(scale|bias)$", lambda m: f"norms.{int(m[1]) - 1}.{m[2]}"),
    (r"\.ffn\.expand", ".ffn.layers.0.0"),
    (r"\.ffn\.contract", ".ffn.layers.1"),
    (r"\.input\.kernel", ".in_proj_weight"),
    (r"\.input\.bias", ".in_proj_bias"),
    (r"\battn\.output", "attn.out_proj"),
    (r"(self_attn|cross_attn)\.offsets", r"\1.sampling_offsets"),
    (r"(self_attn|cross_attn)\.weights", r"\1.attention_weights"),
    (r"(self_attn|cross_attn)\.value", r"\1.value_proj"),
    (r"(self_attn|cross_attn)\.output", r"\1.output_proj"),
    (r"^refiner\.position", "decoder.ref_point_head"),
    (r"^refiner\.norm", "decoder.norm"),
    (r"^query_init\.generator\.project", "memory_trans_fc"),
    (r"^query_init\.generator\.norm", "memory_trans_norm"),
    (r"^query_init\.content$", "query_embedding.weight"),
    (r"^query_init\.content", "query_map"),
    (r"^query_init\.head", "bbox_head.matching.{last}"),
    (r"^query_init\.dense_head", "bbox_head.matching.{dense_last}"),
    (r"^heads\.(matching|dense)", r"bbox_head.\1.{l}"),
    (r"^(bbox_head.*)\.matching\.({\w+})\.classes", r"\1.cls_branches.\2"),
    (r"^(bbox_head.*)\.dense\.({\w+})\.classes", r"\1.aux_cls_branches.\2"),
    (
        r"^(bbox_head.*)\.matching\.({\w+})\.boxes\.layers\.(\d)",
        lambda m: f"{m[1]}.reg_branches.{m[2]}.{2 * int(m[3])}",
    ),
    (
        r"^(bbox_head.*)\.dense\.({\w+})\.boxes\.layers\.(\d)",
        lambda m: f"{m[1]}.aux_reg_branches.{m[2]}.{2 * int(m[3])}",
    ),
    (r"^denoiser\.embedding", "dn_query_generator.label_embedding.weight"),
)
_LEAF_RULES: Rules = (
    (r"\.(kernel|scale)$", ".weight"),
    (r"\.mean$", ".running_mean"),
    (r"\.variance$", ".running_var"),
)
# Variables whose shape depends on the number of classes.
_OF_CLASSES = re.compile(r"(^|\.)classes\.(kernel|bias)$|^denoiser\.embedding$")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our variables and the official tensors it stands for (one a layer, for stacks)."""

    path: tuple
    names: tuple[str, ...]
    stacked: bool
    conv1x1: bool
    merge_columns: tuple[int, ...] | None
    of_classes: bool

    def from_official(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """Official tensors, in the order of `names` -> our array."""
        arrays = [self._convert(tensor) for tensor in tensors]
        return np.stack(arrays) if self.stacked else arrays[0]

    def to_official(self, array: np.ndarray) -> list[np.ndarray]:
        """The inverse of `from_official`."""
        return [self._revert(part) for part in (array if self.stacked else array[None])]

    def _convert(self, tensor):
        if self.merge_columns is not None:
            return tensor[..., np.array(self.merge_columns)]
        if self.path[-1] != "kernel":
            return tensor
        if self.conv1x1:
            return tensor[..., 0, 0].T
        return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T

    def _revert(self, array):
        if self.merge_columns is not None:
            return array[..., np.argsort(self.merge_columns)]
        if self.path[-1] != "kernel":
            return array
        if self.conv1x1:
            return array.T[..., None, None]
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def entries(detector: Detector, state: nnx.State | None = None) -> list[Entry]:
    """The table for every variable of `state`, by default all of the detector's.

    Raises:
      UserError: the detector has a refiner that the official models lack.
    """
    branches = detector.refiner.branches
    primary = detector.refiner.layers.primary.interaction
    foreign = [branch for branch in branches if branch not in _AUXILIARY]
    if not isinstance(primary, DeformableInteraction):
        foreign.insert(0, f"{type(primary).__name__} as the primary one")
    if foreign:
        raise UserError(f"The official models have no refiner {foreign[0]!r}, so their weights fit no detector with one.")
    layers = detector.refiner.layers
    if len(branches) == 1 or (branches and (layers.merge_attention is None or layers.merge_ffn is None)):
        raise UserError("The official models have both auxiliary refiners and merge behind attention and FFN, or are plain.")
    if branches and layers.merge_interaction is not None:
        raise UserError("The official models do not merge behind the interaction.")
    columns = (0, *(1 + _MERGE_ORDER.index(branch) for branch in branches))
    backbone = _SWIN_RULES if isinstance(detector.backbone, SwinTransformer) else _RESNET_RULES
    flat = nnx.to_flat_state(nnx.state(detector) if state is None else state)
    last = _depth(detector.refiner.layers)

    def entry(path, variable):
        dotted = dotted_path(path)
        stacked = dotted.startswith(("encoder.layers.", "refiner.layers.", "heads.", "branch_heads.")) or ".pairs." in dotted
        template = _apply(dotted, backbone, _LEAF_RULES) if path[0] == "backbone" else _official(dotted, branches)
        is_conv = (backbone is _RESNET_RULES and path[0] == "backbone") or path[0] == "neck"
        return Entry(
            path=path,
            names=tuple(
                template.format(l=layer, even=2 * layer, odd=2 * layer + 1, last=last, dense_last=last + 1)
                for layer in range(variable.shape[0] if stacked else 1)
            ),
            stacked=stacked,
            conv1x1=is_conv and path[-1] == "kernel" and len(variable.shape) == 2,
            merge_columns=columns if re.search(r"\.merge_(attention|ffn)\.", dotted) else None,
            of_classes=of_classes(dotted),
        )

    return [entry(path, variable) for path, variable in flat]


def of_classes(dotted: str) -> bool:
    """Whether the shape of our variable at this path depends on the number of classes."""
    return _OF_CLASSES.search(dotted) is not None


def dotted_path(path: tuple) -> str:
    """`("encoder", "layers", 0)` -> `encoder.layers.0`."""
    return ".".join(map(str, path))


def _official(dotted: str, branches: Sequence[str]) -> str:
    for index, branch in enumerate(branches):
        prefix, module, number = _AUXILIARY[branch]
        stem = f"refiner.layers.auxiliaries.{index}."
        if dotted.startswith(stem):
            return _official_auxiliary(dotted.removeprefix(stem), prefix, module)
        dotted = re.sub(rf"^refiner\.branch_norms\.{index}\.", f"decoder.norm_aux.{number}.", dotted)
        dotted = re.sub(rf"^branch_heads\.{index}\.(matching|dense)", rf"bbox_head_aux.{number}.\1.{{l}}", dotted)
    return _apply(dotted, _RULES, _LEAF_RULES)


def _official_auxiliary(rest: str, prefix: str, module: str) -> str:
    inner = {
        "interaction.spawn": "sample_proj",
        "interaction.attention": "attn",
        "interaction.generator": "dynamic_layer",
        "interaction.project": "fc_layer",
        "interaction.norm1": "norm_in",
        "interaction.norm2": "norm_out",
        "interaction.norm3": "fc_norm",
        "interaction.norm": "fc_norm",
    }
    for ours, official in inner.items():
        if rest.startswith(f"{ours}."):
            dotted = f"decoder.layers.{{l}}.{module}.{official}.{rest.removeprefix(ours + '.')}"
            return _apply(dotted, _RULES, _LEAF_RULES)
    if rest.startswith("attention."):
        dotted = f"decoder.layers.{{l}}.{prefix}self_attn.attn.{rest.removeprefix('attention.')}"
        return _apply(dotted, _RULES, _LEAF_RULES)
    rest = re.sub(r"^norm(\d)\.", lambda m: f"norms.{int(m[1]) - 1}.", rest)
    return f"decoder.layers.{{l}}.{prefix}" + _apply(f".{rest}", _RULES, _LEAF_RULES).removeprefix(".")


def _apply(dotted: str, *tables: Rules) -> str:
    for pattern, replacement in itertools.chain(*tables):
        dotted = re.sub(pattern, replacement, dotted)
    return dotted


def _depth(stacked: nnx.Module) -> int:
    _, variable = nnx.to_flat_state(nnx.state(stacked))[0]
    return variable.shape[0]


def load_official(
    detector: Detector, tensors: Mapping[str, np.ndarray], *, only: str = "", optional: str = "", other_classes: bool = False
) -> list[str]:
    """Fills the detector, in place, from official names.

    Args:
      tensors: arrays in PyTorch layout.
      only: prefix of the official names to fill; the rest of the detector stays as it is.
      optional: pattern of official names that may be missing; they stay as they are.
      other_classes: weights for another number of classes are welcome; those that depend on it stay as they are.

    Returns:
      The official names of these weights.

    Raises:
      UserError: a tensor is missing, left over, of another shape, or two names of the same tensor differ. Nothing is
        changed then.
    """
    tensors = _without_aliases({name: np.asarray(t) for name, t in tensors.items() if not IGNORED.search(name)})
    state = nnx.state(detector)
    flat = dict(nnx.to_flat_state(state))
    table = [entry for entry in entries(detector) if entry.names[0].startswith(only)]
    if optional:
        table = [entry for entry in table if not re.fullmatch(optional, entry.names[0]) or entry.names[0] in tensors]
    expected = {}
    for entry in table:
        pattern = np.broadcast_to(np.float32(0), flat[entry.path].shape)
        expected |= {name: (t.shape, entry.of_classes) for name, t in zip(entry.names, entry.to_official(pattern))}
    kept = compare_shapes(expected, {name: tensor.shape for name, tensor in tensors.items()}, other_classes)
    loaded = {}
    for entry in table:
        if entry.names[0] not in kept:
            variable = flat[entry.path]
            array = entry.from_official([tensors[name] for name in entry.names])
            loaded[entry.path] = variable.replace(np.ascontiguousarray(array, dtype=variable.dtype))
    nnx.update(detector, nnx.from_flat_state(list(loaded.items())))
    return kept


def compare_shapes(
    expected: Mapping[str, tuple[tuple[int, ...], bool]], given: Mapping[str, tuple[int, ...]], other_classes: bool
) -> list[str]:
    """Holds the shapes of weights against those of a model.

    Args:
      expected: by name, a shape and whether it depends on the number of classes.
      given: by name, a shape.
      other_classes: shapes that depend on the number of classes may all differ.

    Returns:
      The names of those that do.

    Raises:
      UserError: anything else differs.
    """
    differing = [name for name, (shape, _) in expected.items() if name in given and given[name] != shape]
    of_classes = [name for name, (_, of_classes) in expected.items() if of_classes]
    kept = of_classes if other_classes and set(differing) & set(of_classes) else []
    problems = [f"missing: {name}" for name in expected if name not in given]
    problems += [f"not used: {name}" for name in sorted(set(given) - set(expected))]
    problems += [
        f"shape of {name}: {list(given[name])}, expected {list(expected[name][0])}" for name in differing if name not in kept
    ]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"The weights do not fit the model in {len(problems)} places: {shown}.")
    return kept


def to_official(detector: Detector, state: nnx.State | None = None) -> dict[str, np.ndarray]:
    """Official names -> arrays, of the detector or of a state like its own (a part of it, its gradients).

    Swin's table of relative positions, which the official code keeps as a buffer, is not among them: see
    `official_buffers`.
    """
    state = nnx.state(detector) if state is None else state
    flat = dict(nnx.to_flat_state(state))
    tensors = {}
    for entry in entries(detector, state):
        tensors.update(zip(entry.names, entry.to_official(np.asarray(flat[entry.path].get_value()))))
    return tensors


def official_buffers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without information that strict loading in the official code asks for, beside those of `to_official`."""
    suffix, buffers = "relative_position_bias_table", {}
    for name, table in tensors.items():
        if name.endswith(suffix):
            window = (math.isqrt(len(table)) + 1) // 2
            buffers[name.removesuffix(suffix) + "relative_position_index"] = relative_positions(window).astype(np.int64)
    return buffers


def _without_aliases(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    kept = dict(tensors)
    for name, tensor in tensors.items():
        for alias, original in ALIASES.items():
            if name.startswith(alias):
                twin = original + name.removeprefix(alias)
                if twin in tensors and not np.array_equal(tensor, tensors[twin]):
                    raise UserError(f"{name} and {twin} are two names of one tensor, but they differ in this file.")
                kept.setdefault(twin, tensor)
                del kept[name]
    return kept

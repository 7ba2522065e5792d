"""Official PyTorch weights, by name, to and from a detector of this project.

Both directions rest on one table from our module paths to official names. Weights are NumPy arrays in PyTorch layout;
nothing here needs PyTorch.
"""

import dataclasses
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.detector import Detector

# Buffers without information, and names that trained DDQ files hold a second time.
IGNORED = re.compile(r"\.num_batches_tracked$|\.relative_position_index$")
ALIASES = {"decoder.aux_reg_branches.": "bbox_head.aux_reg_branches."}

# Official attribute prefix, module name and branch number of each auxiliary refiner.
_AUXILIARY = {"regional_attention": ("ca_", "regional_ca", 0), "dynamic_conv": ("dyconv_", "dy_conv", 1)}
# Official merge weights have the columns primary, dynamic convolution, regional attention.
_MERGE_ORDER = ("dynamic_conv", "regional_attention")

# Path patterns, ours -> official; `{l}` is the layer of a stack. Applied in turn, so that later rules see the
# replacements of earlier ones.
_RULES: Sequence[tuple[str, str]] = (
    (r"^backbone\.stem_norm", "backbone.bn1"),
    (r"^backbone\.stem", "backbone.conv1"),
    (r"^backbone\.stages\.(\d+)\.(\d+)\.", lambda m: f"backbone.layer{int(m[1]) + 1}.{m[2]}."),
    (r"^(backbone.*)\.norm(\d)", r"\1.bn\2"),
    (r"^(backbone.*)\.shortcut_norm", r"\1.downsample.1"),
    (r"^(backbone.*)\.shortcut", r"\1.downsample.0"),
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
    (r"^query_init\.head", "bbox_head.matching.{proposal}"),
    (r"^query_init\.dense_head", "bbox_head.matching.{dense_proposal}"),
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
    (r"\.(kernel|scale)$", ".weight"),
    (r"\.mean$", ".running_mean"),
    (r"\.variance$", ".running_var"),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our variables and the official tensors it stands for (one a layer, for stacks)."""

    path: tuple
    names: tuple[str, ...]
    stacked: bool
    conv1x1: bool
    merge_columns: tuple[int, ...] | None

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
    """The table for every variable of `state`, by default all of the detector's."""
    layers = {"encoder": _depth(detector.encoder.layers), "refiner": _depth(detector.refiner.layers)}
    branches = detector.refiner.branches
    for branch in branches:
        if branch not in _AUXILIARY:
            raise UserError(f"The official models have no {branch!r} refiner, so their weights fit no detector with one.")
    columns = None
    if branches:
        columns = (0, *(1 + _MERGE_ORDER.index(branch) for branch in branches))
    flat = nnx.to_flat_state(nnx.state(detector) if state is None else state)
    return [_entry(path, variable, layers, branches, columns) for path, variable in flat]


def _entry(path, variable, layers, branches, columns) -> Entry:
    dotted = ".".join(map(str, path))
    stacked = dotted.startswith(("encoder.layers.", "refiner.layers.", "heads.", "branch_heads."))
    template = _official(dotted, branches)
    depth = layers["encoder" if dotted.startswith("encoder.") else "refiner"]
    special = {"proposal": layers["refiner"], "dense_proposal": layers["refiner"] + 1}
    names = tuple(template.format(l=layer, **special) for layer in range(depth if stacked else 1))
    is_conv = dotted.startswith(("backbone.", "neck.")) and path[-1] == "kernel"
    is_merge = re.search(r"\.merge_(attention|ffn)\.", dotted) is not None
    return Entry(
        path=path,
        names=names,
        stacked=stacked,
        conv1x1=is_conv and len(variable.shape) == 2,
        merge_columns=columns if is_merge else None,
    )


def _official(dotted: str, branches: Sequence[str]) -> str:
    for index, branch in enumerate(branches):
        prefix, module, number = _AUXILIARY[branch]
        stem = f"refiner.layers.auxiliaries.{index}."
        if dotted.startswith(stem):
            return _official_auxiliary(dotted.removeprefix(stem), prefix, module)
        dotted = re.sub(rf"^refiner\.branch_norms\.{index}\.", f"decoder.norm_aux.{number}.", dotted)
        dotted = re.sub(rf"^branch_heads\.{index}\.(matching|dense)", rf"bbox_head_aux.{number}.\1.{{l}}", dotted)
    return _apply(dotted)


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
            return _apply(f"decoder.layers.{{l}}.{module}.{official}.{rest.removeprefix(ours + '.')}")
    if rest.startswith("attention."):
        return _apply(f"decoder.layers.{{l}}.{prefix}self_attn.attn.{rest.removeprefix('attention.')}")
    rest = re.sub(r"^norm(\d)\.", lambda m: f"norms.{int(m[1]) - 1}.", rest)
    return f"decoder.layers.{{l}}.{prefix}" + _apply(f".{rest}").removeprefix(".")


def _apply(dotted: str) -> str:
    for pattern, replacement in _RULES:
        dotted = re.sub(pattern, replacement, dotted)
    return dotted


def _depth(stacked: nnx.Module) -> int:
    _, variable = nnx.to_flat_state(nnx.state(stacked))[0]
    return variable.shape[0]


def load_official(detector: Detector, tensors: Mapping[str, np.ndarray], only: str = "") -> None:
    """Fills the detector, in place, from official names.

    Args:
      tensors: arrays in PyTorch layout.
      only: prefix of the official names to fill; the rest of the detector stays as it is.

    Raises:
      UserError: a tensor is missing, left over, of another shape, or two names of the same tensor differ. Nothing is
        changed then.
    """
    tensors = _without_aliases({name: np.asarray(t) for name, t in tensors.items() if not IGNORED.search(name)})
    table = [entry for entry in entries(detector) if entry.names[0].startswith(only)]
    wanted = [name for entry in table for name in entry.names]
    problems = [f"missing: {name}" for name in wanted if name not in tensors]
    problems += [f"not used: {name}" for name in sorted(set(tensors) - set(wanted))]
    state = nnx.state(detector)
    flat = dict(nnx.to_flat_state(state))
    loaded = {}
    if not problems:
        for entry in table:
            variable = flat[entry.path]
            expected = [t.shape for t in entry.to_official(np.broadcast_to(np.float32(0), variable.shape))]
            for name, shape in zip(entry.names, expected):
                if tensors[name].shape != shape:
                    problems.append(f"shape of {name}: {tensors[name].shape}, expected {shape}")
        if not problems:
            for entry in table:
                array = entry.from_official([tensors[name] for name in entry.names])
                variable = flat[entry.path]
                loaded[entry.path] = variable.replace(np.ascontiguousarray(array, dtype=variable.dtype))
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"The weights do not fit the model in {len(problems)} places: {shown}.")
    nnx.update(detector, nnx.from_flat_state(list(loaded.items())))


def load_weights_file(detector: Detector, path: Path) -> None:
    """Fills the detector, or its backbone alone, from an `.npz` file of official names.

    A file whose names all begin with `backbone.` is taken as a backbone.

    Raises:
      UserError: no such file, not an `.npz` file, or weights that do not fit.
    """
    if not path.is_file():
        raise UserError(f"The weight file {path} does not exist; set config.train.initial_weights.")
    try:
        with np.load(path, allow_pickle=False) as file:
            tensors = dict(file)
    except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"The weight file {path} is not an .npz file of arrays: {error}") from error
    load_official(detector, tensors, only="backbone." if all(n.startswith("backbone.") for n in tensors) else "")


def to_official(detector: Detector, state: nnx.State | None = None) -> dict[str, np.ndarray]:
    """Official names -> arrays, of the detector or of a state like its own (a part of it, its gradients)."""
    state = nnx.state(detector) if state is None else state
    flat = dict(nnx.to_flat_state(state))
    tensors = {}
    for entry in entries(detector, state):
        tensors.update(zip(entry.names, entry.to_official(np.asarray(flat[entry.path].get_value()))))
    return tensors


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

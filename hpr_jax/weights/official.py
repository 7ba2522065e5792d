"""Brings official PyTorch weights into a detector of this project, and back.

Both directions rest on the table of `official_names.py`. Weights are NumPy arrays in PyTorch layout; nothing here needs
PyTorch.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from hpr_jax.errors import UserError
from hpr_jax.models.backbones.swin import SwinTransformer
from hpr_jax.models.backbones.window_attention import relative_positions
from hpr_jax.models.detector import Detector
from hpr_jax.models.refiner.deformable import DeformableInteraction
from hpr_jax.weights.official_names import AUXILIARY_REFINERS, depends_on_classes, dotted_path, official_name

# Matches the names of buffers without information, which are not loaded.
IGNORED = re.compile(r"\.num_batches_tracked$|\.relative_position_index$")
# Prefixes under which trained DDQ files hold some tensors a second time, and the prefixes of the first.
_ALIASES = {"decoder.aux_reg_branches.": "bbox_head.aux_reg_branches."}
# Official merge weights have the columns primary, dynamic convolution, regional attention.
_MERGE_ORDER = ("dynamic_conv", "regional_attention")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our variables and the official tensors that hold its values.

    Attributes:
      path: of our variable, in the detector's state.
      names: of the official tensors: one for each layer if ours is stacked, else one.
      stacked: our variable has a leading axis of layers.
      conv1x1: a matrix here, the kernel of a 1x1 convolution there.
      merge_columns: for weights of a merge, the official column of each of ours.
      depends_on_classes: its shape depends on the number of classes.
    """

    path: tuple[Any, ...]
    names: tuple[str, ...]
    stacked: bool
    conv1x1: bool
    merge_columns: tuple[int, ...] | None
    depends_on_classes: bool

    def from_official(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """Official tensors, in the order of `names` -> our array."""
        arrays = [self._convert(tensor) for tensor in tensors]
        return np.stack(arrays) if self.stacked else arrays[0]

    def to_official(self, array: np.ndarray) -> list[np.ndarray]:
        """The inverse of `from_official`."""
        return [self._revert(part) for part in (array if self.stacked else array[None])]

    def _convert(self, tensor: np.ndarray) -> np.ndarray:
        """An official tensor -> our array of one layer: convolutions `[O, I, h, w]` -> `[h, w, I, O]`, or `[I, O]` if 1x1;
        linear layers `[O, I]` -> `[I, O]`."""
        if self.merge_columns is not None:
            return tensor[..., np.array(self.merge_columns)]
        if self.path[-1] != "kernel":
            return tensor
        if self.conv1x1:
            return tensor[..., 0, 0].T
        return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T

    def _revert(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `_convert`."""
        if self.merge_columns is not None:
            return array[..., np.argsort(self.merge_columns)]
        if self.path[-1] != "kernel":
            return array
        if self.conv1x1:
            return array.T[..., None, None]
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def foreign_part(detector: Detector) -> str | None:
    """Which part of a detector the official models lack, as a sentence; None if they have all."""
    branches, layers = detector.refiner.branches, detector.refiner.layers
    primary = layers.primary.interaction
    foreign = [branch for branch in branches if branch not in AUXILIARY_REFINERS]
    if not isinstance(primary, DeformableInteraction):
        foreign.insert(0, f"{type(primary).__name__} as the primary one")
    if foreign:
        return f"The official models have no refiner {foreign[0]!r}, so their weights fit no detector with one."
    if len(branches) == 1 or (branches and (layers.merge_attention is None or layers.merge_ffn is None)):
        return "The official models have both auxiliary refiners and merge behind attention and FFN, or are plain."
    if branches and layers.merge_interaction is not None:
        return "The official models do not merge behind the interaction."
    return None


def entries(detector: Detector, state: nnx.State | None = None) -> list[Entry]:
    """The official counterpart of every variable of `state`, by default of all the detector's.

    Raises:
      UserError: the detector has a refiner that the official models lack.
    """
    problem = foreign_part(detector)
    if problem:
        raise UserError(problem)
    branches = detector.refiner.branches
    columns = (0, *(1 + _MERGE_ORDER.index(branch) for branch in branches))
    swin, first_map = isinstance(detector.backbone, SwinTransformer), detector.backbone.first_map
    flat = nnx.to_flat_state(nnx.state(detector) if state is None else state)
    last = _depth(detector.refiner.layers)

    def entry(path: tuple[Any, ...], variable: nnx.Variable) -> Entry:
        dotted = dotted_path(path)
        stacked = dotted.startswith(("encoder.layers.", "refiner.layers.", "heads.", "branch_heads.")) or ".pairs." in dotted
        template = official_name(dotted, branches, swin=swin, first_map=first_map)
        is_conv = (not swin and path[0] == "backbone") or path[0] == "neck"
        return Entry(
            path=path,
            names=tuple(
                template.format(l=layer, even=2 * layer, odd=2 * layer + 1, last=last, dense_last=last + 1)
                for layer in range(variable.shape[0] if stacked else 1)
            ),
            stacked=stacked,
            conv1x1=is_conv and path[-1] == "kernel" and len(variable.shape) == 2,
            merge_columns=columns if re.search(r"\.merge_(attention|ffn)\.", dotted) else None,
            depends_on_classes=depends_on_classes(dotted),
        )

    return [entry(path, variable) for path, variable in flat]


def _depth(stacked: nnx.Module) -> int:
    """Number of layers in a stack of layers."""
    _, variable = nnx.to_flat_state(nnx.state(stacked))[0]
    return variable.shape[0]


def load_official(
    detector: Detector,
    tensors: Mapping[str, np.ndarray],
    *,
    only: str = "",
    optional: str = "",
    other_classes: bool = False,
    without: Callable[[str], bool] | None = None,
) -> list[str]:
    """Fills the detector with official weights, in place.

    Args:
      tensors: arrays in PyTorch layout, by official name.
      only: prefix of the official names to fill; the rest of the detector stays as it is.
      optional: pattern of official names that may be missing; their variables stay as they are.
      other_classes: the weights may be made for another number of classes; variables whose shape depends on it then stay
        as they are.
      without: tells by their dotted paths which variables of ours stay as they are, since the weights have none for them.

    Returns:
      The official names of the variables that stay as they are because the number of classes differs.

    Raises:
      UserError: a tensor is missing, left over or of another shape, or two names of one tensor have different values.
        The detector is unchanged then.
    """
    tensors = _without_aliases({name: np.asarray(t) for name, t in tensors.items() if not IGNORED.search(name)})
    state = nnx.state(detector)
    flat = dict(nnx.to_flat_state(state))
    table = [entry for entry in entries(detector) if entry.names[0].startswith(only)]
    if without:
        table = [entry for entry in table if not without(dotted_path(entry.path))]
    if optional:
        table = [entry for entry in table if not re.fullmatch(optional, entry.names[0]) or entry.names[0] in tensors]
    expected: dict[str, tuple[tuple[int, ...], bool]] = {}
    for entry in table:
        # Takes no memory: only the shapes of its official counterparts are wanted.
        zeros = np.broadcast_to(np.float32(0), flat[entry.path].shape)
        expected |= {name: (t.shape, entry.depends_on_classes) for name, t in zip(entry.names, entry.to_official(zeros))}
    not_loaded = compare_shapes(expected, {name: tensor.shape for name, tensor in tensors.items()}, other_classes)
    loaded = {}
    for entry in table:
        if entry.names[0] not in not_loaded:
            variable = flat[entry.path]
            array = entry.from_official([tensors[name] for name in entry.names])
            loaded[entry.path] = variable.replace(np.ascontiguousarray(array, dtype=variable.dtype))
    nnx.update(detector, nnx.from_flat_state(list(loaded.items())))
    return not_loaded


def compare_shapes(
    expected: Mapping[str, tuple[tuple[int, ...], bool]], given: Mapping[str, tuple[int, ...]], other_classes: bool
) -> list[str]:
    """Compares the names and shapes of weights with those of a model.

    Args:
      expected: by name, the shape in the model, and whether it depends on the number of classes.
      given: by name, the shape in the file.
      other_classes: shapes that depend on the number of classes may differ.

    Returns:
      The names that cannot be loaded since the number of classes differs: all that depend on it if any of them differs in
      shape, else none.

    Raises:
      UserError: anything else differs.
    """
    differing = [name for name, (shape, _) in expected.items() if name in given and given[name] != shape]
    dependent = [name for name, (_, depends_on_classes) in expected.items() if depends_on_classes]
    not_loaded = dependent if other_classes and set(differing) & set(dependent) else []
    problems = [f"missing: {name}" for name in expected if name not in given]
    problems += [f"not used: {name}" for name in sorted(set(given) - set(expected))]
    problems += [
        f"shape of {name}: {list(given[name])}, expected {list(expected[name][0])}"
        for name in differing
        if name not in not_loaded
    ]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"The weights do not fit the model in {len(problems)} places: {shown}.")
    return not_loaded


def to_official(detector: Detector, state: nnx.State | None = None) -> dict[str, np.ndarray]:
    """The weights of a detector in PyTorch layout, by official name.

    Buffers of the official code are not among them: see `official_buffers`.

    Args:
      state: taken in place of the detector's own state; a part of one or gradients will do.
    """
    state = nnx.state(detector) if state is None else state
    flat = dict(nnx.to_flat_state(state))
    tensors: dict[str, np.ndarray] = {}
    for entry in entries(detector, state):
        tensors.update(zip(entry.names, entry.to_official(np.asarray(flat[entry.path].get_value()))))
    return tensors


def official_buffers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Swin's tables of relative positions, which strict loading in the official code asks for beside the weights.

    Args:
      tensors: as `to_official` returns them.
    """
    suffix, buffers = "relative_position_bias_table", {}
    for name, table in tensors.items():
        if name.endswith(suffix):
            window = (math.isqrt(len(table)) + 1) // 2
            buffers[name.removesuffix(suffix) + "relative_position_index"] = relative_positions(window).astype(np.int64)
    return buffers


def _without_aliases(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the first of their names alone.

    Raises:
      UserError: two names of one tensor have different values.
    """
    unique = dict(tensors)
    for name, tensor in tensors.items():
        for alias_prefix, prefix in _ALIASES.items():
            if name.startswith(alias_prefix):
                original = prefix + name.removeprefix(alias_prefix)
                if original in tensors and not np.array_equal(tensor, tensors[original]):
                    raise UserError(f"{name} and {original} are two names of one tensor, but they differ in this file.")
                unique.setdefault(original, tensor)
                del unique[name]
    return unique

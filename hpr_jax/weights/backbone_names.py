"""Backbone weights of other projects, brought to the names and layout of mmdet.

Known are ResNet in torchvision's and mmdet's naming, also below the prefixes of self-supervised pre-training (SoCo, Wei et
al. 2021), and Swin in mmdet's naming and in that of its original release.
"""

import re
from collections.abc import Mapping

import numpy as np

from hpr_jax.errors import UserError

# What shows that a name belongs to a backbone, without any prefix.
_BACKBONE = re.compile(r"(conv1|bn1|layer[1-4]|patch_embed|stages|layers|norm\d?)\.")
# Prefixes in which backbones come; below the first that fits, everything else in the file belongs to another module.
_PREFIXES = ("backbone.", "encoder.", "module.encoder.", "")
# Classifiers and buffers behind or inside backbones, of which detectors have no use.
_LEFT_OUT = re.compile(r"^(fc|head|norm)\.|\.attn_mask$|^absolute_pos_embed$")

# The original Swin names -> mmdet's.
_SWIN = (
    (r"^layers\.", "stages."),
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"\.attn\.", ".attn.w_msa."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
)

# Names of Swin's output norms, which classifiers lack.
OUTPUT_NORMS = r"backbone\.norm\d\.(weight|bias)"


def is_detector(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a file's tensors are those of a whole detector of the official implementation."""
    return any(name.startswith("bbox_head.") for name in tensors)


def as_official_backbone(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Tensors of a backbone, under whichever names -> under the official ones, `backbone.*`.

    Args:
      source: the file, for the error.

    Raises:
      UserError: there is no backbone among them.
    """
    for prefix in _PREFIXES:
        bare = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if any(_BACKBONE.match(name) for name in bare):
            break
    else:
        raise UserError(
            f"The weight file {source} holds neither a detector nor a ResNet or Swin backbone; its names are like "
            f"{', '.join(list(tensors)[:3])}."
        )
    bare = {name: tensor for name, tensor in bare.items() if not _LEFT_OUT.search(name)}
    if any(name.startswith("layers.") for name in bare):
        bare = {_renamed(name): _reordered(name, tensor) for name, tensor in bare.items()}
    return {f"backbone.{name}": tensor for name, tensor in bare.items()}


def _renamed(name: str) -> str:
    for pattern, replacement in _SWIN:
        name = re.sub(pattern, replacement, name)
    return name


def _reordered(name: str, tensor: np.ndarray) -> np.ndarray:
    """Swin's patch merging: the release joins the four tokens of a patch one after the other, column by column; mmdet
    interleaves their channels, row by row."""
    if ".downsample." not in name:
        return tensor
    *rows, inputs = tensor.shape
    parts = tensor.reshape(*rows, 4, inputs // 4)[..., (0, 2, 1, 3), :]
    return parts.swapaxes(-1, -2).reshape(*rows, inputs)

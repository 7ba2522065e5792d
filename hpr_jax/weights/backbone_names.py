"""Brings backbone weights of other projects to the names and layout of mmdet, which the official models have.

Known are ResNet under the names of torchvision and of mmdet, also below the prefixes of self-supervised pre-training (SoCo,
Wei et al. 2021), and Swin under the names of mmdet and of its original release.
"""

import re
from collections.abc import Mapping

import numpy as np

from hpr_jax.errors import UserError

# The beginnings of names of a backbone's tensors, without prefix.
_BACKBONE = re.compile(r"(conv1|bn1|layer[1-4]|patch_embed|stages|layers|norm\d?)\.")
# Prefixes of a backbone's names, tried in this order. With the first that fits, tensors without it are of other modules.
_PREFIXES = ("backbone.", "encoder.", "module.encoder.", "")
# Tensors that come with backbones but that detectors do not have: classifiers, and buffers without information.
_LEFT_OUT = re.compile(r"^(fc|head|norm)\.|\.attn_mask$|^absolute_pos_embed$")

# Patterns in the names of the original Swin release, and what mmdet has in their place.
_SWIN = (
    (r"^layers\.", "stages."),
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"\.attn\.", ".attn.w_msa."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
)

# Pattern of the official names of Swin's output norms: weights of classifiers lack them.
OUTPUT_NORMS = r"backbone\.norm\d\.(weight|bias)"


def is_detector(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether the tensors of a file are those of a complete detector of the official implementation."""
    return any(name.startswith("bbox_head.") for name in tensors)


def as_official_backbone(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Renames the tensors of a backbone to the official names, `backbone.*`, and brings them to the official layout.

    Args:
      tensors: by name, in any of the known namings; tensors of other modules may be among them, and are left out.
      source: the file, for the error message.

    Raises:
      UserError: there is no backbone among the tensors.
    """
    for prefix in _PREFIXES:
        backbone = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if any(_BACKBONE.match(name) for name in backbone):
            break
    else:
        raise UserError(
            f"The weight file {source} holds neither a detector nor a ResNet or Swin backbone; its names are like "
            f"{', '.join(list(tensors)[:3])}."
        )
    backbone = {name: tensor for name, tensor in backbone.items() if not _LEFT_OUT.search(name)}
    if any(name.startswith("layers.") for name in backbone):
        backbone = {_mmdet_swin_name(name): _mmdet_swin_layout(name, tensor) for name, tensor in backbone.items()}
    return {f"backbone.{name}": tensor for name, tensor in backbone.items()}


def _mmdet_swin_name(name: str) -> str:
    for pattern, replacement in _SWIN:
        name = re.sub(pattern, replacement, name)
    return name


def _mmdet_swin_layout(name: str, tensor: np.ndarray) -> np.ndarray:
    """Reorders the 4C inputs of Swin's patch merging, `[..., 4C]`, which come from the four tokens of a 2x2 patch.

    The original release takes all channels of a token, then those of the next, column by column. mmdet takes each channel
    of all four tokens, then the next channel, row by row.
    """
    if ".downsample." not in name:
        return tensor
    *rows, inputs = tensor.shape
    parts = tensor.reshape(*rows, 4, inputs // 4)[..., (0, 2, 1, 3), :]
    return parts.swapaxes(-1, -2).reshape(*rows, inputs)

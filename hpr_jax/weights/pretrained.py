"""Pre-trained weights of backbones: where they are looked for. Imports no JAX."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpr_jax.errors import UserError
from hpr_jax.settings import RANDOM
from hpr_jax.weights.hub import is_hub, local_path

# Patterns of the names of weight files, by kind of backbone: torchvision's and SoCo's ResNet-50, and the original Swin-L.
PATTERNS = {
    "resnet": ("resnet50*.pth", "resnet50*.npz", "resnet50*.safetensors", "*soco*.pth"),
    "swin": tuple(f"swin_large_patch4_window12_384*.{kind}" for kind in ("pth", "npz", "safetensors")),
}
# What messages call each kind of backbone.
NAMES = {"resnet": "ResNet-50", "swin": "Swin-L"}


def folders() -> tuple[Path, Path]:
    """Where weights are looked for: `data/`, and the folder in which torch.hub keeps what it has loaded."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hub = Path(os.environ.get("TORCH_HOME") or cache / "torch")
    return Path("data"), hub / "hub" / "checkpoints"


def wants_weights(model: Mapping[str, Any]) -> bool:
    """Whether a model's backbone presumes pre-trained weights: all do but those with GroupNorm."""
    return model["backbone"].get("norm") != "group"


def find_weights(model: Mapping[str, Any]) -> Path | None:
    """The file of pre-trained weights for a model's backbone: the first by name of several; None if there is none."""
    for folder in folders():
        for pattern in PATTERNS[model["backbone"]["kind"]]:
            for path in sorted(folder.glob(pattern)):
                if path.is_file():
                    return path
    return None


def initial_weights(config: Mapping[str, Any]) -> Path | None:
    """The file or folder of weights that a new run begins with, None for random ones.

    Raises:
      UserError: there are no weights, and the backbone wants some.
    """
    missing = missing_weights(config)
    if missing:
        raise UserError(f"Training cannot begin: {missing}; set config.train.initial_weights to a file or to {RANDOM!r}.")
    given, model = config["train"]["initial_weights"], config["model"]
    if given in ("", RANDOM):
        return find_weights(model) if not given and wants_weights(model) else None
    return local_path(given)


def missing_weights(config: Mapping[str, Any]) -> str | None:
    """Why a run has no weights to begin with, as a part of a sentence; None if it has some or needs none."""
    given, model = config["train"]["initial_weights"], config["model"]
    if given == RANDOM:
        return None
    if is_hub(given):
        return None
    if given:
        path = Path(given).expanduser()
        return None if path.exists() else f"the initial weights {given} (config.train.initial_weights) do not exist"
    if not wants_weights(model) or find_weights(model):
        return None
    kind = model["backbone"]["kind"]
    first, second = folders()
    return (
        f"this backbone wants pre-trained weights, and no {NAMES[kind]} weights ({', '.join(PATTERNS[kind])}) are in "
        f"{first}/ or {second}/"
    )

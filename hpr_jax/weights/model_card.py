"""The README of a published detector, which the Hugging Face hub shows as its model card."""

from collections.abc import Mapping
from typing import Any

from hpr_jax.weights.checkpoint import Meta

# So many classes are listed; config.json has all of them.
MOST_CLASSES = 100

_FRONT_MATTER = """\
---
license: apache-2.0
library_name: hpr_jax
pipeline_tag: object-detection
tags:
- object-detection
- detr
- jax
- flax
---
"""


def model_card(meta: Meta, place: str, parameters: int) -> str:
    """The text of the README.

    Args:
      meta: what is known of the detector.
      place: what `hpr_jax.load` takes to load it.
      parameters: number of the detector's weights.
    """
    name = detector_name(meta.config)
    return (
        f"{_FRONT_MATTER}\n# {name}\n\n"
        f"An object detector of {len(meta.classes.names)} classes for hpr_jax, which has the Hybrid Proposal Refiner "
        "(HPR, CVPR 2024) in JAX and Flax.\n\n"
        f"## Use\n\n```python\nimport hpr_jax\n\ndetector = hpr_jax.load({place!r})\n"
        'result = detector("image.jpg")  # result.boxes, .scores, .labels, .names, .draw()\n```\n\n'
        f"## Detector\n\n{_parts(meta.config, parameters)}\n\n"
        f"## Metrics\n\n{_metrics(meta)}\n\n"
        f"## Classes\n\n{_classes(meta.classes.names)}\n"
    )


def detector_name(config: Mapping[str, Any]) -> str:
    """What the detector of a config is called, like `HPR-DDQ with ResNet-50`."""
    model = config["model"]
    if model["queries"]["kind"] == "distinct":
        name = "DDQ"
    elif "aligned" in config["loss"]:
        name = "Align DETR"
    else:
        name = "DINO" if model["denoising"]["queries"] else "Deformable DETR"
    refined = f"HPR-{name}" if model["refiner"]["auxiliaries"] else name
    return f"{refined} with {_backbone_name(model['backbone'])}"


def _backbone_name(backbone: Mapping[str, Any]) -> str:
    if backbone["kind"] == "swin":
        return f"Swin, {backbone['embed_channels']} channels"
    # Each block has three convolutions, and there are a stem and a classifier.
    return f"ResNet-{3 * sum(backbone['blocks']) + 2}"


def _parts(config: Mapping[str, Any], parameters: int) -> str:
    model = config["model"]
    refiner = model["refiner"]
    rows = {
        "weights": f"{parameters:,}",
        "refiners": ", ".join((refiner["primary"], *refiner["auxiliaries"])),
        "layers of encoder and decoder": f"{model['encoder']['layers']} and {refiner['layers']}",
        "queries": model["queries"]["count"],
        "sides of images, at most": f"{config['evaluate']['side']} and {config['evaluate']['max_side']} pixels",
    }
    return _table(("part", "value"), rows)


def _metrics(meta: Meta) -> str:
    not_repeated = (
        "Numbers that others published of detectors like this one are in the README of hpr_jax, where they are marked as "
        "**published**; none of them is repeated here."
    )
    if not meta.metrics:
        return f"No metrics of these weights are known. {not_repeated}"
    rows = {key: f"{value:.4f}" for key, value in meta.metrics.items()}
    return (
        f"Measured by hpr_jax after {meta.step:,} training steps, on the validation images of the run that made them. "
        f"{not_repeated}\n\n{_table(('metric', 'measured'), rows)}"
    )


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in (head, ("---", "---"), *rows.items()))


def _classes(names: tuple[str, ...]) -> str:
    shown = ", ".join(f"`{_plain(name)}`" for name in names[:MOST_CLASSES])
    more = len(names) - MOST_CLASSES
    return shown + (f", and {more} more, which `config.json` lists." if more > 0 else "")


def _plain(name: str) -> str:
    """A class's name fit for a line of code in Markdown."""
    return "".join(character if character.isprintable() and character != "`" else " " for character in name).strip() or " "

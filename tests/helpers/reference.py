"""Reads the stored values of the official implementation, and builds the small models that they were computed with."""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hpr_jax.models.build import abstract_detector
from hpr_jax.weights.official import load_official

OWN_DIRECTORY = Path(__file__).parent.parent / "reference_values" / "official"
DIRECTORY = Path(os.environ.get("HPR_REFERENCE_DIR") or OWN_DIRECTORY)


# Plain detectors of mmdetection, by scripts/make_plain_reference.py: whether each is there depends on the directory.
PLAIN = ("plain_dino", "plain_ddq_5scale", "plain_deformable_detr")
# The threshold with which that script computed them.
PLAIN_NMS_THRESHOLD = 0.5


@functools.cache
def sizes() -> dict:
    """Sizes and settings of the reference models."""
    return json.loads((DIRECTORY / "config.json").read_text())


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of one file, by name."""
    with np.load(DIRECTORY / f"{name}.npz") as file:
        return dict(file)


def model_config(model: str) -> dict:
    """The section `model` of our config of a reference model."""
    s = sizes()
    kind = s["align_detr"] if model == "align_detr" else s["others"]
    two_stage = model == "plain_deformable_detr"
    if two_stage:
        kind = {**kind, "positional_encoding": {"temperature": 10000.0, "offset": -0.5}}
    levels = 5 if model.endswith("5scale") else s["num_levels"]
    strides = tuple(8 * 2**level for level in range(s["num_levels"]))
    if s["backbone"] != "resnet50":
        raise ValueError(f"The reference models have the backbone {s['backbone']}, the tests know resnet50.")
    return {
        "channels": s["embed_dims"],
        "heads": s["num_heads"],
        "levels": levels,
        "points": s["num_points"],
        "hidden": s["feedforward_channels"],
        "frozen_parts": (),
        "pixel_mean": (0.0, 0.0, 0.0),
        "pixel_std": (1.0, 1.0, 1.0),
        "backbone": {
            "kind": "resnet",
            "blocks": (3, 4, 6, 3),
            "base_channels": s["backbone_base_channels"],
            "norm": "frozen_batch",
            "first_map": 1 - (levels - s["num_levels"]),
            "frozen_stages": kind["frozen_stages"],
        },
        "neck": {"groups": s["neck_num_groups"], "bias": kind["neck_bias"]},
        "encoder": {
            "layers": s["encoder_num_layers"],
            "position_temperature": kind["positional_encoding"]["temperature"],
            "position_offset": kind["positional_encoding"]["offset"],
        },
        "queries": _queries(model),
        "denoising": {
            "queries": 0 if model.endswith("deformable_detr") else s["num_dn_queries"],
            "label_noise": 0.5,
            "box_noise": 1.0,
            "views_per_chunk": 1_000_000,
        },
        "refiner": {
            "layers": s["decoder_num_layers"],
            "primary": "deformable",
            "auxiliaries": () if model in PLAIN else ("regional_attention", "dynamic_conv"),
            "merge": "learned_vector",
            "merge_points": ("attention", "ffn"),
            "merge_initial": (),
            "merge_xavier": False,
            "final_norm": not two_stage,
            "look_forward_twice": not two_stage,
            "refine_epsilon": 1e-5 if two_stage else 1e-3,
            "output_epsilon": 1e-5,
            "region": {
                "strides": strides if levels == s["num_levels"] else (4, *strides),
                "output_size": s["roi_output_size"],
                "sampling_ratio": s["roi_sampling_ratio"],
                "finest_scale": s["roi_finest_scale"],
            },
            "global_attention": {"heads": s["num_heads"], "level": s["num_levels"] - 1, "temperature": 20.0},
            "region_fc": {"hidden": 16},
            "dynamic_conv": {"hidden": s["dynamic_conv_feat_channels"]},
            "regional_attention": {
                "heads": s["regional_attention_heads"],
                "samples": s["regional_attention_samples"],
                "temperature": s["regional_positional_temperature"],
            },
        },
    }


def _queries(model: str) -> dict:
    s = sizes()
    if "ddq" not in model:
        return {"kind": "positions" if model == "plain_deformable_detr" else "top", "count": s["num_queries"]}
    return {
        "kind": "distinct",
        "count": s["num_queries"],
        "dense_ratio": s[model.removeprefix("plain_").removesuffix("_5scale")]["dense_topk_ratio"],
        "nms_threshold": PLAIN_NMS_THRESHOLD if model in PLAIN else s[model]["nms_iou_threshold"],
    }


@functools.cache
def detector(model: str):
    """A reference model with its weights."""
    built = abstract_detector(model_config(model), sizes()["num_classes"])
    load_official(built, arrays(f"{model}_state_dict"))
    return built


def models_with(case: str, models: Sequence[str], ours: Sequence[str]) -> tuple[str, ...]:
    """Models whose reference values include a case. Our own directory has it for `ours`; other directories may lack it."""
    if DIRECTORY == OWN_DIRECTORY:
        return tuple(ours)
    return tuple(model for model in models if (DIRECTORY / f"{model}_{case}.npz").exists())


def images() -> tuple[jax.Array, jax.Array]:
    """Normalised images `[B, H, W, 3]` and sizes `[B, 2]`."""
    inputs = arrays("inputs")
    return jnp.asarray(inputs["images"].transpose(0, 2, 3, 1)), jnp.asarray(inputs["image_sizes_hw"], jnp.int32)


def training_images(model: str) -> tuple[jax.Array, jax.Array]:
    """The images of a training step, as `images` returns them: those of two-stage Deformable DETR fill the batch, since
    mmdetection's losses look at what its proposals make of padding."""
    normalised, image_sizes = images()
    if model == "plain_deformable_detr":
        image_sizes = jnp.full_like(image_sizes, jnp.array(normalised.shape[1:3]))
    return normalised, image_sizes


def border_images(model: str) -> list[np.ndarray]:
    """The images `[3, h, w]` of the border case; for five levels they come from a wide one, see make_plain_reference.py."""
    inputs = arrays("border_inputs")
    if model.endswith("5scale"):
        return [inputs["image.2"][:, :, :1000], inputs["image.2"][:, :, 1000:].swapaxes(1, 2)]
    return [inputs[f"image.{image}"] for image in range(len(inputs["image_sizes_hw"]))]


def padded(images: Sequence[np.ndarray], height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Images `[3, h, w]` in one batch `[B, height, width, 3]`, and their sizes `[B, 2]`; what is padded is not zero."""
    batch = np.full((len(images), height, width, 3), 7.0, np.float32)
    for slot, image in zip(batch, images):
        slot[: image.shape[1], : image.shape[2]] = image.transpose(1, 2, 0)
    return jnp.asarray(batch), jnp.asarray([image.shape[1:] for image in images], jnp.int32)


def cropped(tokens: np.ndarray, shapes: Sequence[tuple[int, int]], sizes: np.ndarray) -> np.ndarray:
    """Tokens `[S, ...]` of an image without what is padded: (height, width) of the levels, and the valid ones `[L, 2]`."""
    ends = np.cumsum([height * width for height, width in shapes])
    levels = [level.reshape(*shape, *level.shape[1:]) for level, shape in zip(np.split(tokens, ends[:-1]), shapes)]
    valid = [level[:h, :w].reshape(h * w, *level.shape[2:]) for level, (h, w) in zip(levels, sizes)]
    return np.concatenate(valid)


def assert_close(actual, expected, tolerance: float, name: str = "") -> None:
    """Asserts that the largest difference is at most `tolerance` times the largest expected absolute value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    if not expected.size:
        return
    difference = np.max(np.abs(actual.astype(np.float64) - expected))
    scale = np.max(np.abs(expected))
    assert difference <= tolerance * scale + 1e-12, f"{name}: differs by {difference:.3g} of {scale:.3g}"

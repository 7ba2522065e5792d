"""Which detector a file of official or mmdetection's weights belongs to: its config, from names, shapes and meta data."""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hpr_jax.config import load_config, override
from hpr_jax.errors import UserError
from hpr_jax.weights.config_text import model_settings

# The official layer whose rows are the classes.
CLASS_LAYER = "bbox_head.cls_branches.0.weight"


def recognize(
    tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any], source: str, overrides: Sequence[tuple[str, str]] = ()
) -> ConfigDict:
    """The config of the detector whose weights a file holds.

    Sizes are those of the tensors. What has no tensor comes from the config in the file's meta data, or is as published.

    Args:
      tensors: in PyTorch layout, by official name.
      meta: the file's meta data.
      source: the name of the file, for messages.
      overrides: settings (dotted key, text) that the caller knows.

    Raises:
      UserError: the file holds no detector that is known here, or does not say something that only its maker knows.
    """
    if CLASS_LAYER not in tensors:
        raise UserError(f"{source} holds no detector with official names: it has no {CLASS_LAYER}.")
    stated = meta.get("model")
    published = stated if isinstance(stated, Mapping) else model_settings(meta.get("cfg"))
    given = {key for key, _ in overrides}
    kind, plain = _kind(tensors, published, source), not any(".regional_ca." in name for name in tensors)
    swin = "backbone.patch_embed.projection.weight" in tensors
    two_stage = "pos_trans_fc.weight" in tensors
    if two_stage:
        variant = "plain_r50" if plain else "from_plain_r50"
    elif plain:
        variant = "plain_r50" if kind in ("dino", "ddq") else "r50_1x"
    else:
        variant = "swin_l_1x" if swin and kind != "deformable_detr" else "r50_1x"
    config = load_config(f"{kind}.py:{variant}")
    model = config.model
    if plain:
        model.refiner.auxiliaries = ()
    heads = _at(published, "encoder.layer_cfg.self_attn_cfg.num_heads")
    if isinstance(heads, int) and heads > 0:
        model.heads = heads
    try:
        _set_sizes(model, tensors, swin)
    except UserError:
        raise
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"The weights of {source} have shapes of no detector that is known here.") from error
    _set_published(config, published)
    if kind == "align_detr":
        first, *_, last = config.loss.aligned.repeats
        config.loss.aligned.repeats = (first,) * (model.refiner.layers - 1) + (last,)
    if "query_embedding.weight" in tensors:
        model.queries.count = len(tensors["query_embedding.weight"])
    elif "num_queries" not in published and plain and "model.queries.count" not in given:
        raise UserError(
            f"{source} does not say how many queries its detector has; set config.model.queries.count, to "
            f"{model.queries.count} for the published ones."
        )
    for key, text in overrides:
        override(config, key, text)
    return config


def _kind(tensors: Mapping[str, np.ndarray], published: Mapping[str, Any], source: str) -> str:
    """The config file of the detector.

    Raises:
      UserError: it is another detector, or one of two that have the same tensors.
    """
    if "reference_points_fc.weight" in tensors:
        raise UserError(
            f"{source} is Deformable DETR without two stages, whose queries come from no proposals; none such is here. Take "
            "the published one with refinement and two stages."
        )
    if not any(name in tensors for name in ("pos_trans_fc.weight", "query_embedding.weight", "query_map.weight")):
        raise UserError(f"{source} is a detector whose queries come from nothing that is known here.")
    if "query_map.weight" in tensors:
        return "ddq"
    if "dn_query_generator.label_embedding.weight" not in tensors:
        return "deformable_detr"
    name = published.get("type")
    if isinstance(name, str):
        return "align_detr" if "Align" in name else "dino"
    if "backbone.patch_embed.projection.weight" not in tensors:
        # The published ones with ResNet-50 differ in this.
        return "align_detr" if "neck.convs.0.conv.bias" in tensors else "dino"
    raise UserError(
        f"{source} is DINO or Align DETR, which have the same tensors; name the config, such as dino.py:swin_l_1x."
    )


def _at(settings: Any, path: str, default: Any = None) -> Any:
    """The value at a dotted path of nested settings, `default` if there is none."""
    for part in path.split("."):
        settings = settings.get(part, default) if isinstance(settings, Mapping) else default
    return settings


def _set_sizes(model: Any, tensors: Mapping[str, np.ndarray], swin: bool) -> None:
    """Sets what the shapes and the names tell."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"The weights are of no detector that is known here: {name} is missing.")
        return tensors[name].shape

    def count(pattern: str) -> int:
        """How many different numbers the group of a pattern finds at the beginning of names."""
        found = (re.match(pattern, name) for name in tensors)
        return len({match[1] for match in found if match})

    model.channels = shape("level_embed")[1]
    model.levels = shape("level_embed")[0]
    model.hidden = shape("encoder.layers.0.ffn.layers.0.0.weight")[0]
    model.points = shape("encoder.layers.0.self_attn.attention_weights.weight")[0] // (model.heads * model.levels)
    model.encoder.layers, model.refiner.layers = count(r"encoder\.layers\.(\d+)\."), count(r"decoder\.layers\.(\d+)\.")
    model.neck.bias = "neck.convs.0.conv.bias" in tensors
    maps = count(r"neck\.convs\.(\d+)\.")
    backbone = dict(model.backbone)
    if swin:
        stages = count(r"backbone\.stages\.(\d+)\.")
        tables = [
            shape(f"backbone.stages.{stage}.blocks.0.attn.w_msa.relative_position_bias_table") for stage in range(stages)
        ]
        backbone = {
            "kind": "swin",
            "embed_channels": shape("backbone.patch_embed.projection.weight")[0],
            "depths": tuple(count(rf"backbone\.stages\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)),
            "heads": tuple(heads for _, heads in tables),
            "window": (math.isqrt(tables[0][0]) + 1) // 2,
            "drop_path": 0.2,
            "first_map": stages - maps,
            "frozen_stages": -1,
        }
    else:
        blocks = tuple(count(rf"backbone\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
        backbone.update(blocks=blocks, base_channels=shape("backbone.conv1.weight")[0], first_map=len(blocks) - maps)
    model.backbone = backbone
    if model.refiner.auxiliaries:
        model.refiner.dynamic_conv.hidden = shape("decoder.layers.0.dy_conv.dynamic_layer.weight")[0] // (2 * model.channels)
        model.refiner.regional_attention.samples = (
            shape("decoder.layers.0.regional_ca.sample_proj.weight")[0] // model.channels
        )
        bins = shape("decoder.layers.0.dy_conv.fc_layer.weight")[1] // model.channels
        model.refiner.region.output_size = math.isqrt(bins)
    # As published, HPR's regions have these strides with any backbone.
    finest = 8 if model.refiner.auxiliaries else 4 * 2**model.backbone.first_map
    model.refiner.region.strides = tuple(finest * 2**level for level in range(model.levels))


def _set_published(config: ConfigDict, published: Mapping[str, Any]) -> None:
    """Sets what only the config in a file's meta data tells, where it is what it should be."""

    def take(section: Any, key: str, path: str, default: Any = None) -> None:
        """Sets `key` of a section of ours to the number, or numbers, at a path of the published config."""
        value, old = _at(published, path, default), section[key]
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers):
            return
        # Numbers without end, or too large, are a stranger's; the settings' ranges are checked later.
        if isinstance(old, tuple) == isinstance(value, list):
            with contextlib.suppress(OverflowError, ValueError):
                section[key] = tuple(map(float, numbers)) if isinstance(old, tuple) else type(old)(value)

    model = config.model
    take(model.neck, "groups", "neck.norm_cfg.num_groups")
    take(model, "pixel_mean", "data_preprocessor.mean")
    take(model, "pixel_std", "data_preprocessor.std")
    take(model.backbone, "frozen_stages", "backbone.frozen_stages")
    if isinstance(published.get("positional_encoding"), Mapping):
        take(model.encoder, "position_temperature", "positional_encoding.temperature", 10000)
        take(model.encoder, "position_offset", "positional_encoding.offset", 0)
    take(model.refiner, "output_epsilon", "bbox_head.inverse_sigmoid_eps")
    take(config.evaluate, "detections", "test_cfg.max_per_img")
    if model.queries.kind != "top":
        take(model.queries, "count", "num_queries")
    if model.queries.kind == "distinct":
        take(model.queries, "dense_ratio", "dense_topk_ratio")
        take(model.queries, "nms_threshold", "dqs_cfg.iou_threshold")

"""The family of Hugging Face's transformers: two-stage Deformable DETR."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hpr_jax.data.sources.coco import COCO_CLASSES
from hpr_jax.weights.families import Family, Rule, Tensors

# What the `config.json` of its folders calls the model.
MODEL_TYPE = "deformable_detr"
# Its word for a class that stands for nothing: COCO's category ids have gaps, and its models have a class for each number.
NO_CLASS = "N/A"
_PARAMETER = r"(weight|bias)"
# Number of classes of a model whose classes are COCO's category ids.
_COCO_NUMBERS = 91


def _rules(tensors: Tensors) -> Iterable[Rule]:
    number = 0
    # Behind the projections of the backbone's maps come those that make coarser levels, whose kernels are larger.
    while tensors.get(f"model.input_proj.{number}.0.weight", np.zeros((1, 1, 3, 3))).shape[2:] == (1, 1):
        yield rf"model\.input_proj\.{number}\.0\.{_PARAMETER}", rf"neck.convs.{number}.conv.\1"
        yield rf"model\.input_proj\.{number}\.1\.{_PARAMETER}", rf"neck.convs.{number}.gn.\1"
        number += 1
    for extra in range(8):
        yield rf"model\.input_proj\.{number + extra}\.0\.{_PARAMETER}", rf"neck.extra_convs.{extra}.conv.\1"
        yield rf"model\.input_proj\.{number + extra}\.1\.{_PARAMETER}", rf"neck.extra_convs.{extra}.gn.\1"
    yield r"model\.backbone\.conv_encoder\.model\.([\w.]+)", r"backbone.\1"
    yield r"model\.level_embed", "level_embed"
    attention = rf"(sampling_offsets|attention_weights|value_proj|output_proj)\.{_PARAMETER}"
    yield rf"model\.(en|de)coder\.layers\.(\d\d?)\.self_attn\.{attention}", r"\1coder.layers.\2.self_attn.\3.\4"
    yield rf"model\.decoder\.layers\.(\d\d?)\.encoder_attn\.{attention}", r"decoder.layers.\1.cross_attn.\2.\3"
    for part, letter in enumerate("qkv"):
        projection = rf"model\.decoder\.layers\.(\d\d?)\.self_attn\.{letter}_proj\.{_PARAMETER}"
        yield projection, rf"decoder.layers.\1.self_attn.attn.in_proj_\2@{part}"
    yield (
        rf"model\.decoder\.layers\.(\d\d?)\.self_attn\.out_proj\.{_PARAMETER}",
        r"decoder.layers.\1.self_attn.attn.out_proj.\2",
    )
    yield rf"model\.(en|de)coder\.layers\.(\d\d?)\.self_attn_layer_norm\.{_PARAMETER}", r"\1coder.layers.\2.norms.0.\3"
    yield rf"model\.decoder\.layers\.(\d\d?)\.encoder_attn_layer_norm\.{_PARAMETER}", r"decoder.layers.\1.norms.1.\2"
    yield rf"model\.encoder\.layers\.(\d\d?)\.final_layer_norm\.{_PARAMETER}", r"encoder.layers.\1.norms.1.\2"
    yield rf"model\.decoder\.layers\.(\d\d?)\.final_layer_norm\.{_PARAMETER}", r"decoder.layers.\1.norms.2.\2"
    yield rf"model\.(en|de)coder\.layers\.(\d\d?)\.fc1\.{_PARAMETER}", r"\1coder.layers.\2.ffn.layers.0.0.\3"
    yield rf"model\.(en|de)coder\.layers\.(\d\d?)\.fc2\.{_PARAMETER}", r"\1coder.layers.\2.ffn.layers.1.\3"
    yield rf"model\.enc_output\.{_PARAMETER}", r"memory_trans_fc.\1"
    yield rf"model\.enc_output_norm\.{_PARAMETER}", r"memory_trans_norm.\1"
    yield rf"model\.pos_trans\.{_PARAMETER}", r"pos_trans_fc.\1"
    yield rf"model\.pos_trans_norm\.{_PARAMETER}", r"pos_trans_norm.\1"
    # Those of detectors without two stages, which are known, but are none of ours.
    yield rf"model\.reference_points\.{_PARAMETER}", r"reference_points_fc.\1"
    yield r"model\.query_position_embeddings\.weight", "query_embedding.weight"
    yield rf"class_embed\.(\d\d?)\.{_PARAMETER}", r"bbox_head.cls_branches.\1.\2"
    for layer in range(3):
        yield rf"bbox_embed\.(\d\d?)\.layers\.{layer}\.{_PARAMETER}", rf"bbox_head.reg_branches.\1.{2 * layer}.\2"


def _adapt(tensors: dict[str, np.ndarray], meta: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """Leaves out the classes that stand for nothing.

    In the head of the proposals the first class stands for objects of any class, whatever its name.
    """
    count = next(iter(tensors.get("bbox_head.cls_branches.0.weight", np.zeros(0)).shape), 0)
    labels = meta.get("id2label")
    names = [labels.get(str(number)) for number in range(count)] if isinstance(labels, Mapping) else []
    if not all(isinstance(name, str) for name in names) or not names:
        by_id = dict(zip(COCO_CLASSES.category_ids, COCO_CLASSES.names))
        names = [by_id.get(number, NO_CLASS) for number in range(count)] if count == _COCO_NUMBERS else []
    kept = [number for number, name in enumerate(names) if name != NO_CLASS]
    if not kept:
        return tensors, meta
    proposals = max((int(name.split(".")[2]) for name in tensors if name.startswith("bbox_head.cls_branches.")), default=0)
    changed = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith("bbox_head.cls_branches.") and tensor.shape[:1] == (count,):
            rows = [0, *kept[1:]] if name.split(".")[2] == str(proposals) else kept
            changed[name] = tensor[np.array(rows)]
    classes = {"classes": [names[number] for number in kept], "category_ids": kept}
    return changed, {**meta, "dataset_meta": classes}


def _published(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a model's config.json in mmdetection's words."""
    settings: dict[str, Any] = {
        "type": "DeformableDETR",
        "positional_encoding": {"temperature": 10000, "offset": -0.5},
        "data_preprocessor": {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]},
        "backbone": {"frozen_stages": 1},
    }
    if "encoder_attention_heads" in meta:
        settings["encoder"] = {"layer_cfg": {"self_attn_cfg": {"num_heads": meta["encoder_attention_heads"]}}}
    for key in ("num_queries", "two_stage_num_proposals"):
        if key in meta:
            settings["num_queries"] = meta[key]
    return settings


HUGGING_FACE = Family(
    project="Hugging Face's transformers",
    mark="model.level_embed",
    rules=_rules,
    aliases={"model.decoder.class_embed.": "class_embed.", "model.decoder.bbox_embed.": "bbox_embed."},
    published=_published,
    adapt=_adapt,
)

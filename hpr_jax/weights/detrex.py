"""The family detrex: DINO and Align DETR (projects/dino and projects/align_detr in detrex)."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hpr_jax.weights.backbone_names import as_official_backbone
from hpr_jax.weights.families import Family, Rule, Tensors

_PARAMETER = r"(weight|bias)"
_RESNET: tuple[Rule, ...] = (
    (r"backbone\.stem\.conv1\.weight", "backbone.conv1.weight"),
    (r"backbone\.stem\.conv1\.norm\.(\w+)", r"backbone.bn1.\1"),
    *(
        rule
        for stage in range(1, 5)
        for rule in (
            (rf"backbone\.res{stage + 1}\.(\d\d?)\.conv(\d)\.weight", rf"backbone.layer{stage}.\1.conv\2.weight"),
            (rf"backbone\.res{stage + 1}\.(\d\d?)\.conv(\d)\.norm\.(\w+)", rf"backbone.layer{stage}.\1.bn\2.\3"),
            (rf"backbone\.res{stage + 1}\.(\d\d?)\.shortcut\.weight", rf"backbone.layer{stage}.\1.downsample.0.weight"),
            (rf"backbone\.res{stage + 1}\.(\d\d?)\.shortcut\.norm\.(\w+)", rf"backbone.layer{stage}.\1.downsample.1.\2"),
        )
    ),
)
_DETECTOR: tuple[Rule, ...] = (
    (rf"neck\.(convs|extra_convs)\.(\d\d?)\.conv\.{_PARAMETER}", r"neck.\1.\2.conv.\3"),
    (rf"neck\.(convs|extra_convs)\.(\d\d?)\.norm\.{_PARAMETER}", r"neck.\1.\2.gn.\3"),
    (r"transformer\.level_embeds", "level_embed"),
    (rf"transformer\.encoder\.layers\.(\d\d?)\.attentions\.0\.(\w+)\.{_PARAMETER}", r"encoder.layers.\1.self_attn.\2.\3"),
    (
        r"transformer\.decoder\.layers\.(\d\d?)\.attentions\.0\.attn\.(in_proj_\w+|out_proj\.\w+)",
        r"decoder.layers.\1.self_attn.attn.\2",
    ),
    (rf"transformer\.decoder\.layers\.(\d\d?)\.attentions\.1\.(\w+)\.{_PARAMETER}", r"decoder.layers.\1.cross_attn.\2.\3"),
    (
        rf"transformer\.(en|de)coder\.layers\.(\d\d?)\.ffns\.0\.layers\.0\.0\.{_PARAMETER}",
        r"\1coder.layers.\2.ffn.layers.0.0.\3",
    ),
    (rf"transformer\.(en|de)coder\.layers\.(\d\d?)\.ffns\.0\.layers\.1\.{_PARAMETER}", r"\1coder.layers.\2.ffn.layers.1.\3"),
    (rf"transformer\.(en|de)coder\.layers\.(\d\d?)\.norms\.(\d)\.{_PARAMETER}", r"\1coder.layers.\2.norms.\3.\4"),
    (rf"transformer\.decoder\.(ref_point_head\.layers\.\d|norm)\.{_PARAMETER}", r"decoder.\1.\2"),
    (r"transformer\.tgt_embed\.weight", "query_embedding.weight"),
    (rf"transformer\.enc_output\.{_PARAMETER}", r"memory_trans_fc.\1"),
    (rf"transformer\.enc_output_norm\.{_PARAMETER}", r"memory_trans_norm.\1"),
    (rf"class_embed\.(\d\d?)\.{_PARAMETER}", r"bbox_head.cls_branches.\1.\2"),
    *(
        (rf"bbox_embed\.(\d\d?)\.layers\.{layer}\.{_PARAMETER}", rf"bbox_head.reg_branches.\1.{2 * layer}.\2")
        for layer in range(3)
    ),
    (r"label_enc\.weight", "dn_query_generator.label_embedding.weight"),
)


def _rules(tensors: Tensors) -> Iterable[Rule]:
    """The table; a Swin backbone keeps its names, which have a table of their own."""
    return (*(((r"(backbone\.[\w.]+)", r"\1"),) if _has_swin(tensors) else _RESNET), *_DETECTOR)


def _has_swin(tensors: Tensors) -> bool:
    return "backbone.patch_embed.proj.weight" in tensors


def _adapt(tensors: dict[str, np.ndarray], meta: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    if _has_swin(tensors):
        backbone = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
        others = {name: tensor for name, tensor in tensors.items() if name not in backbone}
        tensors = others | as_official_backbone(backbone, "the file")
    return tensors, meta


def _published(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of detrex's configs. Its files say nothing of themselves, and tensors do not tell Align DETR from DINO,
    which finds the same."""
    return {
        "type": "DINO",
        "positional_encoding": {"temperature": 10000, "offset": -0.5},
        "data_preprocessor": {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]},
        "backbone": {"frozen_stages": 0},
        "bbox_head": {"inverse_sigmoid_eps": 1e-3},
    }


DETREX = Family(
    project="detrex",
    mark="transformer.level_embeds",
    rules=_rules,
    aliases={"transformer.decoder.class_embed.": "class_embed.", "transformer.decoder.bbox_embed.": "bbox_embed."},
    published=_published,
    adapt=_adapt,
)

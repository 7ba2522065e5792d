"""The table from the paths of our variables to the names that official PyTorch weights have."""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence

# Auxiliary refiner -> prefix of its path's official attributes, official name of its module, and number of its branch.
AUXILIARY_REFINERS = {"regional_attention": ("ca_", "regional_ca", 0), "dynamic_conv": ("dyconv_", "dy_conv", 1)}

# Patterns in our dotted paths, and what official names have in their place. Rules are applied in turn: later ones see the
# replacements of earlier ones. Of the placeholders in replacements, `{l}` stands for the layer of a stack, `{even}` and
# `{odd}` for 2l and 2l + 1, `{last}` for the number of decoder layers, and `{dense_last}` for one more.
Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
_RESNET_RULES: Rules = (
    (r"^backbone\.stem_norm", "backbone.bn1"),
    (r"^backbone\.stem", "backbone.conv1"),
    (r"^backbone\.stages\.(\d+)\.(\d+)\.", lambda m: f"backbone.layer{int(m[1]) + 1}.{m[2]}."),
    (r"\.norm(\d)", r".bn\1"),
    (r"\.shortcut_norm", ".downsample.1"),
    (r"\.shortcut", ".downsample.0"),
)
_SWIN_RULES: Rules = (
    (r"\.patch_embed\.(kernel|bias)$", r".patch_embed.projection.\1"),
    (r"\.norms\.(\d)", r".norm\1"),
    (r"\.pairs\.plain", ".blocks.{even}"),
    (r"\.pairs\.shifted", ".blocks.{odd}"),
    (r"\.attention\.position_bias", ".attn.w_msa.relative_position_bias_table"),
    (r"\.attention\.qkv", ".attn.w_msa.qkv"),
    (r"\.attention\.project", ".attn.w_msa.proj"),
    (r"\.mlp\.expand", ".ffn.layers.0.0"),
    (r"\.mlp\.contract", ".ffn.layers.1"),
    (r"\.merge\.", ".downsample."),
)
_RULES: Rules = (
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
    (r"^query_init\.encode_norm", "pos_trans_norm"),
    (r"^query_init\.encode", "pos_trans_fc"),
    (r"^query_init\.content$", "query_embedding.weight"),
    (r"^query_init\.content", "query_map"),
    (r"^query_init\.head", "bbox_head.matching.{last}"),
    (r"^query_init\.dense_head", "bbox_head.matching.{dense_last}"),
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
)
_LEAF_RULES: Rules = (
    (r"\.(kernel|scale)$", ".weight"),
    (r"\.mean$", ".running_mean"),
    (r"\.variance$", ".running_var"),
)
# Matches the paths of variables whose shape depends on the number of classes.
_DEPENDS_ON_CLASSES = re.compile(r"(^|\.)classes\.(kernel|bias)$|^denoiser\.embedding$")


def depends_on_classes(dotted: str) -> bool:
    """Whether the shape of our variable at this dotted path depends on the number of classes."""
    return _DEPENDS_ON_CLASSES.search(dotted) is not None


def dotted_path(path: Iterable[object]) -> str:
    """`("encoder", "layers", 0)` -> `encoder.layers.0`."""
    return ".".join(map(str, path))


def official_name(dotted: str, branches: Sequence[str], *, swin: bool, first_map: int) -> str:
    """The official name of our variable at a dotted path, with the placeholders of the rules.

    Args:
      branches: names of the auxiliary refiners, in the order of the detector's branches.
      swin: the backbone is a Swin transformer, not a ResNet.
      first_map: the first stage of the backbone whose map is used; norms of maps count from it here, from 0 there.
    """
    if dotted.startswith("backbone."):
        dotted = re.sub(r"\.norms\.(\d)", lambda m: f".norms.{int(m[1]) + first_map}", dotted)
        return _apply(dotted, _SWIN_RULES if swin else _RESNET_RULES, _LEAF_RULES)
    for index, branch in enumerate(branches):
        prefix, module, number = AUXILIARY_REFINERS[branch]
        stem = f"refiner.layers.auxiliaries.{index}."
        if dotted.startswith(stem):
            return _official_auxiliary(dotted.removeprefix(stem), prefix, module)
        dotted = re.sub(rf"^refiner\.branch_norms\.{index}\.", f"decoder.norm_aux.{number}.", dotted)
        dotted = re.sub(rf"^branch_heads\.{index}\.(matching|dense)", rf"bbox_head_aux.{number}.\1.{{l}}", dotted)
    return _apply(dotted, _RULES, _LEAF_RULES)


def _official_auxiliary(rest: str, prefix: str, module: str) -> str:
    """The official name of a variable of an auxiliary path, whose path within it is `rest`."""
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
            dotted = f"decoder.layers.{{l}}.{module}.{official}.{rest.removeprefix(ours + '.')}"
            return _apply(dotted, _RULES, _LEAF_RULES)
    if rest.startswith("attention."):
        dotted = f"decoder.layers.{{l}}.{prefix}self_attn.attn.{rest.removeprefix('attention.')}"
        return _apply(dotted, _RULES, _LEAF_RULES)
    rest = re.sub(r"^norm(\d)\.", lambda m: f"norms.{int(m[1]) - 1}.", rest)
    return f"decoder.layers.{{l}}.{prefix}" + _apply(f".{rest}", _RULES, _LEAF_RULES).removeprefix(".")


def _apply(dotted: str, *tables: Rules) -> str:
    for pattern, replacement in itertools.chain(*tables):
        dotted = re.sub(pattern, replacement, dotted)
    return dotted

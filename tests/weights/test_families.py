"""Detectors of other projects: names and shapes of full-size ones, and what becomes of their tensors.

`family_shapes.json` has the names and shapes of the state dicts that the projects' own code makes.
"""

import json

import numpy as np
import pytest
import reference
import tiny

from hpr_jax.config import load_config
from hpr_jax.data.sources.coco import COCO_CLASSES
from hpr_jax.errors import UserError
from hpr_jax.models.build import abstract_detector
from hpr_jax.weights.classes import guess_classes
from hpr_jax.weights.hugging_face import NO_CLASS
from hpr_jax.weights.official import load_official
from hpr_jax.weights.recognize import CLASS_LAYER, recognize
from hpr_jax.weights.safetensors_file import write_safetensors
from hpr_jax.weights.source import open_source
from hpr_jax.weights.torch_file import write_checkpoint
from hpr_jax.weights.weights_file import by_official_name

SHAPES = json.loads((tiny.ROOT / "tests/reference_values/family_shapes.json").read_text())
# What differs from the config of the plain detector: settings of the projects' own configs.
DETREX = {
    "model.neck.bias": "True",
    "model.encoder.position_temperature": "10000",
    "model.encoder.position_offset": "-0.5",
    "model.backbone.frozen_stages": "0",
    "model.refiner.output_epsilon": "1e-3",
}
SAME_MODELS = {
    "detrex_dino_r50": ("dino.py:plain_r50", DETREX),
    "hugging_face_deformable_detr": ("deformable_detr.py:plain_r50", {"model.neck.bias": "True"}),
}
# What the config.json of a Hugging Face model says, in part.
HUGGING_FACE_CONFIG = {"model_type": "deformable_detr", "encoder_attention_heads": 8, "two_stage_num_proposals": 300}


def stand_ins(family):
    """Tensors of the shapes of a full-size model, which take no memory."""
    return {name: np.broadcast_to(np.float32(0), tuple(shape)) for name, shape in SHAPES[family].items()}


def official(family):
    return by_official_name(stand_ins(family), HUGGING_FACE_CONFIG if family.startswith("hugging") else {}, "FILE")


@pytest.mark.parametrize("family", SAME_MODELS)
def test_full_size_detectors_are_recognised(family):
    spec, settings = SAME_MODELS[family]
    tensors, meta = official(family)
    found = recognize(tensors, meta, "FILE").model.to_dict()
    expected = load_config(spec, list(settings.items())).model.to_dict()
    for config in (found, expected):
        # They concern training alone, and stand in no file.
        del config["denoising"]
    assert found == expected


@pytest.mark.parametrize("family", SHAPES)
def test_every_tensor_is_used_once(family):
    tensors, meta = official(family)
    detector = abstract_detector(recognize(tensors, meta, "FILE").model, len(tensors[CLASS_LAYER]))
    assert load_official(detector, tensors) == []


@pytest.mark.parametrize("family", SHAPES)
def test_a_tensor_too_many_or_too_few_is_told(family):
    tensors = stand_ins(family)
    with pytest.raises(UserError, match=r"FILE is of .*, and holds transformer\.more\.weight, which no detector"):
        by_official_name({**tensors, "transformer.more.weight": np.zeros(1)}, {}, "FILE")
    fewer, meta = by_official_name(
        {name: tensor for name, tensor in tensors.items() if "enc_output_norm" not in name}, {}, "FILE"
    )
    config = recognize(fewer, meta, "FILE", [("model.queries.count", "300")] if "hugging" in family else [])
    with pytest.raises(UserError, match=r"missing: memory_trans_norm"):
        load_official(abstract_detector(config.model, len(fewer[CLASS_LAYER])), fewer)


def test_a_tensor_of_two_names_has_one_value():
    tensors = {"transformer.level_embeds": np.zeros((1, 2))}
    for name, value in (("class_embed.0.bias", 1.0), ("transformer.decoder.class_embed.0.bias", 2.0)):
        tensors[name] = np.full(3, value)
    with pytest.raises(UserError, match=r"holds class_embed\.0\.bias under two names, with different values"):
        by_official_name(tensors, {}, "FILE")
    tensors["class_embed.0.bias"] += 1
    assert by_official_name(tensors, {}, "FILE")[0]["bbox_head.cls_branches.0.bias"].tolist() == [2.0] * 3


def test_queries_keys_and_values_are_joined_in_this_order():
    prefix = "model.decoder.layers.3.self_attn"
    tensors = {f"{prefix}.{letter}_proj.bias": np.full(2, number) for number, letter in ((7, "k"), (9, "v"), (5, "q"))}
    found, _ = by_official_name({"model.level_embed": np.zeros((1, 2)), **tensors}, {}, "FILE")
    assert found["decoder.layers.3.self_attn.attn.in_proj_bias"].tolist() == [5, 5, 7, 7, 9, 9]
    tensors[f"{prefix}.v_proj.bias"] = np.zeros((2, 2))
    with pytest.raises(UserError, match=r"The parts of decoder\.layers\.3\.\S+ in FILE have shapes that do not fit"):
        by_official_name({"model.level_embed": np.zeros((1, 2)), **tensors}, {}, "FILE")


class TestClassesOfHuggingFace:
    @staticmethod
    def converted(labels, count=4):
        """Class layers of two layers and of the proposals, whose rows are numbered, by official name; and the meta data."""
        tensors = {f"class_embed.{layer}.bias": np.arange(count) + 10.0 * layer for layer in range(3)}
        meta = {} if labels is None else {"id2label": {str(number): label for number, label in enumerate(labels)}}
        tensors |= {"model.level_embed": np.zeros((1, 2)), "class_embed.0.weight": np.zeros((count, 2))}
        return by_official_name(tensors, meta, "FILE")

    def test_those_that_stand_for_nothing_are_left_out(self):
        """In the proposals the first class stays: it stands for any object."""
        found, meta = self.converted([NO_CLASS, "cup", NO_CLASS, "pen"])
        biases = [found[f"bbox_head.cls_branches.{layer}.bias"].tolist() for layer in range(3)]
        assert biases == [[1, 3], [11, 13], [20, 23]]
        assert guess_classes(meta, 2).names == ("cup", "pen")
        assert guess_classes(meta, 2).category_ids == (1, 3)

    def test_names_come_along(self):
        found, meta = self.converted(["a", "b", "c", "d"])
        assert found["bbox_head.cls_branches.2.bias"].tolist() == [20, 21, 22, 23]
        assert guess_classes(meta, 4).names == ("a", "b", "c", "d")

    def test_91_without_names_are_the_category_ids_of_coco(self):
        found, meta = self.converted(None, 91)
        assert guess_classes(meta, 80) == COCO_CLASSES
        assert found["bbox_head.cls_branches.0.bias"].tolist() == list(COCO_CLASSES.category_ids)

    @pytest.mark.parametrize("labels", [None, [1, 2, 3, 4], [NO_CLASS] * 4])
    def test_others_stay_as_they_are(self, labels):
        found, _ = self.converted(labels)
        assert found["bbox_head.cls_branches.0.bias"].tolist() == [0, 1, 2, 3]


# How other names are made of mmdetection's, by hand: replaced in this order.
RESNET = (("backbone.conv1", "backbone.stem.conv1"), ("backbone.bn1", "backbone.stem.conv1.norm"))
DETREX_NAMES = (
    ("encoder.layers.", "transformer.encoder.layers."),
    ("decoder.", "transformer.decoder."),
    (".self_attn.attn.", ".attentions.0.attn."),
    (".self_attn.", ".attentions.0."),
    (".cross_attn.", ".attentions.1."),
    (".ffn.", ".ffns.0."),
    ("bbox_head.cls_branches", "class_embed"),
    ("memory_trans_fc", "transformer.enc_output"),
    ("memory_trans_norm", "transformer.enc_output_norm"),
    ("level_embed", "transformer.level_embeds"),
    ("query_embedding", "transformer.tgt_embed"),
    ("dn_query_generator.label_embedding", "label_enc"),
    ("gn", "norm"),
    *RESNET,
    *((f"backbone.layer{stage}", f"backbone.res{stage + 1}") for stage in range(1, 5)),
    *((f".bn{number}.", f".conv{number}.norm.") for number in (1, 2, 3)),
    ("downsample.0", "shortcut"),
    ("downsample.1", "shortcut.norm"),
)
HUGGING_FACE_NAMES = (
    ("backbone.", "backbone.conv_encoder.model."),
    ("neck.convs.0.conv", "input_proj.0.0"),
    ("neck.convs.1.conv", "input_proj.1.0"),
    ("neck.convs.2.conv", "input_proj.2.0"),
    ("neck.extra_convs.0.conv", "input_proj.3.0"),
    ("neck.convs.0.gn", "input_proj.0.1"),
    ("neck.convs.1.gn", "input_proj.1.1"),
    ("neck.convs.2.gn", "input_proj.2.1"),
    ("neck.extra_convs.0.gn", "input_proj.3.1"),
    (".self_attn.attn.", ".self_attn."),
    (".cross_attn.", ".encoder_attn."),
    ("ffn.layers.0.0", "fc1"),
    ("ffn.layers.1", "fc2"),
    ("norms.0", "self_attn_layer_norm"),
    ("norms.2", "final_layer_norm"),
    ("memory_trans_fc", "enc_output"),
    ("memory_trans_norm", "enc_output_norm"),
    ("pos_trans_fc", "pos_trans"),
    ("bbox_head.cls_branches", "decoder.class_embed"),
)


def official_arrays(model):
    """The tensors of a small reference model, without buffers that say nothing."""
    everything = reference.arrays(f"{model}_state_dict")
    return {name: tensor for name, tensor in everything.items() if not name.endswith("num_batches_tracked")}


def renamed(name, table, boxes):
    """mmdetection's name -> another project's; `boxes` is what it calls the heads of boxes."""
    for theirs, ours in table:
        name = name.replace(theirs, ours)
    if name.startswith("bbox_head.reg_branches"):
        _, _, layer, number, kind = name.split(".")
        name = f"{boxes}.{layer}.layers.{int(number) // 2}.{kind}"
    return name


def test_a_file_of_detrex_loads(tmp_path):
    expected = official_arrays("plain_dino")
    tensors = {renamed(name, DETREX_NAMES, "bbox_embed"): tensor for name, tensor in expected.items()}
    write_checkpoint(tmp_path / "model.pth", tensors, {})
    source = open_source(tmp_path / "model.pth", [("model.heads", "4"), ("model.points", "4"), ("model.neck.groups", "8")])
    found, _ = by_official_name(tensors, {}, "FILE")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    assert source.load().query_init.content.shape == (40, 32)


def test_a_folder_of_hugging_face_loads(tmp_path):
    expected = official_arrays("plain_deformable_detr")
    tensors = {}
    for name, tensor in expected.items():
        new = f"model.{renamed(name, HUGGING_FACE_NAMES, 'decoder.bbox_embed')}"
        if "encoder.layers" in new:
            new = new.replace("norms.1", "final_layer_norm") if "model.encoder" in new else new
        new = new.replace("norms.1", "encoder_attn_layer_norm")
        if "in_proj_" in new:
            prefix, kind = new.split("in_proj_")
            tensors |= {f"{prefix}{letter}_proj.{kind}": part for letter, part in zip("qkv", np.split(tensor, 3))}
        else:
            tensors[new] = tensor
    labels = {str(number): f"label {number}" for number in range(reference.sizes()["num_classes"])}
    config = {**HUGGING_FACE_CONFIG, "encoder_attention_heads": 4, "two_stage_num_proposals": 40, "id2label": labels}
    write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_source(tmp_path, [("model.neck.groups", "8")])
    assert source.config.model.queries.to_dict() == {"kind": "positions", "count": 40}
    assert source.classes.names == tuple(labels.values())
    found, _ = by_official_name(tensors, config, "FILE")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    source.load()
    config["model_type"] = "detr"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its model_type is 'detr', and not 'hpr_jax'"):
        open_source(tmp_path)

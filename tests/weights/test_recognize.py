"""Files of published weights as they are: which detector is in them, and what is asked of the caller."""

import json

import numpy as np
import pytest
import reference

import hpr_jax
from hpr_jax.config import load_config
from hpr_jax.errors import UserError
from hpr_jax.models.build import abstract_detector
from hpr_jax.weights.config_text import model_settings
from hpr_jax.weights.official import load_official
from hpr_jax.weights.recognize import recognize
from hpr_jax.weights.source import open_source
from hpr_jax.weights.torch_file import write_checkpoint

FULL_SIZE = json.loads((reference.OWN_DIRECTORY / "state_dict_shapes.json").read_text())
# The config of each full-size official model; its file would name the type of the model.
OFFICIAL = {
    "deformable_detr": ("deformable_detr.py:r50_1x", "HPRDETR"),
    "dino": ("dino.py:r50_1x", "HPRDETR"),
    "align_detr": ("align_detr.py:r50_1x", "HPRAlignDETR"),
    "ddq": ("ddq.py:r50_1x", "HPRDDQDETR"),
    "dino_swinl": ("dino.py:swin_l_1x", "HPRDETR"),
    "align_detr_swinl": ("align_detr.py:swin_l_1x", "HPRAlignDETR"),
    "ddq_swinl": ("ddq.py:swin_l_1x", "HPRDDQDETR"),
}


# mmdetection's names of detectors, where they are not HPR-DDQ.
TYPES = {
    "align_detr": "HPRAlignDETR",
    "dino": "HPRDETR",
    "plain_dino": "DINO",
    "plain_deformable_detr": "DeformableDETR",
}


def stand_ins(model):
    """Arrays of the shapes of a full-size model, which take no memory."""
    shapes = FULL_SIZE[model]
    pairs = shapes.items() if isinstance(shapes, dict) else shapes
    return {name: np.broadcast_to(np.float32(0), tuple(shape)) for name, shape in pairs}


def text_of(**settings):
    """The config text that mmengine would write."""
    return f"default_scope = 'mmdet'\nmodel = dict({', '.join(f'{key}={value!r}' for key, value in settings.items())})\n"


def meta_of(model):
    """The meta data of a reference model's file."""
    s = reference.sizes()
    kind = s["align_detr"] if model == "align_detr" else s["others"]
    queries = reference.model_config(model)["queries"]
    settings = {
        "type": TYPES.get(model, "HPRDDQDETR"),
        "encoder": {"layer_cfg": {"self_attn_cfg": {"num_heads": s["num_heads"]}}},
        "neck": {"norm_cfg": {"num_groups": s["neck_num_groups"]}},
        "positional_encoding": kind["positional_encoding"],
        "backbone": {"frozen_stages": kind["frozen_stages"]},
        "data_preprocessor": {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]},
        "test_cfg": {"max_per_img": s["max_per_image"]},
    }
    if queries["kind"] == "positions":
        settings |= {"num_queries": queries["count"], "positional_encoding": {"normalize": True, "offset": -0.5}}
    if queries["kind"] == "distinct":
        settings |= {"num_queries": queries["count"], "dense_topk_ratio": queries["dense_ratio"]}
        settings["dqs_cfg"] = {"type": "nms", "iou_threshold": queries["nms_threshold"]}
    return {"cfg": text_of(**settings), "iter": 12}


@pytest.mark.parametrize("model", [*OFFICIAL])
def test_full_size_official_models(model):
    spec, kind = OFFICIAL[model]
    config = recognize(stand_ins(model), {"cfg": text_of(type=kind)}, "FILE")
    assert config.model.to_dict() == load_config(spec).model.to_dict()


@pytest.mark.parametrize("model", ["dino", "align_detr", "ddq", *reference.PLAIN])
def test_sizes_are_those_of_the_tensors(model, tmp_path):
    tensors, expected = reference.arrays(f"{model}_state_dict"), reference.model_config(model)
    write_checkpoint(tmp_path / "published.pth", tensors, meta_of(model))
    source = open_source(tmp_path / "published.pth")
    found = source.config.model.to_dict()
    # What these have of their own stands in no tensor, and in no config of mmdetection.
    unknown = {"denoising", "refiner"}
    assert {k: v for k, v in found.items() if k not in unknown} == {k: v for k, v in expected.items() if k not in unknown}
    for key in ("layers", "auxiliaries", "dynamic_conv"):
        assert found["refiner"][key] == expected["refiner"][key] or not expected["refiner"]["auxiliaries"]
    assert found["refiner"]["region"]["strides"] == expected["refiner"]["region"]["strides"]
    assert source.config.evaluate.detections == reference.sizes()["max_per_image"]
    assert (len(source.classes.names), source.step) == (reference.sizes()["num_classes"], 12)
    # Loading is strict: every tensor is used once, and has its shape.
    source.load()


def test_a_file_detects(tmp_path):
    model = "plain_ddq_5scale"
    write_checkpoint(tmp_path / "published.pth", reference.arrays(f"{model}_state_dict"), meta_of(model))
    detector = hpr_jax.load(tmp_path / "published.pth", overrides={"evaluate.side": 64, "evaluate.max_side": 64})
    result = detector(np.random.default_rng(0).integers(0, 255, (60, 64, 3)).astype(np.uint8), threshold=0.0)
    assert len(result) == reference.sizes()["max_per_image"]
    assert np.isfinite(result.boxes).all()
    expected = abstract_detector(reference.model_config(model), reference.sizes()["num_classes"])
    load_official(expected, reference.arrays(f"{model}_state_dict"))
    assert np.array_equal(detector.module.neck.projections[0].conv.kernel, expected.neck.projections[0].conv.kernel)


def test_what_a_file_does_not_say_is_asked_for(tmp_path):
    tensors = reference.arrays("plain_ddq_5scale_state_dict")
    with pytest.raises(UserError, match=r"how many queries its detector has; set config\.model\.queries\.count, to 900"):
        recognize(tensors, {}, "FILE")
    assert recognize(tensors, {}, "FILE", [("model.queries.count", "40")]).model.queries.count == 40
    with pytest.raises(UserError, match=r"how many queries its detector has; set config\.model\.queries\.count, to 300"):
        recognize(reference.arrays("plain_deformable_detr_state_dict"), {}, "FILE")
    with pytest.raises(UserError, match=r"DINO or Align DETR, which have the same tensors; name the config"):
        recognize(stand_ins("dino_swinl"), {}, "FILE")
    # Without a word, those with ResNet-50 are told apart by a bias.
    for model in ("dino", "align_detr"):
        assert recognize(stand_ins(model), {}, "FILE").model.neck.bias == (model == "align_detr")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: {"transformer.level_embeds": np.zeros(1)}, "holds no detector with official names"),
        (lambda tensors: {**tensors, "reference_points_fc.weight": np.zeros(1)}, "Deformable DETR without two stages"),
        (
            lambda tensors: {k: v for k, v in tensors.items() if k != "query_embedding.weight"},
            "queries come from nothing that is known",
        ),
        (lambda tensors: {k: v for k, v in tensors.items() if k != "level_embed"}, "level_embed is missing"),
        (lambda tensors: {**tensors, "level_embed": np.zeros(4)}, "shapes of no detector"),
        (lambda tensors: {**tensors, "level_embed": np.zeros((0, 32))}, "shapes of no detector"),
    ],
)
def test_other_files_are_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        recognize(change(dict(reference.arrays("plain_dino_state_dict"))), meta_of("plain_dino"), "FILE")


@pytest.mark.parametrize(
    "value", ["1e999", "-1e999", "10 ** 400", "1" + "0" * 400, "'x'", "[1, 'x']", "[1e999]", "True", "None"]
)
def test_strange_numbers_of_a_config_are_left_out(value):
    text = f"model = dict(type='DINO', neck=dict(norm_cfg=dict(num_groups={value})), test_cfg=dict(max_per_img={value}))"
    plain = recognize(reference.arrays("plain_dino_state_dict"), {}, "FILE")
    found = recognize(reference.arrays("plain_dino_state_dict"), {"cfg": text}, "FILE")
    # Large numbers are numbers, and out of the settings' range.
    large = value.startswith("1000")
    assert found.model.neck.groups == (10**400 if large else plain.model.neck.groups)
    assert found.evaluate.detections == (10**400 if large else plain.evaluate.detections)


def test_a_missing_tensor_is_named(tmp_path):
    tensors = dict(reference.arrays("plain_dino_state_dict"))
    del tensors["encoder.layers.1.norms.0.bias"]
    write_checkpoint(tmp_path / "published.pth", tensors, meta_of("plain_dino"))
    source = open_source(tmp_path / "published.pth")
    with pytest.raises(UserError, match=r"missing: encoder\.layers\.1\.norms\.0\.bias"):
        source.load()


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("model = dict(a=1, b=[dict(c=-0.5), 'x'], d=None)", {"a": 1, "b": [{"c": -0.5}, "x"], "d": None}),
        ("model = {'a': (1, 2), 'b': {'c': True}}", {"a": [1, 2], "b": {"c": True}}),
        # Expressions that would have to be run are left out.
        ("model = dict(a=__import__('os').getcwd(), b=2, c=[1, f()], d=dict(e=x))", {"b": 2, "d": {}}),
        ("model = f()", {}),
        ("model = 7", {}),
        ("other = dict(a=1)", {}),
        ("model = dict(", {}),
        ("model = " + "(" * 5000, {}),
        ("model = " + "-" * 50_000 + "1", {}),
        ("model = dict(a=1" + "0" * 5000 + ")", {}),
        ("\0", {}),
        (7, {}),
        (None, {}),
        ("model = dict(a='" + "x" * 2**20 + "')", {}),
    ],
)
def test_texts_of_configs(text, settings):
    assert model_settings(text) == settings

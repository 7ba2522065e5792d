"""Published folders and files: there and back without a changed bit, and what strangers' descriptions could do wrong."""

import copy
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from mutations import accepted, changed_documents, examples, refused

import hpr_jax
from hpr_jax.config import from_plain, to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.models.build import abstract_detector
from hpr_jax.runtime.devices import data_mesh, on_devices_of
from hpr_jax.weights import convert, published_folder
from hpr_jax.weights.checkpoint import Meta
from hpr_jax.weights.checkpoint_writer import Checkpoints
from hpr_jax.weights.initial import load_initial_weights
from hpr_jax.weights.model_card import detector_name, model_card
from hpr_jax.weights.official import IGNORED, to_official
from hpr_jax.weights.official_names import dotted_path
from hpr_jax.weights.published import description, parse, read_meta_of
from hpr_jax.weights.published_folder import read_published_folder, write_published_file, write_published_folder
from hpr_jax.weights.safetensors_file import read_safetensors, write_safetensors
from hpr_jax.weights.source import open_source

CLASSES = Classes(("cup", "pen", "hat"), (2, "five", 9))
SWIN = {
    "kind": "swin",
    "embed_channels": 8,
    "depths": (2, 2),
    "heads": (2, 2),
    "window": 4,
    "drop_path": 0.1,
    "first_map": 0,
    "frozen_stages": -1,
}


def config(kind):
    """A tiny config: a detector's, or that of DDQ with what official models lack, or with Swin, whose code has buffers."""
    made = tiny.config(Path("data"), kind if kind not in ("foreign", "swin") else "ddq")
    if kind == "foreign":
        made.model.refiner.update(primary="dynamic_conv", auxiliaries=("global_attention", "point"))
    if kind == "swin":
        made.model.backbone = SWIN
    return made


@functools.cache
def made(kind):
    """A detector with weights, and what is known of it."""
    detector = abstract_detector(config(kind).model, tiny.CLASSES)
    tiny.fill(detector)
    return detector, Meta(to_plain(config(kind)), CLASSES, 7, {"AP": 0.25, "AP50": -1.0, "AP75": float("nan")}, {"loss": 1})


def weights(detector):
    return {dotted_path(path): np.asarray(one.get_value()) for path, one in nnx.to_flat_state(nnx.state(detector))}


def assert_same(detector, expected):
    found, wanted = weights(detector), weights(expected)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes(), name


def publish(place, kind="ddq"):
    detector, meta = made(kind)
    if place.suffix:
        write_published_file(place, detector, meta)
    else:
        write_published_folder(place, detector, meta, "mine")
    return place


@pytest.mark.parametrize("place", ["folder", "file.safetensors"])
@pytest.mark.parametrize("kind", ["deformable_detr", "dino", "align_detr", "ddq", "swin", "foreign"])
def test_there_and_back(tmp_path, kind, place):
    detector, meta = made(kind)
    source = open_source(publish(tmp_path / place, kind))
    assert (source.path, source.classes, source.step) == (tmp_path / place, CLASSES, 7)
    assert source.metrics == {"AP": 0.25, "AP50": -1.0}
    assert to_plain(source.config) == meta.config
    assert_same(source.load(), detector)
    begun = abstract_detector(config(kind).model, tiny.CLASSES)
    tiny.fill(begun)
    nnx.update(begun, nnx.map_state(lambda path, variable: variable.replace(variable.get_value() * 0), nnx.state(begun)))
    load_initial_weights(begun, tmp_path / place)
    assert_same(begun, detector)


@pytest.mark.parametrize("kind", ["swin", "foreign"])
def test_names(tmp_path, kind):
    detector, _ = made(kind)
    tensors, texts = read_safetensors(publish(tmp_path / "folder", kind) / "model.safetensors")
    assert texts["hpr_jax_version"] == "1"
    assert "hpr_jax_description" not in texts
    if kind == "foreign":
        assert (texts["hpr_jax_names"], texts["format"]) == ("own", "flax")
        assert tensors.keys() == weights(detector).keys()
        return
    assert (texts["hpr_jax_names"], texts["format"]) == ("official", "pt")
    assert {name for name in tensors if not IGNORED.search(name)} == to_official(detector).keys()
    # Strict loading in the official code asks for Swin's buffers.
    assert tensors["backbone.stages.1.blocks.1.attn.w_msa.relative_position_index"].shape == (16, 16)


def test_the_folder(tmp_path):
    folder = publish(tmp_path / "a/mine")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert list(folder.parent.iterdir()) == [folder]
    content = json.loads((folder / "config.json").read_text())
    assert content == {
        "model_type": "hpr_jax",
        "format_version": 1,
        "config": to_plain(config("ddq")),
        "class_names": ["cup", "pen", "hat"],
        "category_ids": [2, "five", 9],
        "step": 7,
        "metrics": {"AP": 0.25, "AP50": -1.0},
    }
    detector, meta = made("ddq")
    parameters = sum(array.size for array in weights(detector).values())
    assert (folder / "README.md").read_text() == model_card(meta, "mine", parameters)


def test_files_of_others_are_left_alone(tmp_path):
    detector, meta = made("ddq")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/README.md").write_text("mine")
    (tmp_path / "w.safetensors").write_text("mine")
    with pytest.raises(UserError, match="folder exists and is not an empty folder"):
        write_published_folder(tmp_path / "folder", detector, meta, "x")
    with pytest.raises(UserError, match=r"w\.safetensors exists; choose another name"):
        write_published_file(tmp_path / "w.safetensors", detector, meta)
    assert (tmp_path / "folder/README.md").read_text() == (tmp_path / "w.safetensors").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert read_published_folder(publish(tmp_path / "empty")).meta.step == 7


def test_nothing_is_half_written(tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(published_folder, "model_card", fail)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_could_not_be_read_are_not_written(tmp_path):
    detector = abstract_detector(config("ddq").model, tiny.CLASSES)
    tiny.fill(detector)
    detector.encoder.level_embedding[...] = np.nan
    with pytest.raises(UserError, match=r"cannot be used: level_embed \(float32\) has values that are no finite numbers"):
        write_published_folder(tmp_path / "folder", detector, made("ddq")[1], "x")
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_is_no_json_is_not_written():
    meta = Meta({**made("ddq")[1].config, "mine": {"rate": float("inf")}}, CLASSES, 0, {})
    with pytest.raises(UserError, match="config of the detector cannot be written as JSON"):
        description(meta)


def test_overrides(tmp_path):
    source = open_source(publish(tmp_path / "folder"), [("evaluate.side", "32")])
    assert source.config.evaluate.side == 32
    with pytest.raises(UserError, match=r"another model: config\.model\.levels"):
        open_source(tmp_path / "folder", [("model.levels", "7")])


def change(**changes):
    return lambda content: {**content, **changes}


def without(key):
    return lambda content: {name: value for name, value in content.items() if name != key}


def setting(dotted, value):
    """A change of one setting; None takes it out."""

    def change(content):
        *sections, last = dotted.split(".")
        node = content["config"]
        for section in sections:
            node = node[section]
        node[last] = value
        if value is None:
            del node[last]
        return content

    return change


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (change(model_type="detr"), r"no detector that is known here: its model_type is 'detr'"),
        (without("model_type"), r"no detector that is known here: its model_type is None"),
        (change(format_version=2), r"version 2 of its format, and this hpr_jax reads 1; install a newer one"),
        (change(format_version=True), r"version True of its format"),
        (change(class_names="cup"), "class_names is no list of names"),
        (change(class_names=[]), "class_names is no list of names"),
        (change(category_ids=[1, 2]), "category_ids needs one id for each of the 3 class_names"),
        (change(category_ids=[1, 2, 2]), "category_ids needs one id for each"),
        (change(category_ids=[1, 2, None]), "category_ids is no list of whole numbers or texts"),
        (change(step=-1), "step is -1"),
        (without("metrics"), "metrics has values that are no numbers"),
        (change(config=7), "is of no detector of this version: a setting or a section is missing or of another kind"),
        (without("config"), "is of no detector of this version: 'config' is missing"),
        (setting("model.levels", None), "is of no detector of this version: 'levels' is missing"),
        (setting("train", None), "is of no detector of this version: 'train' is missing"),
        (setting("model.levels", "four"), r"config\.model\.levels is four; it must be a whole number"),
        (setting("model.channels", 10**7), r"config\.model\.channels is 10000000; it must be at least 1 and at most"),
        (setting("model.refiner.auxiliaries", ["evil"]), r"has the refiner 'evil', which is none of this package's"),
    ],
)
def test_descriptions_that_cannot_be(tmp_path, changed, sentence):
    path = publish(tmp_path / "folder") / "config.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=sentence):
        open_source(tmp_path / "folder")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"config\.json is damaged or no JSON"),
        (b"[" * 100_000, "is damaged or no JSON"),
        (b"[]", r"holds \[\] in place of a JSON object"),
        (b'{"step": NaN}', "is damaged or no JSON"),
        (b'{"step": 1e999}', "is damaged or no JSON"),
        (b"\xff\xfe\xff", "is damaged or no JSON"),
        (b" " * (2**24 + 1), "more than the 16777216 bytes"),
    ],
)
def test_config_files_that_are_none(tmp_path, content, sentence):
    path = publish(tmp_path / "folder") / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        open_source(tmp_path / "folder")


def test_missing_files(tmp_path):
    folder = publish(tmp_path / "folder")
    (folder / "README.md").unlink()
    assert open_source(folder).step == 7
    (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"has no file config\.json"):
        open_source(folder)
    (tmp_path / "config.json").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        open_source(folder)


@pytest.mark.parametrize("kind", ["ddq", "foreign"])
def test_weights_of_another_detector(tmp_path, kind):
    path = publish(tmp_path / "folder", kind) / "model.safetensors"
    tensors, texts = read_safetensors(path)
    name = next(iter(tensors))
    write_safetensors(path, {**tensors, f"{name}.more": tensors[name]}, texts)
    with pytest.raises(UserError, match=rf"do not fit the model in 1 places: not used: {name}\.more"):
        open_source(tmp_path / "folder").load()
    write_safetensors(path, {one: tensor for one, tensor in tensors.items() if one != name}, texts)
    with pytest.raises(UserError, match=f"missing: {name}"):
        open_source(tmp_path / "folder").load()
    write_safetensors(path, tensors, {"hpr_jax_names": "latin"})
    with pytest.raises(UserError, match="names of the kind 'latin'; known are official, own"):
        open_source(tmp_path / "folder").load()


def test_files_saved_again_by_pytorch(tmp_path):
    """Such files lose the texts; their names are the official ones."""
    path = publish(tmp_path / "folder") / "model.safetensors"
    write_safetensors(path, read_safetensors(path)[0], {"format": "pt"})
    assert_same(open_source(tmp_path / "folder").load(), made("ddq")[0])


def test_a_detector_too_large_for_its_file_is_not_made(tmp_path):
    path = publish(tmp_path / "folder") / "config.json"
    content = json.loads(path.read_text())
    content["config"]["model"]["backbone"]["blocks"] = [10**6] * 4
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"4000004 residual blocks and levels, and its file \d+ tensors"):
        open_source(tmp_path / "folder").load()


@examples(60, 2000)
@given(st.data())
def test_any_description(data):
    """Any description is read or gets a sentence, and what is read can be described again."""
    content = json.loads(description(made("ddq")[1]))
    changed = data.draw(changed_documents(content))
    try:
        meta = read_meta_of(parse(json.dumps(changed), "FOLDER"), Path("FOLDER"))
    except UserError as error:
        refused(error, "FOLDER") if "config." not in str(error) else refused(error)
    else:
        accepted()
        again = read_meta_of(parse(description(meta), "FOLDER"), Path("FOLDER"))
        assert from_plain(again.config) == from_plain(meta.config)


def test_the_model_card():
    _, meta = made("ddq")
    text = model_card(meta, "hf://me/mine", 12345)
    head, _, rest = text.removeprefix("---\n").partition("---\n")
    front = dict(line.split(": ") for line in head.splitlines() if ": " in line)
    assert front == {"license": "apache-2.0", "library_name": "hpr_jax", "pipeline_tag": "object-detection"}
    assert "tags:\n- object-detection\n" in head
    assert rest.startswith("\n# HPR-DDQ with ResNet-")
    assert "detector = hpr_jax.load('hf://me/mine')" in rest
    assert "`cup`, `pen`, `hat`" in rest
    assert "| AP | 0.2500 |" in rest
    assert "Measured by hpr_jax after 7 training steps" in rest
    assert "**published**; none of them is repeated here" in rest
    assert "| weights | 12,345 |" in rest


def test_the_model_card_of_unknown_things():
    meta = Meta(made("ddq")[1].config, Classes(("a`\n# b", *map(str, range(200))), tuple(range(201))), 0, {})
    text = model_card(meta, "mine", 1)
    assert "No metrics of these weights are known." in text
    assert "`a  # b`, `0`" in text
    assert "`98`, and 101 more, which `config.json` lists." in text


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("deformable_detr", "HPR-Deformable DETR with ResNet-"),
        ("dino", "HPR-DINO with ResNet-"),
        ("align_detr", "HPR-Align DETR with ResNet-"),
        ("swin", "HPR-DDQ with Swin, 8 channels"),
    ],
)
def test_names_of_detectors(kind, name):
    assert detector_name(made(kind)[1].config).startswith(name)
    plain = copy.deepcopy(made(kind)[1].config)
    plain["model"]["refiner"]["auxiliaries"] = []
    assert detector_name(plain).startswith(name.removeprefix("HPR-"))


def test_weights_on_the_host_go_to_the_devices(tmp_path):
    """Evaluation puts weights there, wherever they come from."""
    state = nnx.state(open_source(publish(tmp_path / "folder")).load())
    placed = on_devices_of(data_mesh(), state)
    assert all(isinstance(array, jax.Array) for array in jax.tree.leaves(placed))
    np.testing.assert_array_equal(placed.encoder.level_embedding, made("ddq")[0].encoder.level_embedding)


@pytest.mark.slow
def test_the_same_detections(tmp_path):
    Checkpoints(tmp_path / "run", keep=1).save_best(7, nnx.state(tiny.detector()), made("ddq")[1])
    convert.publish(tmp_path / "run", tmp_path / "folder")
    image = np.random.default_rng(0).integers(0, 255, (60, 64, 3)).astype(np.uint8)
    found = hpr_jax.load(tmp_path / "folder")(image, threshold=0)
    expected = hpr_jax.load(tmp_path / "run")(image, threshold=0)
    assert len(found) == len(expected) == 10
    assert found.boxes.tobytes() == expected.boxes.tobytes()
    assert found.scores.tobytes() == expected.scores.tobytes()
    assert found.category_ids == expected.category_ids
    assert set(found.names) <= set(CLASSES.names)

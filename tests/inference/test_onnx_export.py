"""Detectors as ONNX files, which ONNX Runtime runs: they detect what the detectors detect."""

import importlib.util
import json

import numpy as np
import pytest
from exports import CLASSES, LANDSCAPE, PORTRAIT, alike, detector, filled, follow_readme

import hpr_jax
from hpr_jax.inference.export import Wanted, write_exported
from hpr_jax.inference.export_format import ORIGINAL

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


@pytest.fixture(scope="module")
def made():
    return filled("deformable_detr")


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory):
    """A folder with an ONNX file for two images; tests must not change it."""
    folder = tmp_path_factory.mktemp("onnx") / "x"
    write_exported(folder, made, Wanted(("onnx",), batch=2, sizes=((64, 128), (128, 64))))
    return folder


def swin(config):
    config.model.backbone = {"kind": "swin", "embed_channels": 8, "depths": (2, 2), "heads": (1, 2), "window": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "plain", "change"), [("ddq", False, None), ("dino", True, swin), ("align_detr", False, None)]
)
def test_all_detectors(model, plain, change, tmp_path):
    made = filled(model, plain=plain, change=change)
    write_exported(tmp_path / "x", made, Wanted(("onnx",)))
    # The file is all that it takes.
    (tmp_path / "x/model-128x128.onnx").rename(tmp_path / "mine.onnx")
    loaded, whole = hpr_jax.load(tmp_path / "mine.onnx"), detector(made)
    for image in (LANDSCAPE, PORTRAIT):
        alike(loaded(image, 0.0), whole(image, 0.0))


@pytest.mark.slow
def test_a_folder(made, exported):
    loaded, whole = hpr_jax.load(exported), detector(made)
    assert loaded.classes == CLASSES
    found = loaded([LANDSCAPE, PORTRAIT, LANDSCAPE[:30]], 0.0)
    for image, one in zip((LANDSCAPE, PORTRAIT, LANDSCAPE[:30]), found, strict=True):
        alike(one, whole(image, 0.0))
    with pytest.raises(hpr_jax.UserError, match="returns detections alone"):
        loaded.outputs(PORTRAIT)


@pytest.mark.slow
def test_the_description(exported):
    content = json.loads((exported / "export.json").read_bytes())
    assert [(one["file"], one["platform"]) for one in content["programs"]] == [
        ("model-64x128.onnx", "onnx"),
        ("model-128x64.onnx", "onnx"),
    ]
    assert set(content["files"]) == {"README.md", "model-64x128.onnx", "model-128x64.onnx"}
    assert (content["weights"], content["made_with"]["onnx"]) == (None, onnx.__version__)
    model = onnx.load(exported / "model-64x128.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [one.name for one in model.graph.input] == ["images", "resized", "original"]
    carried = json.loads({one.key: one.value for one in model.metadata_props}["hpr_jax.export"])
    assert carried["class_names"] == ["cup", "pen", "hat"]


@pytest.mark.slow
def test_the_lines_of_the_readme(made, exported, tmp_path):
    import cv2

    found = follow_readme(exported, tmp_path, cv2.resize(LANDSCAPE, (64, 51), interpolation=cv2.INTER_LINEAR))
    expected = detector(made)(LANDSCAPE, 0.0)
    valid = found["valid"][0]
    np.testing.assert_allclose(found["scores"][0][valid], expected.scores, atol=1e-4)
    np.testing.assert_allclose(found["boxes"][0][valid], expected.boxes, atol=5e-3)


@pytest.mark.slow
def test_files_that_resize_beside_programs_for_jax(tmp_path):
    made = filled("deformable_detr", canvas=96)
    write_exported(tmp_path / "x", made, Wanted(("cpu", "onnx"), sizes=((48, 60),), images=ORIGINAL))
    alike(hpr_jax.load(tmp_path / "x/model-48x60.onnx")(LANDSCAPE, 0.0), hpr_jax.load(tmp_path / "x")(LANDSCAPE, 0.0))
    assert (tmp_path / "x/README.md").read_text().count("```python") == 2


class TestMistakes:
    def test_no_onnx_file(self, tmp_path):
        (tmp_path / "x.onnx").write_bytes(b"no model")
        with pytest.raises(hpr_jax.UserError, match=r"x\.onnx is no ONNX file that this ONNX Runtime reads"):
            hpr_jax.load(tmp_path / "x.onnx")
        with pytest.raises(hpr_jax.UserError, match=r"y\.onnx"):
            hpr_jax.load(tmp_path / "y.onnx")

    @pytest.mark.parametrize(
        ("metadata", "sentence"),
        [
            ({}, "was not written by `export` of hpr_jax"),
            ({"hpr_jax.export": "{"}, "damaged or no JSON"),
            ({"hpr_jax.export": '{"format": "hpr_jax.export", "format_version": 9}'}, "version 9, and this hpr_jax reads"),
            ({"hpr_jax.export": '{"format": "hpr_jax.export", "format_version": 1}'}, "a value is missing"),
        ],
    )
    def test_files_of_others(self, tmp_path, metadata, sentence):
        from hpr_jax.inference.onnx.model import onnx_model

        model = onnx_model(lambda _, x: {"y": x + 1}, {}, {"x": np.ones(3, np.float32)}, metadata=metadata)
        onnx.save(model, tmp_path / "x.onnx")
        with pytest.raises(hpr_jax.UserError, match=sentence):
            hpr_jax.load(tmp_path / "x.onnx")

    def test_any_number_of_images(self):
        with pytest.raises(hpr_jax.UserError, match="made for one number of images; give --batch N"):
            Wanted(("onnx",), batch=None)

    def test_missing_packages(self, made, tmp_path, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(hpr_jax.UserError, match=r'need the package onnx; install it with pip install "hpr_jax\[onnx\]"'):
            write_exported(tmp_path / "x", made, Wanted(("onnx",)))
        (tmp_path / "x.onnx").touch()
        with pytest.raises(hpr_jax.UserError, match="need the package onnxruntime"):
            hpr_jax.load(tmp_path / "x.onnx")

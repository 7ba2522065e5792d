"""Exported detectors: programs that know nothing of this project, and detect what the detectors detect."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from exports import CLASSES, LANDSCAPE, PORTRAIT, detector, follow_readme, same, source
from jax import export

import hpr_jax
from hpr_jax.inference.export import Wanted, default_sizes, export_program, write_exported
from hpr_jax.inference.export_format import ORIGINAL
from hpr_jax.inference.exported import ExportedDetector

pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with the weights beside the programs, of two sizes; tests must not change it."""
    folder = tmp_path_factory.mktemp("exported") / "beside"
    write_exported(folder, source(), Wanted(sizes=((128, 128), (56, 128))))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with the weights inside the program, for two images; tests must not change it."""
    folder = tmp_path_factory.mktemp("exported") / "inside"
    write_exported(folder, source(), Wanted(batch=2, weights_beside=False))
    return folder


@pytest.mark.parametrize("kind", ["exported", "pairs"])
def test_the_lines_of_the_readme(kind, request, tmp_path):
    import cv2

    folder = request.getfixturevalue(kind)
    found = follow_readme(folder, tmp_path, cv2.resize(LANDSCAPE, (64, 51), interpolation=cv2.INTER_LINEAR))
    expected = detector(source())(LANDSCAPE, 0.0)
    valid = found["valid"][0]
    for name in ("boxes", "scores", "labels"):
        if kind == "exported":
            np.testing.assert_array_equal(found[name][0][valid], getattr(expected, name))
        else:
            # Two images at once, and constants, are rounded otherwise.
            np.testing.assert_allclose(found[name][0][valid], getattr(expected, name), atol=1e-4)


def test_a_loaded_folder_is_an_image_detector(exported):
    loaded, whole = hpr_jax.load(exported), detector(source())
    assert isinstance(loaded, ExportedDetector)
    assert loaded.classes == CLASSES
    # Portraits of 64 x 51 fit the larger program alone, to whose size an ImageDetector pads, too.
    same(loaded(PORTRAIT, 0.0), whole(PORTRAIT, 0.0))
    # Its programs are for one image, also in lists, of which an ImageDetector makes batches.
    for found in loaded([PORTRAIT, PORTRAIT], 0.0):
        same(found, whole(PORTRAIT, 0.0))
    with pytest.raises(hpr_jax.UserError, match="returns detections alone"):
        loaded.outputs(PORTRAIT)
    with pytest.raises(hpr_jax.UserError, match="were chosen when it was exported"):
        hpr_jax.load(exported, overrides={"evaluate.side": 32})


def test_the_smallest_size_that_fits_is_chosen(exported):
    loaded = ExportedDetector(exported)

    def chosen(height, width):
        image = np.zeros((height, width, 3), np.uint8)
        program = loaded._choose(image, loaded._resized_size(image))
        return program.height, program.width

    assert chosen(48, 60) == chosen(10, 1000) == (56, 128)
    assert chosen(64, 64) == chosen(60, 48) == (128, 128)
    loaded._programs = [program for program in loaded._programs if program.height == 56]
    loaded.description = loaded.description.__class__(**{**vars(loaded.description), "side": 100, "max_side": 100})
    with pytest.raises(hpr_jax.UserError, match=r"60x48 pixels .* becomes 100x80 and fits no program .* --size 100x80"):
        chosen(60, 48)


def test_several_images_at_once(pairs):
    loaded, whole = hpr_jax.load(pairs), detector(source())
    images = [LANDSCAPE, PORTRAIT, LANDSCAPE[:30]]
    for image, found in zip(images, loaded(images, 0.0), strict=True):
        np.testing.assert_array_equal(found.image, image)
        expected = whole(image, 0.0)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)


def test_programs_that_resize(tmp_path):
    made = source()
    write_exported(tmp_path / "x", made, Wanted(sizes=((48, 60),), images=ORIGINAL))
    loaded = hpr_jax.load(tmp_path / "x")
    same(loaded(LANDSCAPE, 0.0), detector(made)(LANDSCAPE, 0.0))
    with pytest.raises(hpr_jax.UserError, match=r"60x48 pixels .* fits no program .* --image-size 60x48"):
        loaded(PORTRAIT)


def test_canvases_are_made_inside(tmp_path):
    made = source(canvas=96)
    write_exported(tmp_path / "x", made, Wanted())
    same(hpr_jax.load(tmp_path / "x")(LANDSCAPE, 0.0), detector(made)(LANDSCAPE, 0.0))
    with pytest.raises(hpr_jax.UserError, match="smaller than the canvas of 96x96"):
        write_exported(tmp_path / "y", made, Wanted(sizes=((64, 128),)))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "plain"), [("ddq", False), ("dino", True), ("align_detr", False)])
def test_programs_of_all_detectors(model, plain):
    """For any number of images: what has shapes that are symbols can be exported for one number, too."""
    made = source(model, plain=plain)
    module = made.build({"operations": "xla", "remat": ()})
    for platform in ("cpu", "tpu"):
        program = export_program(module, made.config, platform, (128, 128), Wanted(batch=None))
        assert program.platforms == (platform,)


@pytest.mark.slow
def test_the_bits_of_a_hybrid_detector(tmp_path):
    made = source("ddq", plain=False)
    write_exported(tmp_path / "x", made, Wanted())
    same(hpr_jax.load(tmp_path / "x")(LANDSCAPE, 0.0), detector(made)(LANDSCAPE, 0.0))


def test_any_number_of_images(tmp_path):
    made = source()
    write_exported(tmp_path / "x", made, Wanted(batch=None, weights_beside=False))
    found, expected = hpr_jax.load(tmp_path / "x")(LANDSCAPE, 0.0), detector(made)(LANDSCAPE, 0.0)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    program = export.deserialize(bytearray((tmp_path / "x/cpu-128x128.jax_export").read_bytes()))
    images, sizes = np.zeros((3, 128, 128, 3), np.uint8), np.full((3, 2), 64, np.int32)
    assert jax.jit(program.call)(images, sizes, sizes)["boxes"].shape == (3, 10, 4)


@pytest.mark.slow
def test_kernels_are_asked_for():
    made = source("ddq")
    codes = []
    for kernels in (False, True):
        module = made.build({"operations": "auto" if kernels else "xla", "remat": ()})
        wanted = Wanted(("cuda",), kernels=kernels)
        codes.append(export_program(module, made.config, "cuda", (128, 128), wanted).mlir_module())
    assert ["triton" in code for code in codes] == [False, True]
    assert "custom_call @" not in codes[0].replace("custom_call @mhlo.topk", "")


class TestMistakes:
    def changed(self, exported, tmp_path, change):
        """A copy of a folder whose description was changed, digests excepted."""
        shutil.copytree(exported, tmp_path / "x")
        content = json.loads((tmp_path / "x/export.json").read_bytes())
        change(content)
        (tmp_path / "x/export.json").write_text(json.dumps(content))
        return tmp_path / "x"

    @pytest.mark.parametrize("name", ["cpu-128x128.jax_export", "README.md"])
    def test_damage(self, exported, tmp_path, name):
        shutil.copytree(exported, tmp_path / "x")
        data = bytearray((tmp_path / "x" / name).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / "x" / name).write_bytes(data)
        with pytest.raises(hpr_jax.UserError, match=f"is damaged: {name} has changed"):
            hpr_jax.load(tmp_path / "x")
        (tmp_path / "x" / name).unlink()
        with pytest.raises(hpr_jax.UserError, match=f"is damaged: {name} is missing"):
            hpr_jax.load(tmp_path / "x")
        (tmp_path / "x/export.json").write_text("{")
        with pytest.raises(hpr_jax.UserError, match="damaged or no JSON"):
            hpr_jax.load(tmp_path / "x")

    def test_another_platform(self, exported, tmp_path):
        folder = self.changed(exported, tmp_path, lambda content: [p.update(platform="cuda") for p in content["programs"]])
        with pytest.raises(hpr_jax.UserError, match=r"exported for cuda, and this JAX runs on cpu; .* --platform cpu"):
            hpr_jax.load(folder)

    def test_a_newer_calling_convention(self, exported, tmp_path):
        folder = self.changed(
            exported, tmp_path, lambda content: [p.update(calling_convention=99) for p in content["programs"]]
        )
        with pytest.raises(hpr_jax.UserError, match=r"has version 99 of JAX's calling convention, .* install a newer JAX"):
            hpr_jax.load(folder)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda content: content.update(format_version=2), "version 2, and this hpr_jax reads"),
            (lambda content: content.pop("side"), "a value is missing"),
            (lambda content: content.update(files={"../x": {}}), "does not list its files"),
        ],
    )
    def test_strange_descriptions(self, exported, tmp_path, change, sentence):
        with pytest.raises(hpr_jax.UserError, match=sentence):
            hpr_jax.load(self.changed(exported, tmp_path, change))

    def test_nothing_is_written_over(self, exported):
        with pytest.raises(hpr_jax.UserError, match="exists and is not an empty folder"):
            write_exported(exported, source(), Wanted())

    def test_checkpoints_are_wanted_elsewhere(self, exported):
        from hpr_jax.weights.source import open_source

        with pytest.raises(hpr_jax.UserError, match="holds exported programs"):
            open_source(exported)


def test_the_description(exported):
    content = json.loads((exported / "export.json").read_bytes())
    assert content["class_names"] == ["cup", "pen", "hat"]
    assert content["category_ids"] == [2, 5, 9]
    assert (content["batch"], content["dtype"], content["weights"]) == (1, "float32", "model.safetensors")
    assert {(one["platform"], one["height"], one["width"]) for one in content["programs"]} == {
        ("cpu", 128, 128),
        ("cpu", 56, 128),
    }
    assert set(content["files"]) == {path.name for path in exported.iterdir()} - {"export.json"}
    assert content["normalisation"]["mean"] == list(tiny.config().model.pixel_mean)
    assert content["made_with"]["jax"] == jax.__version__
    assert "min(64 / min(h, w), 64 / max(h, w))" in content["resize"]


def test_default_sizes():
    assert default_sizes(source(side=800, max_side=1333).config) == ((896, 1408), (1408, 896))
    assert default_sizes(source().config) == ((128, 128),)
    assert default_sizes(source(canvas=1024).config) == ((1024, 1024),)

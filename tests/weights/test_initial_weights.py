"""Starting weights: whole detectors and backbones, from all kinds of files, for other classes; conversion both ways."""

import json

import numpy as np
import pytest
import reference
import tiny
from flax import nnx

from hpr_jax.config import to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.data.sources.coco import COCO_CLASSES
from hpr_jax.errors import UserError
from hpr_jax.models.build import build_detector
from hpr_jax.training import convert
from hpr_jax.training.checkpoints import Checkpoints
from hpr_jax.weights.checkpoint import Meta, load_detector
from hpr_jax.weights.initial import load_initial_weights
from hpr_jax.weights.official import IGNORED, to_official
from hpr_jax.weights.torch_file import find_tensors, read_checkpoint, write_checkpoint

OTHER = 5


def tensors():
    return dict(reference.arrays("ddq_state_dict"))


def official(detector):
    return {name: np.asarray(tensor) for name, tensor in to_official(detector).items()}


def filled(model, classes, value):
    """A detector whose every weight is `value`."""
    detector = nnx.eval_shape(lambda: build_detector(model, classes, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(detector))
    filling = [(path, v.replace(np.full(v.shape, value, np.float32))) for path, v in flat]
    nnx.update(detector, nnx.from_flat_state(filling))
    return detector


def reference_detector(classes=None):
    return filled(reference.model_config("ddq"), classes or reference.sizes()["num_classes"], 9.0)


def save(path, name):
    if name.endswith(".npz"):
        np.savez(path / name, **tensors())
    else:
        write_checkpoint(path / name, tensors(), {})
    return path / name


@pytest.mark.parametrize("name", ["w.npz", "w.pth"])
def test_whole_detectors(tmp_path, name):
    detector = reference_detector()
    load_initial_weights(detector, save(tmp_path, name))
    loaded = official(detector)
    for key, tensor in tensors().items():
        if not IGNORED.search(key):
            np.testing.assert_array_equal(loaded[key], tensor)


def test_backbones_alone(tmp_path):
    backbone = {name: t for name, t in tensors().items() if name.startswith("backbone.")}
    write_checkpoint(tmp_path / "b.pth", backbone, {})
    detector = reference_detector()
    load_initial_weights(detector, tmp_path / "b.pth")
    for name, tensor in official(detector).items():
        np.testing.assert_array_equal(tensor, backbone.get(name, np.full_like(tensor, 9.0)))


@pytest.mark.parametrize("content", [b"", b"no archive"])
@pytest.mark.parametrize("name", ["w.npz", "w.pth"])
def test_files_that_hold_no_weights(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        load_initial_weights(reference_detector(), tmp_path / name)
    with pytest.raises(UserError, match="do not exist"):
        load_initial_weights(reference_detector(), tmp_path / "nothing.npz")


def of_classes(name):
    return "cls_branches" in name or name == "dn_query_generator.label_embedding.weight"


@pytest.mark.parametrize("kind", ["w.pth", "checkpoint"])
def test_another_number_of_classes(tmp_path, caplog, kind):
    """Class layers and the label embedding start anew, everything else is loaded, the log says so."""
    if kind == "checkpoint":
        config = tiny.config()
        config.model = reference.model_config("ddq")
        names = tuple(map(str, range(reference.sizes()["num_classes"])))
        checkpoints = Checkpoints(tmp_path / "run", keep=1)
        meta = Meta(to_plain(config), Classes(names, tuple(range(len(names)))), 3, {})
        checkpoints.save_best(3, nnx.state(reference.detector("ddq")), meta)
        path = tmp_path / "run"
    else:
        path = save(tmp_path, kind)
    detector = reference_detector(OTHER)
    load_initial_weights(detector, path)
    given = tensors()
    for name, tensor in official(detector).items():
        np.testing.assert_array_equal(tensor, np.full_like(tensor, 9.0) if of_classes(name) else given[name], err_msg=name)
    assert "another number of classes" in caplog.text
    assert "cls_branches" in caplog.text or "classes.kernel" in caplog.text


def test_nothing_else_may_differ(tmp_path):
    config = reference.model_config("ddq")
    config["hidden"] += 1
    with pytest.raises(UserError, match=r"shape of encoder.layers.0.ffn.layers.0.0.weight"):
        load_initial_weights(filled(config, OTHER, 9.0), save(tmp_path, "w.pth"))


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A config file of the reference model."""
    path = tmp_path_factory.mktemp("config") / "small.py"
    model = reference.model_config("ddq")
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(tiny.ROOT / 'configs')!r})\nimport ddq\n"
        f"def get_config():\n    config = ddq.get_config('demo')\n    config.model = {model!r}\n    return config\n"
    )
    return path


class TestConversion:
    def test_there_and_back_is_bit_exact(self, tmp_path, config_file):
        names = tuple(f"thing {i}" for i in range(reference.sizes()["num_classes"]))
        source = tmp_path / "official.pth"
        write_checkpoint(source, tensors(), {"iter": 12, "dataset_meta": {"classes": list(names)}})
        convert.run(["--config", str(config_file), str(source), str(tmp_path / "run")])
        _, meta = load_detector(tmp_path / "run")
        assert meta.classes == Classes(names, tuple(range(1, len(names) + 1)))
        assert meta.step == 12
        convert.run(["--to-torch", str(tmp_path / "run"), str(tmp_path / "back.pth")])
        back = find_tensors(read_checkpoint(tmp_path / "back.pth"))
        wanted = {name: t for name, t in tensors().items() if not IGNORED.search(name)}
        assert set(back) == set(wanted)
        for name, tensor in wanted.items():
            assert back[name].dtype == tensor.dtype
            np.testing.assert_array_equal(back[name], tensor, err_msg=name)

    def test_classes_of_an_annotation_file(self, tmp_path, config_file):
        write_checkpoint(tmp_path / "w.pth", tensors(), {})
        count = reference.sizes()["num_classes"]
        categories = [{"id": 3 * i, "name": f"c{i}"} for i in reversed(range(count))]
        (tmp_path / "a.json").write_text(json.dumps({"categories": categories}))
        command = ["--config", str(config_file), "--annotations", str(tmp_path / "a.json")]
        convert.run([*command, str(tmp_path / "w.pth"), str(tmp_path / "run")])
        _, meta = load_detector(tmp_path / "run")
        # In the order of the file, as the official code numbers them.
        order = list(reversed(range(count)))
        assert meta.classes == Classes(tuple(f"c{i}" for i in order), tuple(3 * i for i in order))
        (tmp_path / "a.json").write_text(json.dumps({"categories": categories[1:]}))
        with pytest.raises(UserError, match=f"knows {count} classes"):
            convert.run([*command, str(tmp_path / "w.pth"), str(tmp_path / "other")])
        assert not (tmp_path / "other").exists()

    def test_coco_is_the_default_of_eighty_classes(self):
        assert convert.guess_classes({}, 80) == COCO_CLASSES
        assert COCO_CLASSES.category_ids[-1] == 90
        assert len(set(COCO_CLASSES.names)) == len(set(COCO_CLASSES.category_ids)) == 80
        assert dict(zip(COCO_CLASSES.names, COCO_CLASSES.category_ids))["stop sign"] == 13

    def test_wrong_models_leave_nothing_behind(self, tmp_path, config_file):
        wrong = tensors()
        wrong["query_map.extra"] = wrong.pop("query_map.weight")
        write_checkpoint(tmp_path / "w.pth", wrong, {})
        with pytest.raises(UserError, match=r"missing: query_map.weight; not used: query_map.extra"):
            convert.run(["--config", str(config_file), str(tmp_path / "w.pth"), str(tmp_path / "run")])
        assert not (tmp_path / "run").exists()

    def test_folders_in_use_are_left_alone(self, tmp_path, config_file):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "something").touch()
        with pytest.raises(UserError, match="not an empty folder"):
            convert.run(["--config", str(config_file), str(save(tmp_path, "w.pth")), str(tmp_path / "run")])

    @pytest.mark.parametrize(
        ("command", "sentence"),
        [
            (["a.pth", "run"], "Give --config"),
            (["--to-torch", "--config", "c.py", "run", "a.pth"], "leave out"),
            (["--to-torch", "nowhere", "a.pth"], "no checkpoint"),
            (["--config"], "expected one argument"),
        ],
    )
    def test_bad_commands_get_a_sentence(self, command, sentence):
        with pytest.raises(UserError, match=sentence):
            convert.run(command)

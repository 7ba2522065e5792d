"""Conversion of official PyTorch checkpoints to checkpoints of this project, and back."""

import json

import numpy as np
import pytest
import reference
import tiny

from hpr_jax import main as command_line
from hpr_jax.data.dataset import Classes
from hpr_jax.data.sources.coco import COCO_CLASSES
from hpr_jax.errors import UserError
from hpr_jax.weights.checkpoint import load_detector
from hpr_jax.weights.classes import guess_classes
from hpr_jax.weights.official import IGNORED
from hpr_jax.weights.torch_file import find_tensors, read_checkpoint, write_checkpoint


def official_tensors():
    """Weights of the reference model, by official name."""
    return dict(reference.arrays("ddq_state_dict"))


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


def test_there_and_back_is_bit_exact(tmp_path, config_file):
    names = tuple(f"thing {i}" for i in range(reference.sizes()["num_classes"]))
    source = tmp_path / "official.pth"
    write_checkpoint(source, official_tensors(), {"iter": 12, "dataset_meta": {"classes": list(names)}})
    command_line.run(["convert", "--config", str(config_file), str(source), str(tmp_path / "run")])
    _, meta = load_detector(tmp_path / "run")
    assert meta.classes == Classes(names, tuple(range(1, len(names) + 1)))
    assert meta.step == 12
    command_line.run(["convert", "--to-torch", str(tmp_path / "run"), str(tmp_path / "back.pth")])
    back = find_tensors(read_checkpoint(tmp_path / "back.pth"), "back.pth")
    wanted = {name: t for name, t in official_tensors().items() if not IGNORED.search(name)}
    assert set(back) == set(wanted)
    for name, tensor in wanted.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_classes_of_an_annotation_file(tmp_path, config_file):
    write_checkpoint(tmp_path / "w.pth", official_tensors(), {})
    count = reference.sizes()["num_classes"]
    categories = [{"id": 3 * i, "name": f"c{i}"} for i in reversed(range(count))]
    (tmp_path / "a.json").write_text(json.dumps({"categories": categories}))
    command = ["--config", str(config_file), "--annotations", str(tmp_path / "a.json")]
    command_line.run(["convert", *command, str(tmp_path / "w.pth"), str(tmp_path / "run")])
    _, meta = load_detector(tmp_path / "run")
    # In the order of the file, as the official code numbers them.
    order = list(reversed(range(count)))
    assert meta.classes == Classes(tuple(f"c{i}" for i in order), tuple(3 * i for i in order))
    (tmp_path / "a.json").write_text(json.dumps({"categories": categories[1:]}))
    with pytest.raises(UserError, match=f"knows {count} classes"):
        command_line.run(["convert", *command, str(tmp_path / "w.pth"), str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_coco_is_the_default_of_eighty_classes():
    assert guess_classes({}, 80) == COCO_CLASSES
    for key in ("classes", "CLASSES"):
        assert guess_classes({"dataset_meta": {key: ("cup", "pen")}}, 2).names == ("cup", "pen")
    assert COCO_CLASSES.category_ids[-1] == 90
    assert len(set(COCO_CLASSES.names)) == len(set(COCO_CLASSES.category_ids)) == 80
    assert dict(zip(COCO_CLASSES.names, COCO_CLASSES.category_ids))["stop sign"] == 13


def test_wrong_models_leave_nothing_behind(tmp_path, config_file):
    wrong = official_tensors()
    wrong["query_map.extra"] = wrong.pop("query_map.weight")
    write_checkpoint(tmp_path / "w.pth", wrong, {})
    with pytest.raises(UserError, match=r"missing: query_map.weight; not used: query_map.extra"):
        command_line.run(["convert", "--config", str(config_file), str(tmp_path / "w.pth"), str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_folders_in_use_are_left_alone(tmp_path, config_file):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").touch()
    write_checkpoint(tmp_path / "w.pth", official_tensors(), {})
    with pytest.raises(UserError, match="not an empty folder"):
        command_line.run(["convert", "--config", str(config_file), str(tmp_path / "w.pth"), str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["nowhere.pth", "run"], "no checkpoint in nowhere.pth"),
        (["--to-torch", "--config", "c.py", "run", "a.pth"], "leave out"),
        (["--to-torch", "nowhere", "a.pth"], "no checkpoint"),
        (["--config"], "expected one argument"),
    ],
)
def test_bad_commands_get_a_sentence(command, sentence):
    with pytest.raises(UserError, match=sentence):
        command_line.run(["convert", *command])

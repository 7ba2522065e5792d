"""Starting weights: complete detectors and backbones, from all kinds of files, also for another number of classes."""

import numpy as np
import pytest
import reference
import tiny
from flax import nnx

from hpr_jax.config import to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.models.build import build_detector
from hpr_jax.weights.checkpoint import Meta
from hpr_jax.weights.checkpoint_writer import Checkpoints
from hpr_jax.weights.initial import load_initial_weights
from hpr_jax.weights.official import IGNORED, to_official
from hpr_jax.weights.torch_file import write_checkpoint

# The reference model has another number of classes.
OTHER_NUM_CLASSES = 5


def official_tensors():
    """Weights of the reference model, by official name."""
    return dict(reference.arrays("ddq_state_dict"))


def as_official(detector):
    """Weights of a detector, by official name."""
    return {name: np.asarray(tensor) for name, tensor in to_official(detector).items()}


def filled(model, classes, value):
    """A detector whose every weight is `value`."""
    detector = nnx.eval_shape(lambda: build_detector(model, classes, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(detector))
    filling = [(path, v.replace(np.full(v.shape, value, np.float32))) for path, v in flat]
    nnx.update(detector, nnx.from_flat_state(filling))
    return detector


def filled_reference_detector(classes=None):
    """The reference model, whose every weight is 9."""
    return filled(reference.model_config("ddq"), classes or reference.sizes()["num_classes"], 9.0)


def save(path, name):
    """Writes the reference model's weights to a file of the kind that the name says."""
    if name.endswith(".npz"):
        np.savez(path / name, **official_tensors())
    else:
        write_checkpoint(path / name, official_tensors(), {})
    return path / name


@pytest.mark.parametrize("name", ["w.npz", "w.pth"])
def test_complete_detectors(tmp_path, name):
    detector = filled_reference_detector()
    load_initial_weights(detector, save(tmp_path, name))
    loaded = as_official(detector)
    for key, tensor in official_tensors().items():
        if not IGNORED.search(key):
            np.testing.assert_array_equal(loaded[key], tensor)


def test_backbones_alone(tmp_path):
    backbone = {name: t for name, t in official_tensors().items() if name.startswith("backbone.")}
    write_checkpoint(tmp_path / "b.pth", backbone, {})
    detector = filled_reference_detector()
    load_initial_weights(detector, tmp_path / "b.pth")
    for name, tensor in as_official(detector).items():
        np.testing.assert_array_equal(tensor, backbone.get(name, np.full_like(tensor, 9.0)))


@pytest.mark.parametrize("content", [b"", b"no archive"])
@pytest.mark.parametrize("name", ["w.npz", "w.pth"])
def test_files_that_hold_no_weights(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        load_initial_weights(filled_reference_detector(), tmp_path / name)
    with pytest.raises(UserError, match="do not exist"):
        load_initial_weights(filled_reference_detector(), tmp_path / "nothing.npz")


def depends_on_classes(official_name):
    return "cls_branches" in official_name or official_name == "dn_query_generator.label_embedding.weight"


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
    detector = filled_reference_detector(OTHER_NUM_CLASSES)
    load_initial_weights(detector, path)
    given = official_tensors()
    for name, tensor in as_official(detector).items():
        np.testing.assert_array_equal(
            tensor, np.full_like(tensor, 9.0) if depends_on_classes(name) else given[name], err_msg=name
        )
    assert "another number of classes" in caplog.text
    assert "cls_branches" in caplog.text or "classes.kernel" in caplog.text


def test_nothing_else_may_differ(tmp_path):
    config = reference.model_config("ddq")
    config["hidden"] += 1
    with pytest.raises(UserError, match=r"shape of encoder.layers.0.ffn.layers.0.0.weight"):
        load_initial_weights(filled(config, OTHER_NUM_CLASSES, 9.0), save(tmp_path, "w.pth"))

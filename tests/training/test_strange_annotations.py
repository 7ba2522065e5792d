"""Annotation files with any change are refused, or a step is trained on them, and both evaluators count the same."""

import functools
import json

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from mutations import accepted, changed_documents, damaged_bytes, evaluated_alike, examples, refused

from hpr_jax.data.build import load_training_data, make_plan, make_views
from hpr_jax.data.loading.batches import TrainLoader
from hpr_jax.data.suitability import check_evaluation_data, check_training_data
from hpr_jax.errors import UserError
from hpr_jax.losses.build import make_criterion
from hpr_jax.models.build import abstract_detector
from hpr_jax.runtime.devices import data_mesh, replicate
from hpr_jax.training.build import make_optimizer
from hpr_jax.training.loop import to_devices
from hpr_jax.training.state import TrainState
from hpr_jax.training.step import TrainStep

# One shape of batches, and room for some boxes, so that few programs are compiled.
BOXES = 6
ANNOTATIONS = "annotations/instances_train2017.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A COCO folder, whose training annotations each example writes anew."""
    return tiny.write_coco(tmp_path_factory.mktemp("strange") / "data")


@pytest.fixture(scope="module")
def clean(folder):
    return json.loads((folder / ANNOTATIONS).read_text())


def config(directory):
    made = tiny.small(directory)
    made.augmentation.update(kind="lsj")
    made.augmentation.lsj.update(side=tiny.SIDE)
    return made


@functools.cache
def step(classes):
    """A training step of a detector of so many classes, and the state before it."""
    made = config(None)
    detector = abstract_detector(made.model, classes, made.compute)
    tiny.fill(detector)
    graph, params, frozen = nnx.split(detector, nnx.Param, ...)
    optimizer = make_optimizer(made)
    state = TrainState(np.int32(0), params, frozen, optimizer.init(params))
    return TrainStep(graph, make_criterion(made), optimizer, 0), jax.device_get(state)


def train_a_step(made, dataset):
    loader = TrainLoader(make_plan(made, dataset), make_views(made, dataset), BOXES)
    mesh = data_mesh()
    take, state = step(len(dataset.classes.names))
    _, numbers = take(replicate(mesh, state), to_devices(loader[0], mesh, {"reports": 0}), 1e-4)
    for name, number in jax.device_get(numbers).items():
        assert np.isfinite(number), name


@pytest.mark.slow
@examples(15, 10_000)
@given(st.data())
def test_any_change(folder, clean, data):
    content = json.dumps(data.draw(changed_documents(clean))).encode()
    # One in ten is damaged as a file, too.
    path = folder / ANNOTATIONS
    path.write_bytes(data.draw(damaged_bytes(content)) if data.draw(st.integers(0, 9)) == 0 else content)
    made = config(folder)
    # The other split has the same file: a run wants both to have the same classes.
    made.data.update(val_annotations=ANNOTATIONS, val_images="train2017")
    try:
        train_set, val_set = load_training_data(made)
        usable = train_set.subset(keep_empty=True, min_side=1)
        check_training_data(train_set, usable, 1, 1)
        check_evaluation_data(val_set, 1)
        train_a_step(made, usable)
    except UserError as error:
        refused(error)
    else:
        accepted()
        evaluated_alike(val_set)

"""Any text for any setting is taken or gets a sentence, and what is taken can be used."""

import functools

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from mutations import accepted, examples, refused

from hpr_jax.config import load_config
from hpr_jax.data.build import load_training_data, make_plan
from hpr_jax.errors import UserError
from hpr_jax.losses.build import make_criterion
from hpr_jax.models.build import Compute, abstract_detector
from hpr_jax.settings import SETTINGS, check, leaves
from hpr_jax.training.build import check_batch, in_steps, make_optimizer

RECIPES = ("ddq.py:r50_1x", "ddq.py:swin_l_1x", "align_detr.py:r50_1x")

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.integers(),
    st.floats(),
    st.floats(-2, 2),
    st.sampled_from([10**400, 2**31, 2**63, 1e-320, -0.0, 1e308, "1e999", "-inf", "nan", "0x10", "1_000", "1e3", "٣"]),
)
TEXTS = st.one_of(
    NUMBERS.map(str),
    st.lists(NUMBERS, max_size=5).map(lambda numbers: str(tuple(numbers))),
    st.lists(st.sampled_from(["deformable", "dynamic_conv", "point", "ffn", "backbone", "x"]), max_size=4).map(str),
    st.sampled_from(
        ["True", "false", "", "None", "()", "[]", "{}", "[[1]]", "(1,", "deformable", "lsj", "a.b", "\ud800", "\0"]
    ),
    st.text(st.characters(codec="utf-8"), max_size=6),
)


@functools.cache
def values(recipe: str) -> dict[str, object]:
    return dict(leaves(load_config(recipe)))


def near(key: str, value: object) -> st.SearchStrategy[str]:
    """Texts of values that somebody could try in place of a recipe's."""
    choices = SETTINGS[key].choices
    if isinstance(value, bool):
        return st.sampled_from(["True", "False"])
    if isinstance(value, int):
        return st.sampled_from([value - 1, value + 1, 2 * value, value // 2, 0, 1, 2, 3, 7]).map(str)
    if isinstance(value, float):
        return st.sampled_from([2 * value, value / 2, 0.0, 1.0, 0.5, 2, value + 1]).map(str)
    if isinstance(value, tuple):
        items = st.sampled_from([*value, *choices]) if value or choices else st.integers(0, 3)
        return st.lists(items, max_size=5).map(lambda chosen: str(tuple(chosen)))
    return st.sampled_from([*choices, str(value)])


@st.composite
def overrides(draw):
    """One to three settings of a recipe with other values: half of them could be tried by somebody, half are any text."""
    recipe = draw(st.sampled_from(RECIPES))
    chosen = draw(st.lists(st.sampled_from(sorted(values(recipe))), min_size=1, max_size=3))
    changes = [(key, draw(near(key, values(recipe)[key]) if draw(st.booleans()) else TEXTS)) for key in chosen]
    if draw(st.integers(0, 19)) == 0:
        changes.append((draw(st.text(st.characters(codec="utf-8"), max_size=8)), draw(TEXTS)))
    return recipe, changes


@examples(300, 2000)
@given(overrides())
def test_any_text_for_any_setting(made):
    recipe, changes = made
    try:
        check(load_config(recipe, changes))
    except UserError as error:
        refused(error)
    else:
        accepted()


@pytest.fixture(scope="module")
def data(coco):
    return load_training_data(tiny.config(coco))[0]


@pytest.mark.slow
@examples(40, 2000)
@given(made=overrides())
def test_what_is_taken_can_be_used(data, made):
    """Detector, losses, optimizer, and the plan of batches can be made, or a sentence says why not."""
    recipe, changes = made
    try:
        # The data set is small.
        config = load_config(recipe, [("train.batch_size", "2"), *changes])
        check(config)
        Compute(**config.compute)
        make_criterion(config)
        check_batch(config, 1)
        abstract_detector(config.model, 3, compute=config.compute)
        used = data.subset(keep_empty=config.data.keep_empty, min_side=min(config.data.min_side, 40))
        plan = make_plan(config, used)
        make_optimizer(in_steps(config, plan.steps_per_epoch))
    except UserError as error:
        refused(error)
    else:
        accepted()

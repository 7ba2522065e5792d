"""A refiner of another program: registered, named by settings, checked, and missed by a sentence where it is unknown."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

import hpr_jax
from hpr_jax import settings
from hpr_jax.config import load_config, to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.models import build
from hpr_jax.models.build import abstract_detector
from hpr_jax.models.refiner.layer import RefinerLayer
from hpr_jax.settings import check
from hpr_jax.weights.checkpoint import Meta

MISSING = (
    "The detector has the refiner 'nudge', which is none of this package's; import the file that registers it with "
    "hpr_jax.register_refiner first, or give it as --config."
)


class Nudge(nnx.Module):
    """Adds a learned vector to each query; of Flax's own layers, with a setting of its own."""

    needs_regions = False

    def __init__(self, shared: hpr_jax.SharedSettings, *, scale: float = 2.0, rngs: nnx.Rngs):
        self.layer = nnx.Linear(shared.channels, shared.channels, rngs=rngs)
        self.scale = scale

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: hpr_jax.Surroundings) -> jax.Array:
        return query + self.scale * self.layer(position)


class Short(Nudge):
    """Returns half of the queries' channels."""

    def __call__(self, query, position, surroundings):
        return query[..., ::2]


@pytest.fixture
def registered():
    """What registers refiners, which are forgotten behind the test."""
    yield hpr_jax.register_refiner
    for name in set(build.INTERACTIONS) - build._OWN_REFINERS:
        del build.INTERACTIONS[name]
        settings.REFINERS.remove(name)


def model(*overrides):
    """The section `model` of the smallest config, with `nudge` beside the primary refiner."""
    config = tiny.small().model
    config.refiner.update(auxiliaries=("nudge",), **dict(overrides))
    return config


def test_settings_name_it_from_then_on(registered):
    overrides = [("model.refiner.auxiliaries", "nudge")]
    with pytest.raises(UserError, match=r"names 'nudge'; known are .*; if it is one of your own, import the file that"):
        check(load_config("ddq:demo", overrides))
    assert registered("nudge")(Nudge) is Nudge
    check(load_config("ddq:demo", overrides))
    (path,) = abstract_detector(model(("nudge", {"scale": 3.0})), tiny.CLASSES).refiner.layers.auxiliaries
    assert (type(path.interaction), path.interaction.scale) == (Nudge, 3.0)


def test_a_cell_may_run_again(registered):
    registered("nudge")(Nudge)
    registered("nudge")(Short)
    assert build.INTERACTIONS["nudge"] is Short
    assert settings.REFINERS.count("nudge") == 1


@pytest.mark.parametrize("name", ["deformable", "region_fc", "point", "layers", "merge", "region"])
def test_taken_names_are_refused(name):
    with pytest.raises(UserError, match=f"The name '{name}' has a meaning in config.model.refiner already"):
        hpr_jax.register_refiner(name)


@pytest.mark.parametrize("name", ["", "My refiner", "a.b", "2nd", "a/b"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UserError, match=re.escape(f"cannot have the name {name!r}; take small letters")):
        hpr_jax.register_refiner(name)


def test_what_is_no_interaction_is_refused(registered):
    class Silent(nnx.Module):
        """Does not say whether it needs regions."""

    with pytest.raises(UserError, match="'nudge' must say by a class attribute, needs_regions = True or False"):
        registered("nudge")(Silent)
    with pytest.raises(UserError, match=r"'nudge' must be a subclass of flax\.nnx\.Module"):
        registered("nudge")(lambda shared, rngs: None)
    assert "nudge" not in settings.REFINERS


def refined(dtype=jnp.float32):
    """The abstract queries behind a layer with `nudge` as its primary refiner."""
    shared = hpr_jax.SharedSettings(channels=16, heads=2, levels=4, points=2, region_size=3)

    def run(query):
        make = functools.partial(build.INTERACTIONS["nudge"], shared)
        how = {"merge": "fixed", "merge_initial": (), "merge_points": ()}
        layer = RefinerLayer(lambda rngs: make(rngs=rngs), (), 16, 2, 24, **how, rngs=nnx.Rngs(0))
        return layer(query, query, None, None)[0]

    return jax.eval_shape(run, jax.ShapeDtypeStruct((1, 8, 16), dtype))


def test_another_shape_than_the_queries_is_refused(registered):
    registered("nudge")(Short)
    with pytest.raises(UserError, match=r"The interaction Short returns \[1, 8, 8\] for queries \[1, 8, 16\]\."):
        refined()


def test_layers_of_flax_do_in_bfloat16(registered):
    """They return float32, and the queries stay in bfloat16."""
    registered("nudge")(Nudge)
    assert refined(jnp.bfloat16).dtype == jnp.bfloat16


def test_a_checkpoint_of_it_is_refused_where_it_is_unknown(registered):
    config = to_plain(tiny.small())
    config["model"] = to_plain(model())
    content = Meta(config, Classes(("cup",), (1,)), 3, {}).to_json()
    with pytest.raises(UserError) as error:
        Meta.from_json(content)
    assert str(error.value) == MISSING
    registered("nudge")(Nudge)
    assert Meta.from_json(content).config["model"]["refiner"]["auxiliaries"] == ["nudge"]


@pytest.mark.slow
def test_a_run_of_it_loads_where_it_is_registered(registered, coco, tmp_path):
    registered("nudge")(Nudge)
    config = tiny.small(coco)
    config.model = model()
    config.train.update(steps=1, checkpoint_every=1, evaluate_every=1)
    run = hpr_jax.train(config, workdir=tmp_path / "run")
    (path,) = hpr_jax.load(run.workdir).module.refiner.layers.auxiliaries
    assert isinstance(path.interaction, Nudge)
    assert any(name.endswith("/nudge") for name in run.history.names("merge/"))

    del build.INTERACTIONS["nudge"]
    settings.REFINERS.remove("nudge")
    with pytest.raises(UserError, match=re.escape(MISSING)):
        hpr_jax.load(run.workdir)

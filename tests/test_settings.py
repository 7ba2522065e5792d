"""The table of settings knows every setting of every config, refuses values that no run can use, and explains itself."""

import functools
import math
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from hpr_jax import main as command_line
from hpr_jax.config import PACKAGED, load_config, load_module, to_plain
from hpr_jax.errors import UserError
from hpr_jax.settings import SETTINGS, Setting, check, leaves

FILES = sorted(path for path in PACKAGED.glob("*.py") if path.stem != "common")


@functools.cache
def variants() -> dict[str, ConfigDict]:
    """The config of every variant of every packaged file; tests must not change them."""
    specs = [f"{path}:{variant}" for path in FILES for variant in load_module(path).VARIANTS]
    return {spec: load_config(spec) for spec in specs}


def recipe(key: str = "train.steps") -> ConfigDict:
    """A copy of the first of three recipes that has a value at a dotted key; each setting is in one of them."""
    for variant in ("ddq.py:r50_1x", "ddq.py:swin_l_1x", "align_detr.py:r50_1x"):
        config = variants()[f"{PACKAGED}/{variant}"]
        if key in dict(leaves(config)):
            return config.copy_and_resolve_references()
    raise KeyError(key)


def changed(key: str, value: object) -> ConfigDict:
    """A recipe with another value at a dotted key."""
    config = recipe(key)
    *sections, last = key.split(".")
    section = config
    for name in sections:
        section = section[name]
    with section.ignore_type():
        section[last] = value
    return config


def refusal(config) -> str:
    """The sentence with which a config is refused."""
    with pytest.raises(UserError) as error:
        check(config)
    return str(error.value)


class TestTable:
    def test_it_has_the_settings_of_all_packaged_configs_and_no_others(self):
        assert len(variants()) > 50
        found = {key for config in variants().values() for key, _ in leaves(config)}
        assert found == set(SETTINGS)

    def test_all_packaged_configs_pass(self):
        for config in variants().values():
            check(config)

    def test_every_meaning_is_a_sentence(self):
        for key, setting in SETTINGS.items():
            assert setting.meaning.endswith("."), key
            assert setting.meaning[0].isupper() or setting.choices, key

    def test_no_number_may_be_infinite(self):
        """Wherever a config has a number, NaN and the infinities are refused by the name of the setting."""
        tried = set()
        for key, setting in SETTINGS.items():
            old = dict(leaves(recipe(key)))[key]
            if isinstance(old, str | bool) or setting.choices:
                continue
            for number in (math.nan, math.inf, -math.inf):
                value = (number,) * max(len(old), 1) if isinstance(old, tuple) else number
                assert refusal(changed(key, value)).startswith(f"config.{key} is "), key
            tried.add(key)
        assert {"train.batch_size", "optimizer.gamma", "model.pixel_mean", "loss.aligned.repeats"} <= tried


OF_OTHER_TYPES: dict[type, tuple] = {
    float: ("high", None),
    int: (1.5, "high", None),
    bool: (2, "true", None),
    str: (1, None, True),
}


class TestTypes:
    """Configs of one's own may have values of any type."""

    @pytest.mark.parametrize("key", SETTINGS)
    def test_values_of_another_type_are_refused_by_name(self, key):
        setting, old = SETTINGS[key], dict(leaves(recipe(key)))[key]
        assert setting.many == isinstance(old, tuple)
        for wrong in OF_OTHER_TYPES[setting.kind]:
            rest = old[1:] if setting.many else ()
            values = [(wrong, *rest), wrong] if setting.many else [wrong, (old,)]
            for value in values:
                assert refusal(changed(key, value)).startswith(f"config.{key} is {str(value)[:20]}"), key

    @pytest.mark.parametrize(
        ("key", "value", "sentence"),
        [
            ("train.batch_size", 2.5, "config.train.batch_size is 2.5; it must be a whole number or auto."),
            (
                "loss.aligned.repeats",
                (1.5, 2),
                "config.loss.aligned.repeats is (1.5, 2); it must be a list of whole numbers.",
            ),
            ("model.pixel_mean", 3.0, "config.model.pixel_mean is 3.0; it must be a list of numbers."),
            ("model.neck.bias", 1, "config.model.neck.bias is 1; it must be True or False."),
            ("compute.remat", "encoder", "config.compute.remat is encoder; it must be a list of names."),
            ("data.directory", None, "config.data.directory is None; it must be a text."),
            ("optimizer.gamma", "0.1", "config.optimizer.gamma is 0.1; it must be a number."),
        ],
    )
    def test_each_kind(self, key, value, sentence):
        assert refusal(changed(key, value)) == sentence

    def test_truths_are_no_numbers(self):
        assert not Setting("", int).is_of_type(True)
        assert not Setting("").is_of_type(False)

    def test_numbers_of_numpy_are_numbers(self):
        check(changed("train.batch_size", np.int64(4)))
        check(changed("optimizer.learning_rate", np.float32(1e-3)))
        check(changed("optimizer.learning_rate", 1))


class TestBounds:
    @pytest.mark.parametrize(
        ("setting", "allowed", "refused", "words"),
        [
            (Setting(""), (-1e300, 0, 10**300), (math.nan, math.inf, 10**400), ""),
            (Setting("", at_least=1), (1, 1.5), (0.999, -1, math.nan, math.inf, 10**400), "at least 1"),
            (Setting("", above=0), (1e-9, 3), (0, 0.0, -1e-9), "above 0"),
            (Setting("", at_most=4), (4, -7), (4.001, 5, -math.inf, -(10**400)), "at most 4"),
            (Setting("", below=2**31), (2**31 - 1, -7), (2**31,), "below 2147483648"),
            (Setting("", above=0, at_most=1), (0.1, 1), (0, 1.1), "above 0 and at most 1"),
            (Setting("", at_least=0, below=1), (0, 0.99), (-0.1, 1), "at least 0 and below 1"),
        ],
    )
    def test_each_kind(self, setting, allowed, refused, words):
        assert all(setting.allows(number) for number in allowed)
        assert not any(setting.allows(number) for number in refused)
        assert setting.bounds() == words

    @pytest.mark.parametrize(
        ("key", "value", "sentence"),
        [
            ("train.batch_size", 0, "config.train.batch_size is 0; it must be at least 1 and at most 1000000, or auto."),
            ("optimizer.clip_norm", 0.0, "config.optimizer.clip_norm is 0.0; it must be above 0."),
            (
                "model.backbone.frozen_stages",
                5,
                "config.model.backbone.frozen_stages is 5; it must be at least -1 and at most 4.",
            ),
            ("train.ema_decay", 1.0, "config.train.ema_decay is 1.0; it must be at least 0 and below 1."),
            ("train.seed", 2**31, "config.train.seed is 2147483648; it must be at least 0 and below 2147483648."),
            ("optimizer.gamma", 1.5, "config.optimizer.gamma is 1.5; it must be above 0 and at most 1."),
            ("augmentation.flip", math.nan, "config.augmentation.flip is nan; it must be at least 0 and at most 1."),
            ("loss.aligned.tau", math.inf, "config.loss.aligned.tau is inf; it must be above 0."),
            (
                "model.encoder.position_offset",
                -math.inf,
                "config.model.encoder.position_offset is -inf; it must be a finite number.",
            ),
            ("train.steps", 10**400, f"config.train.steps is 1{'0' * 39}...; it must be at least 0 and at most 1000000000."),
            ("model.pixel_mean", (1.0, 10**400, 1.0), "each must be a finite number."),
            (
                "augmentation.sides",
                (480, 0),
                "config.augmentation.sides is (480, 0); each must be at least 1 and at most 1000000.",
            ),
            (
                "optimizer.milestones",
                (5, math.nan),
                "config.optimizer.milestones is (5, nan); it must be a list of whole numbers.",
            ),
        ],
    )
    def test_a_refused_number_gets_one_sentence(self, key, value, sentence):
        found = refusal(changed(key, value))
        assert found.endswith(sentence)
        assert len(found) < 200

    def test_the_bounds_themselves_pass(self):
        for key, value in (("train.batch_size", 1), ("optimizer.gamma", 1.0), ("train.seed", 2**31 - 1)):
            check(changed(key, value))


class TestLists:
    @pytest.mark.parametrize("value", [(), (384,), (384, 500, 600)])
    def test_wrong_lengths(self, value):
        expected = f"config.augmentation.crop_range is {value}; it must list 2 values."
        assert refusal(changed("augmentation.crop_range", value)) == expected

    def test_what_must_not_be_empty(self):
        expected = "config.augmentation.sides is (); it must list one value at least."
        assert refusal(changed("augmentation.sides", ())) == expected

    @pytest.mark.parametrize("key", ["optimizer.milestones", "model.refiner.auxiliaries", "compute.remat"])
    def test_what_may_be_empty(self, key):
        check(changed(key, ()))


class TestWords:
    @pytest.mark.parametrize(
        ("key", "value", "sentence"),
        [
            ("evaluate.evaluator", "hotcoc", "config.evaluate.evaluator names 'hotcoc'; did you mean 'hotcoco'?"),
            ("compute.remat", ("encoder", "bakbone"), "config.compute.remat names 'bakbone'; did you mean 'backbone'?"),
            (
                "model.refiner.primary",
                "deformabel",
                "config.model.refiner.primary names 'deformabel'; did you mean 'deformable'?",
            ),
            ("compute.dtype", "half", "config.compute.dtype names 'half'; known are bfloat16, float32."),
            ("augmentation.kind", "", "config.augmentation.kind names ''; known are detr, lsj."),
        ],
    )
    def test_an_unknown_word_gets_a_suggestion(self, key, value, sentence):
        assert refusal(changed(key, value)) == sentence


class TestConditions:
    def test_ranges_are_in_order(self):
        expected = "config.augmentation.crop_range is (600, 384); the smallest comes first."
        assert refusal(changed("augmentation.crop_range", (600, 384))) == expected

    @pytest.mark.parametrize("limits", [(1, 100, 10), (1, 1, 10)])
    def test_numbers_of_detections_rise(self, limits):
        expected = f"config.evaluate.max_detections is {limits}; each must be larger than the one before."
        assert refusal(changed("evaluate.max_detections", limits)) == expected
        expected = "config.augmentation.lsj.scale_range is (2.0, 0.1); the smallest comes first."
        assert refusal(changed("augmentation.lsj.scale_range", (2.0, 0.1))) == expected
        check(changed("augmentation.crop_range", (500, 500)))

    def test_a_canvas_holds_the_images(self):
        expected = "config.evaluate.canvas is 1332; it must be 0, or at least evaluate.max_side, 1333."
        assert refusal(changed("evaluate.canvas", 1332)) == expected
        check(changed("evaluate.canvas", 1333))

    @pytest.mark.parametrize(("steps", "epochs"), [(0, 0), (5, 2)])
    def test_the_length_is_in_steps_or_in_epochs(self, steps, epochs):
        config = recipe()
        config.train.update(steps=steps, epochs=epochs)
        expected = f"config.train.steps is {steps} and config.train.epochs is {epochs}; one of them must be at least 1"
        assert refusal(config).startswith(expected)


def help_config(capsys, *arguments: str) -> tuple[dict[str, str], dict[str, str]]:
    """Value and explanation of each setting, by its key, as `--help-config` lists them."""
    command_line.run([*arguments, "--help-config"])
    values: dict[str, str] = {}
    explanations: dict[str, str] = {}
    for entry in re.split(r"^--config\.", capsys.readouterr().out, flags=re.MULTILINE)[1:]:
        setting, _, explanation = entry.partition("\n")
        key, _, values[key] = setting.partition("=")
        explanations[key] = " ".join(explanation.split())
    return values, explanations

    @pytest.mark.parametrize(
        ("overrides", "sentence"),
        [
            ({"model.heads": "7"}, "config.model.heads is 7; config.model.channels, 64, do not divide into so many heads"),
            ({"model.refiner.regional_attention.heads": "3"}, "config.model.refiner.regional_attention.heads is 3; config"),
            ({"model.neck.groups": "7"}, "config.model.neck.groups is 7; config.model.channels, 64, do not divide"),
            ({"model.channels": "31"}, "config.model.channels is 31; it must be even"),
            (
                {"model.backbone.kind": "swin"},
                "config.model.backbone.kind is 'swin', which needs config.model.backbone.depths; choose",
            ),
            ({"model.levels": "1"}, "config.model.levels is 1; it must be at least 3"),
            (
                {"model.levels": "5"},
                "config.model.levels is 5; it must be at least 3, the maps of the backbone, and the number",
            ),
            ({"model.backbone.blocks": "(1,)"}, "a ResNet has two stages at least"),
            ({"model.backbone.blocks": "(1, 1)", "model.backbone.frozen_stages": "3"}, "there are 2 stages"),
            (
                {"model.refiner.primary": "global_attention", "model.refiner.global_attention.level": "4"},
                "config.model.refiner.global_attention.level is 4; choose one of the pyramid's levels, 0 to 3",
            ),
            ({"model.refiner.primary": "global_attention", "model.refiner.global_attention.heads": "3"}, "heads is 3"),
            ({"model.refiner.auxiliaries": "deformable"}, "names a refiner twice: deformable, deformable"),
            ({"model.refiner.merge_initial": "(1,)"}, "merge_initial has 1 weights for 3 refiners"),
            ({"model.refiner.merge": "fixed", "model.refiner.merge_xavier": "True"}, "merge_xavier=False"),
            ({"model.queries.kind": "top"}, "config.loss.dense goes with config.model.queries.kind 'distinct'"),
            ({"model.queries.count": "10000000"}, "at least 1 and at most 1000000"),
        ],
    )
    def test_between_settings_of_the_model(self, overrides, sentence):
        config = load_config("ddq:demo", overrides.items())
        with pytest.raises(UserError, match=re.escape(sentence)):
            check(config)

    def test_refiners_that_are_not_used_may_have_any_settings(self):
        overrides = {"model.refiner.global_attention.heads": "7", "model.refiner.global_attention.level": "9"}
        check(load_config("ddq:demo", overrides.items()))

    def test_as_many_numbers_of_repeats_as_layers(self):
        config = load_config("align_detr:demo", [("loss.aligned.repeats", "(1,)")])
        with pytest.raises(UserError, match=r"lists 1 layers, and config.model.refiner.layers is 2"):
            check(config)


class TestHelp:
    @pytest.mark.parametrize("spec", ["ddq:r50_1x", "align_detr:r50_1x", "ddq:swin_l_1x"])
    def test_every_setting_has_its_value_and_its_meaning(self, capsys, spec):
        file, _, variant = spec.partition(":")
        config = dict(leaves(variants()[f"{PACKAGED}/{file}.py:{variant}"]))
        values, explanations = help_config(capsys, "--config", spec)
        assert values == {key: repr(value) if value in ("", ()) else str(value) for key, value in config.items()}
        assert list(values) == [key for key in SETTINGS if key in config]
        for key, explanation in explanations.items():
            assert explanation.startswith(SETTINGS[key].meaning), key

    def test_bounds_and_choices_are_told(self, capsys):
        _, explanations = help_config(capsys)
        assert explanations["train.batch_size"].endswith(" It is at least 1 and at most 1000000, or auto.")
        assert explanations["train.seed"].endswith(" It is at least 0 and below 2147483648.")
        assert explanations["augmentation.sides"].endswith(" Each is at least 1 and at most 1000000.")
        assert explanations["compute.dtype"].endswith(" It is one of float32, bfloat16.")
        assert explanations["compute.remat"].endswith(" Each is one of backbone, encoder, refiner.")

    def test_it_is_of_the_config_and_the_overrides_of_the_command_line(self, capsys):
        values, _ = help_config(capsys)
        assert (values["model.queries.kind"], values["train.seed"]) == ("distinct", "0")
        values, _ = help_config(capsys, "evaluate", "--config", "dino:small", "--config.train.seed=7")
        assert (values["model.queries.kind"], values["train.seed"]) == ("top", "7")


OF_COMMON = """
from hpr_jax.configs import common


def get_config(variant="r50_1x"):
    config = common.base()
    common.set_variant(config, variant)
    config.mine = {"tricks": 3}
    return config
"""
BUILT = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({plain})
"""


class TestConfigsOfOnesOwn:
    @pytest.fixture(params=["of common", "built"])
    def path(self, request, tmp_path):
        """A config file that imports the packaged `common`, and one that imports nothing of this package."""
        path = tmp_path / "mine.py"
        built = BUILT.format(plain={**to_plain(recipe()), "mine": {"tricks": 3}})
        path.write_text(OF_COMMON if request.param == "of common" else built)
        return path

    def test_they_pass_with_settings_of_their_own(self, path, capsys):
        check(load_config(str(path)))
        values, explanations = help_config(capsys, "--config", str(path))
        assert (values["mine.tricks"], explanations["mine.tricks"]) == ("3", "")

    @pytest.mark.parametrize(
        ("override", "sentence"),
        [
            (("train.batch_size", "0"), "config.train.batch_size is 0; it must be at least 1 and at most 1000000, or auto."),
            (("train.seed", "1" + "0" * 400), "config.train.seed is 1000000000"),
            (("optimizer.learning_rate", "1e999"), "config.optimizer.learning_rate is inf; it must be at least 0."),
            (("augmentation.crop_range", "600,384"), "the smallest comes first."),
            (("evaluate.evaluator", "pycoco"), "did you mean 'pycocotools'?"),
        ],
    )
    def test_their_values_are_checked(self, path, override, sentence):
        assert sentence in refusal(load_config(str(path), [override]))
        with pytest.raises(UserError, match=re.escape(sentence)):
            command_line.run(["--config", str(path), f"--config.{override[0]}={override[1]}"])

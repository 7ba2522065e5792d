"""Config files, overrides of their settings, and plain configs."""

import math

import pytest
import tiny
from ml_collections import ConfigDict

from hpr_jax.config import differences, from_plain, load_config, override, to_plain
from hpr_jax.errors import UserError

DDQ = f"{tiny.ROOT}/configs/ddq.py"


@pytest.mark.parametrize("variant", ["r50_1x", "small", "demo"])
def test_variants_load_and_survive_json(variant):
    config = load_config(f"{DDQ}:{variant}")
    assert to_plain(from_plain(to_plain(config))) == to_plain(config)


def test_the_default_is_the_official_recipe():
    config = load_config(DDQ)
    assert to_plain(config) == to_plain(load_config(f"{DDQ}:r50_1x"))
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (2e-4, 0.05)
    assert (config.train.steps, config.optimizer.milestones) == (88_000, (80_000,))
    assert (config.optimizer.warmup_steps, config.optimizer.warmup_factor) == (2000, 1e-4)
    assert (config.train.batch_size, config.optimizer.clip_norm, config.optimizer.backbone_multiplier) == (16, 0.1, 0.1)
    assert (config.model.queries.count, config.model.queries.dense_ratio) == (300, 1.5)
    assert (config.augmentation.sides[0], config.augmentation.sides[-1], len(config.augmentation.sides)) == (
        480,
        800,
        11,
    )
    assert (config.evaluate.side, config.evaluate.max_side, config.evaluate.detections) == (800, 1333, 300)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.learning_rate", "1" + "0" * 400, math.inf),
        ("model.encoder.position_offset", "-1" + "0" * 400, -math.inf),
        ("optimizer.milestones", "(3, 5)", (3, 5)),
        ("optimizer.milestones", "7", (7,)),
        ("model.refiner.auxiliaries", "dynamic_conv", ("dynamic_conv",)),
        ("data.keep_empty", "true", True),
        ("data.directory", "123", "123"),
        ("train.steps", "10", 10),
    ],
)
def test_overrides_keep_types(key, text, value):
    config = load_config(DDQ)
    override(config, key, text)
    section, _, name = key.rpartition(".")
    found = config
    for part in section.split("."):
        found = found[part]
    assert found[name] == value
    assert type(found[name]) is type(value)


def test_overrides_keep_types_that_only_configs_of_ones_own_have():
    config = ConfigDict({"sides": [1, 2], "names": ["a"], "nothing": None})
    for key, text, value in (("sides", "(3, 5)", [3, 5]), ("names", "b, c", ["b", "c"]), ("nothing", "7", 7)):
        override(config, key, text)
        assert config[key] == value
    with pytest.raises(UserError, match=r"config\.sides wants a list of numbers"):
        override(config, "sides", "wide")


def test_a_number_of_a_config_of_ones_own_may_be_a_whole_one():
    config = ConfigDict({"optimizer": {"learning_rate": 1}})
    override(config, "optimizer.learning_rate", "0.5")
    assert config.optimizer.learning_rate == 0.5


@pytest.mark.parametrize(
    ("key", "text", "sentence"),
    [
        ("optimizer.learningrate", "1", "config.optimizer.learning_rate"),
        ("optimiser.learning_rate", "1", "did you mean config.optimizer.learning_rate"),
        ("trian.seed", "1", "did you mean config.train.seed"),
        ("train.learning_rate", "1", "did you mean config.optimizer.learning_rate"),
        ("batchsize", "1", "did you mean config.train.batch_size"),
        ("train.zzzz", "1", "known are train.accumulation_steps, "),
        ("train", "1", "is a section"),
        ("train.steps", "many", "wants a whole number"),
        ("train.steps", "1.5", "wants a whole number"),
        ("train.steps", "True", "wants a whole number"),
        ("optimizer.learning_rate", "fast", "wants a number"),
        ("data.keep_empty", "maybe", "True or False"),
        ("augmentation.sides", "wide", "a list of whole numbers, like"),
        ("augmentation.sides", "(480, 1.5)", "a list of whole numbers, like"),
        ("model.pixel_mean", "grey", "a list of numbers, like"),
        ("compute.remat", "(1, 2)", "a list of names, like"),
        ("optimizer.milestones", "None", "a list of whole numbers, like"),
    ],
)
def test_wrong_overrides(key, text, sentence):
    with pytest.raises(UserError, match=sentence):
        override(load_config(DDQ), key, text)


def test_wrong_files_and_variants(tmp_path):
    with pytest.raises(UserError, match="did you mean 'r50_1x'"):
        load_config(f"{DDQ}:r50_1")
    with pytest.raises(UserError, match=r"did you mean.*ddq\.py"):
        load_config(f"{tiny.ROOT}/configs/dqq.py")
    with pytest.raises(UserError, match=r"did you mean.*configs/ddq\.py"):
        load_config(f"{tiny.ROOT}/confgs/ddq.py")
    # Names of files are alike already by their endings.
    with pytest.raises(UserError, match=r"known are configs/ablations\.py, configs/align_detr\.py"):
        load_config("nothing.py")
    (tmp_path / "broken.py").write_text("def get_config(:")
    (tmp_path / "wrong.py").write_text("def get_config():\n    return {}['lr']")
    with pytest.raises(UserError, match=r"get_config of .*wrong\.py ends with KeyError: 'lr' \(wrong\.py, line 2\)\."):
        load_config(f"{tmp_path}/wrong.py")
    with pytest.raises(UserError, match="cannot be loaded: SyntaxError"):
        load_config(str(tmp_path / "broken.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="no function get_config"):
        load_config(str(tmp_path / "empty.py"))


def test_files_beside_a_config_file_are_its_own(tmp_path):
    """Config files of two folders each import a file of the same name."""
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "beside.py").write_text(f"NUMBER = {number}")
        text = "from beside import NUMBER\nfrom ml_collections import ConfigDict\n\ndef get_config():\n"
        (folder / "config.py").write_text(text + '    return ConfigDict({"number": NUMBER})')
    for number in (1, 2, 1):
        assert load_config(str(tmp_path / str(number) / "config.py")).number == number


def test_differences_name_keys():
    a = {"x": 1, "y": {"z": [1, 2], "same": 0}}
    assert differences(a, {"x": 1, "y": {"z": [1, 3], "same": 0}}) == ["y.z ([1, 2] and [1, 3])"]

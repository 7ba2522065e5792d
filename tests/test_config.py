"""Config files, overrides and the sentences that mistakes get."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from hpr_jax import main as command
from hpr_jax.config import differences, from_plain, load_config, override, to_plain
from hpr_jax.errors import UserError
from hpr_jax.settings import check

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


@pytest.mark.parametrize(
    ("key", "text", "sentence"),
    [
        ("optimizer.learningrate", "1", "config.optimizer.learning_rate"),
        ("optimiser.learning_rate", "1", "did you mean config.optimizer.learning_rate"),
        ("train", "1", "is a section"),
        ("train.steps", "many", "wants a whole number"),
        ("train.steps", "1.5", "wants a whole number"),
        ("optimizer.learning_rate", "fast", "wants a number"),
        ("data.keep_empty", "maybe", "True or False"),
        ("augmentation.sides", "wide", "a list of numbers"),
        ("optimizer.milestones", "None", "a list of numbers"),
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
    (tmp_path / "broken.py").write_text("def get_config(:")
    with pytest.raises(UserError, match="cannot be loaded: SyntaxError"):
        load_config(str(tmp_path / "broken.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="no function get_config"):
        load_config(str(tmp_path / "empty.py"))


@pytest.mark.parametrize(
    ("key", "text", "sentence"),
    [
        ("train.batch_size", "0", "config.train.batch_size is 0; it must be at least 1"),
        ("augmentation.crop_range", "()", "must list 2 values"),
        ("evaluate.evaluator", "hotcoc", "did you mean 'hotcoco'"),
    ],
)
def test_values_that_no_run_can_use(key, text, sentence):
    config = load_config(DDQ)
    check(config)
    override(config, key, text)
    with pytest.raises(UserError, match=sentence):
        check(config)


def test_differences_name_keys():
    a = {"x": 1, "y": {"z": [1, 2], "same": 0}}
    assert differences(a, {"x": 1, "y": {"z": [1, 3], "same": 0}}) == ["y.z ([1, 2] and [1, 3])"]


def answer(monkeypatch, capsys, *arguments):
    """Exit code and standard error of a command line."""
    monkeypatch.setattr(sys, "argv", ["hpr_jax", *map(str, arguments)])
    code = command.main()
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "--config"),
        (("trian", "--config", DDQ), "did you mean 'train'"),
        (("--mode", "evaluate", "--workdir", "w"), "write `python -m hpr_jax.main evaluate"),
        (("--workdir", "w", "--mode=predict", "x.jpg"), "write `python -m hpr_jax.main predict"),
        (("--config", DDQ, "extra"), "takes no inputs, and got extra"),
        (("describe", "--config", DDQ, "--accept-changes"), "There is no option --accept-changes"),
        (("make-shapes", "w", "--config.train.seed=1"), "has no settings"),
        (("make-shapes", "w", "--train", "0"), "--train is 0; it must be at least 1"),
        (("--config", DDQ, "--workdri", "w"), "did you mean '--workdir'"),
        (("--config", f"{DDQ}:smal", "--workdir", "w"), "did you mean 'small'"),
        (("--config", DDQ, "--workdir", "w", "--config.train.stepz=1"), "did you mean config.train.steps"),
        (("--config", DDQ, "--workdir", "w", "--config.train.steps"), "has no value"),
        (
            ("--config", DDQ, "--workdir", "w", "--config.data.directory=nowhere"),
            "data set nowhere (config.data.directory)",
        ),
        (("evaluate", "--workdir", "nowhere"), "no checkpoint in nowhere"),
        (("predict", "--workdir", "nowhere", "x.jpg"), "no image or folder x.jpg"),
        (("predict", "--workdir", "nowhere"), "needs images"),
        (("predict", "--workdir", "w", "--threshold", "high", "x.jpg"), "invalid float value"),
        (("predict", "a.jpg", "--workdir", "w", "b.jpg"), "no image or folder a.jpg"),
    ],
)
def test_mistakes_get_one_sentence_and_code_2(monkeypatch, capsys, tmp_path, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    code, error = answer(monkeypatch, capsys, *arguments)
    assert code == 2
    assert sentence in error
    assert error.startswith("hpr_jax: ")
    assert "Traceback" not in error
    assert error.count("\n") == 1


class TestArguments:
    """What each command does its work with."""

    @pytest.fixture
    def called(self, monkeypatch):
        """Arguments of the work that the command line asks for."""
        calls = []
        for name in (
            "training.run.train",
            "evaluation.evaluate.evaluate",
            "inference.predict.predict",
            "analysis.describe.describe",
        ):
            monkeypatch.setattr(f"hpr_jax.{name}", lambda *args, **others: calls.append((*args, others)))

        def call(*arguments):
            calls.clear()
            command.run(list(map(str, arguments)))
            (found,) = calls
            return found

        return call

    def test_training(self, called, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data/coco").mkdir(parents=True)
        training = ("--config", DDQ, "--workdir", "w", "--config.train.initial_weights=random")
        config, workdir, others = called(*training, "--config.train.seed=5", "--accept-changes")
        assert (config.train.seed, workdir, others) == (5, Path("w"), {"accept_changes": True})
        *_, others = called(*training)
        assert others == {"accept_changes": False}

    def test_evaluation(self, called):
        overrides = [("evaluate.side", "32")]
        for arguments, expected in (
            (("--workdir", "w"), (Path("w"), Path("w/evaluation"), overrides, None)),
            (("--workdir", "w", "--output", "o"), (Path("w"), Path("o"), overrides, None)),
            (("--workdir", "w", "--checkpoint", "c"), (Path("c"), Path("w/evaluation"), overrides, None)),
            (("--checkpoint", "c", "--output", "o"), (Path("c"), Path("o"), overrides, None)),
        ):
            assert called("evaluate", "--config.evaluate.side=32", *arguments) == (*expected, {})

    def test_prediction(self, called, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a.jpg").write_bytes(b"")
        (tmp_path / "b").mkdir()
        (tmp_path / "b/c.jpg").write_bytes(b"")
        found = called("predict", "--workdir", "w", "a.jpg", "b")
        assert found == (Path("w"), [Path("a.jpg"), Path("b")], Path("w/predictions"), 0.3, [], None, {})
        found = called("predict", "--workdir", "w", "--checkpoint", "c", "--output", "o", "--threshold", "0.7", "a.jpg")
        assert found == (Path("c"), [Path("a.jpg")], Path("o"), 0.7, [], None, {})

    def test_description(self, called):
        config, classes, checkpoint, overrides, _ = called("describe", "--config", DDQ, "--classes", "7")
        assert (config.train.batch_size, classes, checkpoint, overrides) == (16, 7, None, [])
        assert called("describe", "--workdir", "w") == (None, 80, Path("w"), [], {})
        assert called("describe", "--checkpoint", "c", "--workdir", "w") == (None, 80, Path("c"), [], {})


def test_as_a_program(tmp_path):
    command_line = [sys.executable, "-m", "hpr_jax.main", "evalute", "--workdir", tmp_path]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "hpr_jax: There is no command 'evalute'; did you mean 'evaluate'?\n"

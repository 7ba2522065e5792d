"""The command line up to the work itself: which command is meant, what it is given, and the answers to mistakes."""

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from hpr_jax import main as command_line
from hpr_jax.analysis.describe import Subject
from hpr_jax.commands.arguments import CommandParser, split_overrides
from hpr_jax.commands.train import MEND
from hpr_jax.config import load_config, to_plain
from hpr_jax.errors import UserError
from hpr_jax.inference.tiles import Tiling
from hpr_jax.main import COMMANDS
from hpr_jax.weights.pretrained import initial_weights

DDQ = f"{tiny.ROOT}/configs/ddq.py"
RESNET, SWIN = "resnet50-0676ba61.pth", "swin_large_patch4_window12_384_22k.pth"

# Commands send the log to the console.
pytestmark = pytest.mark.usefixtures("restored_log")


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """An empty folder as the current one; torch's hub cache is below it."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    return folder


@pytest.fixture
def called(monkeypatch):
    """Calls a command line with functions that do nothing in place of the work; returns what they are called with."""
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
        command_line.run(list(map(str, arguments)))
        (found,) = calls
        return found

    return call


def answer(monkeypatch, capsys, *arguments):
    """Exit code and standard error of a command line."""
    monkeypatch.setattr(sys, "argv", ["hpr_jax", *map(str, arguments)])
    code = command_line.main()
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "--config"),
        (("trian", "--config", DDQ), "did you mean 'train'"),
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
        (("--config", DDQ, "--data", "nowhere"), "data set nowhere (config.data.directory)"),
        (
            ("--config", DDQ, "--data", "here", "--config.data.directory", "there"),
            "--data is here and --config.data.directory is there; give one of the two.",
        ),
        (
            ("check-data", "--config", DDQ, "--config.data.directory=there", "--data=here"),
            "--data is here and --config.data.directory is there; give one of the two.",
        ),
        (
            ("evaluate", "--workdir", "w", "--data", "here", "--config.data.directory=there"),
            "--data is here and --config.data.directory is there; give one of the two.",
        ),
        (("--config", DDQ, "--data="), "--data names no folder; write --data DIR."),
        (("describe", "--config", DDQ, "--data", "here"), "There is no option --data"),
        (("evaluate", "--workdir", "nowhere"), "no checkpoint in nowhere"),
        (("predict", "--workdir", "nowhere", "x.jpg"), "no image, video or folder x.jpg"),
        (("predict", "--workdir", "nowhere"), "needs images"),
        (("predict", "--workdir", "w", "--threshold", "high", "x.jpg"), "invalid float value"),
        (("predict", "a.jpg", "--workdir", "w", "b.jpg"), "no image, video or folder a.jpg"),
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


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (("--mode", "evaluate", "--workdir", "w"), "evaluate"),
        (("--workdir", "w", "--mode=predict", "x.jpg"), "predict"),
        (("--config", DDQ, "--mode", "check_data"), "check-data"),
        (("--mode=zzz",), "COMMAND"),
        (("train", "--mode"), "COMMAND"),
    ],
)
def test_a_mode_is_answered_with_its_command(monkeypatch, capsys, arguments, command):
    code, error = answer(monkeypatch, capsys, *arguments)
    assert code == 2
    assert error == (
        f"hpr_jax: There is no --mode; write `python -m hpr_jax.main {command} ...` (commands: {', '.join(COMMANDS)}).\n"
    )


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "hpr_jax.main", "evalute", "--workdir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "hpr_jax: There is no command 'evalute'; did you mean 'evaluate'?\n"


@pytest.mark.parametrize(
    ("variable", "text", "sentence"),
    [
        ("JAX_PLATFORMS", "abacus", "JAX has no device to compute on of the kind that JAX_PLATFORMS=abacus asks for: "),
        ("JAX_ENABLE_X64", "maybe", "JAX cannot be used with this environment: invalid truth value 'maybe'"),
    ],
)
def test_an_environment_that_jax_cannot_use(variable, text, sentence):
    command = [sys.executable, "-m", "hpr_jax.main", "describe", "--config", f"{DDQ}:demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, variable: text})
    assert done.returncode == 2
    assert done.stderr.startswith(f"hpr_jax: {sentence}")
    assert done.stderr.count("\n") == 1


class TestHelp:
    def test_the_overview_lists_every_command(self, capsys):
        for word in ("--help", "-h", "help"):
            assert command_line.run([word]) is None
            printed = capsys.readouterr().out
            for name in COMMANDS:
                assert re.search(rf"^  {name} +[A-Z].*\.$", printed, re.MULTILINE), name

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_command_has_an_example_that_it_understands(self, monkeypatch, capsys, name):
        monkeypatch.setattr(sys, "argv", ["hpr_jax", name, "--help"])
        with pytest.raises(SystemExit) as left:
            command_line.main()
        assert left.value.code == 0
        printed = capsys.readouterr().out
        examples = [line.strip() for line in printed.splitlines() if line.startswith(f"  python -m hpr_jax.main {name} ")]
        assert re.search("^examples?:$", printed, re.MULTILINE)
        assert examples
        command = importlib.import_module(f"hpr_jax.commands.{name.replace('-', '_')}")
        parser = CommandParser()
        command.add_arguments(parser)
        for example in examples:
            rest, overrides = split_overrides(shlex.split(example)[4:])
            arguments, unknown = parser.parse_known_intermixed_args(rest)
            assert not unknown
            if getattr(arguments, "config", None):
                load_config(arguments.config, overrides)


class TestArguments:
    """What each command does its work with."""

    def test_training(self, called, elsewhere):
        (elsewhere / "data/coco").mkdir(parents=True)
        training = ("--config", DDQ, "--workdir", "w", "--config.train.initial_weights=random")
        config, workdir, others = called(*training, "--config.train.seed=5", "--accept-changes")
        assert (config.train.seed, workdir, others) == (
            5,
            Path("w"),
            {"accept_changes": True, "take_over": False},
        )
        *_, others = called(*training, "--take-over")
        assert others == {"accept_changes": False, "take_over": True}

    def test_evaluation(self, called):
        overrides = [("evaluate.side", "32")]
        for arguments, expected in (
            (("--workdir", "w"), (Path("w"), Path("w/evaluation"), overrides, None)),
            (("--workdir", "w", "--output", "o"), (Path("w"), Path("o"), overrides, None)),
            (("--workdir", "w", "--checkpoint", "c"), (Path("c"), Path("w/evaluation"), overrides, None)),
            (("--checkpoint", "c", "--output", "o"), (Path("c"), Path("o"), overrides, None)),
        ):
            assert called("evaluate", "--config.evaluate.side=32", *arguments) == (*expected, {})

    def test_prediction(self, called, elsewhere):
        (elsewhere / "a.jpg").write_bytes(b"")
        (elsewhere / "b").mkdir()
        (elsewhere / "b/c.jpg").write_bytes(b"")
        rest = {"batch": 1, "track": False, "every": 1}
        found = called("predict", "--workdir", "w", "a.jpg", "b")
        assert found == (
            Path("w"),
            [Path("a.jpg"), Path("b")],
            Path("w/predictions"),
            0.3,
            [],
            None,
            {"recursive": False, "tiling": None, **rest},
        )
        *_, settings = called("predict", "--workdir", "w", "--tile", "64", "--overlap", "0.5", "--merge", "nms", "a.jpg")
        assert settings["tiling"] == Tiling(64, 0.5, "nms")
        found = called("predict", "--workdir", "w", "--checkpoint", "c", "--output", "o", "--threshold", "0.7", "a.jpg")
        assert found == (Path("c"), [Path("a.jpg")], Path("o"), 0.7, [], None, {"recursive": False, "tiling": None, **rest})

    def test_description(self, called):
        subject, _ = called("describe", "--config", DDQ, "--classes", "7")
        assert subject.config.train.batch_size == 16
        assert (subject.num_classes, subject.checkpoint, subject.overrides) == (7, None, [])
        assert called("describe", "--workdir", "w") == (Subject(None, 80, Path("w"), []), {})
        assert called("describe", "--checkpoint", "c", "--workdir", "w") == (Subject(None, 80, Path("c"), []), {})


class TestWhatIsTrained:
    """A run without a workdir of its own; its data are in the current folder."""

    @pytest.fixture(autouse=True)
    def data(self, elsewhere):
        (elsewhere / "data/coco").mkdir(parents=True)
        (elsewhere / "mine.py").write_text(
            inspect.cleandoc(f"""
            from hpr_jax.config import load_config

            def get_config():
                return load_config({DDQ!r})
        """)
        )

    @pytest.mark.parametrize("command", [(), ("train",)], ids=["by default", "by name"])
    @pytest.mark.parametrize(
        ("spec", "workdir"),
        [
            ("configs/ddq.py", "runs/ddq_r50_1x"),
            (DDQ, "runs/ddq_r50_1x"),
            ("ddq:small", "runs/ddq_small"),
            ("mine.py", "runs/mine"),
        ],
    )
    def test_a_run_is_named_after_its_config(self, called, capsys, command, spec, workdir):
        _, found, _ = called(*command, "--config", spec, "--config.train.initial_weights=random")
        assert found == Path(workdir)
        assert capsys.readouterr().out == f"The run {spec} is in {workdir}.\n"

    @pytest.mark.parametrize(
        ("spec", "variant"),
        [("configs/ddq.py", "r50_1x"), ("ddq.py", "r50_1x"), ("ddq:small", "small"), ("configs/ddq.py:small", "small")],
    )
    def test_packaged_configs_are_found_from_any_folder(self, called, spec, variant):
        config, *_ = called("--config", spec, "--config.train.initial_weights=random")
        expected = load_config(f"{DDQ}:{variant}", [("train.initial_weights", "random")])
        assert to_plain(config) == to_plain(expected)

    def test_a_file_that_is_there_comes_first(self, called, elsewhere):
        (elsewhere / "configs").mkdir()
        (elsewhere / "mine.py").rename(elsewhere / "configs/dino.py")
        config, workdir, _ = called("--config", "configs/dino.py", "--config.train.initial_weights=random")
        assert (config.model.queries.kind, workdir) == ("distinct", Path("runs/dino"))


def without_jax(*arguments: str) -> subprocess.CompletedProcess:
    """A command line in a process that cannot import JAX."""
    code = "import sys; sys.modules['jax'] = None; from hpr_jax.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=tiny.process_environment(), capture_output=True, text=True, check=False)


class TestWhatTrainingNeeds:
    def test_missing_data_and_weights_are_told_before_jax_is_imported(self, elsewhere):
        done = without_jax("--config", "configs/ddq.py")
        assert (done.returncode, done.stdout) == (2, "")
        missing = (
            "the data set data/coco (config.data.directory) does not exist, and this backbone wants pre-trained weights, "
            "and no ResNet-50 weights (resnet50*.pth, resnet50*.npz, resnet50*.safetensors, *soco*.pth) are in data/ or "
            f"{elsewhere}/torch/hub/checkpoints/"
        )
        assert done.stderr == f"hpr_jax: Training cannot begin: {missing}. {MEND}.\n"
        assert "make-shapes" in MEND
        assert list(elsewhere.iterdir()) == []

    def test_what_is_there_is_not_said_to_be_missing(self, monkeypatch, capsys, elsewhere):
        (elsewhere / "data/coco").mkdir(parents=True)
        for arguments, missing in (
            (("--config", "ddq"), "this backbone wants pre-trained weights, and no ResNet-50 weights"),
            (("--config", "ddq:swin_l_1x"), "this backbone wants pre-trained weights, and no Swin-L weights"),
            (("--config", "ddq:small", "--config.data.directory=nowhere"), "the data set nowhere (config.data.directory)"),
            (
                ("--config", "ddq", "--config.train.initial_weights=w.pth"),
                "the initial weights w.pth (config.train.initial_weights) do not exist.",
            ),
        ):
            code, error = answer(monkeypatch, capsys, *arguments)
            assert code == 2
            assert error.startswith(f"hpr_jax: Training cannot begin: {missing}")
            assert ("data set" in error.partition("`python")[0]) == ("data set" in missing)
            assert ("weights" in error.partition("`python")[0]) == ("weights" in missing)
            assert error.count("\n") == 1
        (elsewhere / "file").write_text("")
        code, error = answer(monkeypatch, capsys, "--config", "ddq:small", "--config.data.directory=file")
        assert (code, "the data set file (config.data.directory) is a file. " in error) == (2, True)

    def test_a_run_that_has_begun_needs_no_weights(self, called, elsewhere):
        (elsewhere / "data/coco").mkdir(parents=True)
        (elsewhere / "w/checkpoints/2").mkdir(parents=True)
        assert called("--config", "ddq", "--workdir", "w")[1] == Path("w")
        with pytest.raises(UserError, match="wants pre-trained weights"):
            called("--config", "ddq", "--workdir", "other")

    def test_a_run_that_was_killed_while_it_saved_for_the_first_time_needs_weights(self, called, elsewhere):
        (elsewhere / "data/coco").mkdir(parents=True)
        (elsewhere / "w/checkpoints/2.partial").mkdir(parents=True)
        with pytest.raises(UserError, match="wants pre-trained weights"):
            called("--config", "ddq", "--workdir", "w")


class TestPretrainedWeights:
    """Where the weights of a backbone are found."""

    def begun_with(self, called, spec, *arguments):
        """The weights that a run begins with; the command line lets it begin."""
        Path("data/coco").mkdir(parents=True, exist_ok=True)
        config, *_ = called("--config", spec, *arguments)
        return initial_weights(config)

    @pytest.mark.parametrize("folder", ["data", "torch/hub/checkpoints"])
    @pytest.mark.parametrize(
        ("spec", "name"),
        [("ddq", RESNET), ("ddq", "resnet50.npz"), ("ddq", "backbone_soco_400.pth"), ("ddq:swin_l_1x", SWIN)],
    )
    def test_are_in_data_and_in_the_cache_of_torch(self, called, elsewhere, folder, spec, name):
        file = elsewhere / folder / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
        found = self.begun_with(called, spec)
        assert found is not None
        assert found.resolve() == file

    def test_the_cache_may_be_that_of_the_user(self, called, elsewhere, monkeypatch):
        monkeypatch.delenv("TORCH_HOME")
        monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere / "cache"))
        file = elsewhere / "cache/torch/hub/checkpoints" / RESNET
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
        assert self.begun_with(called, "ddq") == file

    def test_those_in_data_come_first_and_those_of_another_backbone_never(self, called, elsewhere):
        for folder, name in (("data", SWIN), ("data", RESNET), ("torch/hub/checkpoints", RESNET)):
            (elsewhere / folder).mkdir(parents=True, exist_ok=True)
            (elsewhere / folder / name).write_bytes(b"")
        assert self.begun_with(called, "ddq") == Path("data", RESNET)
        (elsewhere / "data" / RESNET).unlink()
        assert self.begun_with(called, "ddq") == elsewhere / "torch/hub/checkpoints" / RESNET

    def test_random_and_other_files_may_be_asked_for(self, called, elsewhere, monkeypatch):
        for name in (RESNET, "mine.pth"):
            (elsewhere / "data").mkdir(exist_ok=True)
            (elsewhere / "data" / name).write_bytes(b"")
        assert self.begun_with(called, "ddq", "--config.train.initial_weights=random") is None
        assert self.begun_with(called, "ddq", "--config.train.initial_weights=data/mine.pth") == Path("data/mine.pth")
        (elsewhere / "home").mkdir()
        (elsewhere / "home/mine.pth").write_bytes(b"")
        monkeypatch.setenv("HOME", str(elsewhere / "home"))
        found = self.begun_with(called, "ddq", "--config.train.initial_weights=~/mine.pth")
        assert found == elsewhere / "home/mine.pth"
        # Trained from scratch, whatever files there are.
        assert self.begun_with(called, "ddq:small") is None

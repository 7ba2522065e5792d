"""The command that tells what a detector costs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from hpr_jax import main as command
from hpr_jax.analysis.speed import Speed
from hpr_jax.config import to_plain
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.models.build import abstract_detector
from hpr_jax.weights.checkpoint import Meta
from hpr_jax.weights.checkpoint_writer import Checkpoints


@pytest.mark.slow
def test_the_command_prints_everything_without_data(tmp_path, capsys, monkeypatch):
    def lowered(program):
        # Lowers only: compiling the training step takes half a minute, and would show no more.
        program.lower()
        return {"results": 0, "temporaries": 12_345_678}

    monkeypatch.setattr("hpr_jax.analysis.costs.compiled_memory", lowered)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    file = tiny.write_config(tmp_path / "config.py", Path("nowhere"))
    command.run(["describe", "--config", str(file), "--classes", str(tiny.CLASSES)])
    printed = capsys.readouterr().out
    detector = abstract_detector(tiny.config().model, tiny.CLASSES)
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(detector)))
    (row,) = (line for line in printed.splitlines() if line.startswith("total") and "MB" not in line)
    assert row.split()[1:3] == [f"{size:,}", f"{size:,}"]
    for sentence in (
        "  deformable (primary) ",
        "evaluation, height x width",
        "training, height x width",
        "8 + 8 + 12",
        "Memory of inference, 2 x 64x64, on cpu:",
        "Memory of one training step, 2 x 64x64, on cpu:",
        f"{4 * size / 1e6:,.1f} MB",
    ):
        assert sentence in printed
    assert printed.count("12.3 MB") == 2
    assert sorted(tmp_path.iterdir()) == sorted([*before, file])


@pytest.mark.slow
def test_other_augmentations_and_silent_backends(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hpr_jax.analysis.costs.compiled_memory", lambda *_: {})
    larger = "augmentation.update(kind='lsj', strong_views=True)"
    file = tiny.write_config(tmp_path / "config.py", tmp_path, larger, function="small")
    command.run(["describe", "--config", str(file)])
    printed = capsys.readouterr().out
    assert "does not tell the size of activations" in printed
    # A weak and a strong view of each of two images.
    assert "Memory of one training step, 4 x 1024x1024, on cpu:" in printed


@pytest.mark.slow
def test_a_checkpoint_has_its_own_classes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hpr_jax.analysis.costs.compiled_memory", lambda *_: {})
    config = tiny.small()
    state = nnx.state(abstract_detector(config.model, tiny.CLASSES))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    checkpoints = Checkpoints(tmp_path, 1)
    classes = Classes(("cup", "pen", "hat"), (2, 5, 9))
    checkpoints.save_best(1, state, Meta(to_plain(config), classes, 1, {}))
    arguments = ["describe", "--workdir", str(tmp_path), "--classes", "7", "--config.evaluate.side=32"]
    command.run([*arguments, "--config.evaluate.max_side=32"])
    printed = capsys.readouterr().out
    size = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert f" {size:,} " in printed
    assert "Memory of inference, 2 x 32x32, on cpu:" in printed
    with pytest.raises(UserError, match="of another model"):
        command.run([*arguments, "--config.model.hidden=8"])


def test_measuring_prints_a_table_of_markdown(tmp_path, capsys, monkeypatch):
    def measured(detector, image):
        assert image.shape == (480, 640, 3)
        return Speed("a device", image.shape[:2], 0.0125, detector.config.evaluate.batch_size, 80.0)

    monkeypatch.setattr("hpr_jax.analysis.measure.measure_speed", measured)
    # The weights are not read.
    monkeypatch.setattr("hpr_jax.analysis.measure.random_detector", abstract_detector)
    file = tiny.write_config(tmp_path / "config.py", Path("nowhere"))
    command.run(["describe", "--config", str(file), "--measure", "--config.compute.dtype=bfloat16"])
    head, rule, row = (line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    assert head.count("|") == rule.count("|") == row.count("|")
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[1:7] == ["a device", jax.__version__, "bfloat16", "12.5 ms", "2", "80.00"]
    assert cells[7].endswith(" GB")


def test_compiling_for_a_gpu_needs_its_compiler(tmp_path, monkeypatch):
    file = str(tiny.write_config(tmp_path / "config.py", tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    monkeypatch.setattr("hpr_jax.analysis.gpu_compiler.has_package", lambda name: name != "nvidia.cuda_nvcc")
    monkeypatch.setattr("hpr_jax.analysis.gpu_compiler.version", lambda _: "0.10.2")
    with pytest.raises(UserError, match="install the extra gpu-compiler"):
        command.run(["describe", "--config", file, "--compile-for", "h100"])
    monkeypatch.setattr("hpr_jax.analysis.gpu_compiler.has_package", lambda name: True)
    monkeypatch.setattr("hpr_jax.analysis.gpu_compiler.version", lambda _: "0.11.2")
    with pytest.raises(UserError, match=r"JAX 0\.11\.2 has no public way .* install JAX 0\.10"):
        command.run(["describe", "--config", file, "--compile-for", "h100"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "FILE", "--classes", "0"], "--classes is 0; it must be at least 1"),
        (["--config", "FILE", "--classes", "many"], "invalid int value"),
        (["--config", "FILE", "image.jpg"], "takes no inputs"),
        (["--config", "FILE", "--config.train.batch_size=0"], "config.train.batch_size is 0"),
        (["--config", "FILE", "--config.model.refiner.primary=none"], "config.model.refiner.primary names 'none'"),
        (["--config", "FILE", "--compile-for", "h100", "--images", "0"], "--images is 0; it must be at least 1"),
        (["--config", "FILE", "--compile-for", "h100", "--size", "800"], "'800' is no size"),
        (["--config", "FILE", "--compile-for", "b52"], "invalid choice: 'b52'"),
        (["--config", "FILE", "--compile-for", "h100", "--measure"], "not allowed with argument"),
        (["--config", "FILE", "--objects", "3"], r"--objects is for --compile-for h100\|a100"),
        (["--config", "FILE", "--measure", "--size", "64x64"], "--size is for --compile-for"),
        ([], "needs --config"),
        (["--workdir", "nowhere"], "no checkpoint in nowhere"),
    ],
)
def test_mistakes(tmp_path, arguments, sentence):
    file = str(tiny.write_config(tmp_path / "config.py", tmp_path))
    with pytest.raises(UserError, match=sentence):
        command.run(["describe", *(file if a == "FILE" else a for a in arguments)])

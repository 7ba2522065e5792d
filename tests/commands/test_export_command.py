"""The command that exports a detector."""

import json

import pytest
import tiny

from hpr_jax import main as command
from hpr_jax.errors import UserError


def test_what_is_written(tmp_path, capsys):
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")
    file, target = tiny.write_config(tmp_path / "config.py", tmp_path, function="small"), tmp_path / "out"
    command.run(["export", "--config", str(file), str(target), "--platform=tpu", "--size=64x96", "--weights=beside"])
    assert "It is loaded by hpr_jax.load" in capsys.readouterr().out
    assert sorted(path.name for path in target.iterdir()) == [
        "README.md",
        "export.json",
        "model.safetensors",
        "tpu-64x96.jax_export",
    ]
    assert len(json.loads((target / "export.json").read_bytes())["class_names"]) == 80


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "needs a checkpoint's --workdir or --checkpoint"),
        (["--config", "FILE", "--platform", "cpu,rocm"], "--platform names 'rocm'; known are cpu, cuda, tpu"),
        (["--config", "FILE", "--batch", "0"], "--batch is '0'; give a number from 1 to 1024, or any"),
        (["--config", "FILE", "--batch", "some"], "--batch is 'some'"),
        (["--config", "FILE", "--size", "800"], "'800' is no size; sizes are HEIGHTxWIDTH"),
        (["--config", "FILE", "--size", "8x800"], "'8x800' is no size"),
        (["--config", "FILE", "--size", "64x64", "--image-size", "64x64"], "not allowed with"),
        (["--config", "FILE", "--kernels"], "add --platform cuda"),
        (["--config", "FILE", "--platform=cuda", "--batch=any", "--kernels"], "give --batch N"),
        (["--config", "FILE", "--platform=onnx", "--batch=any"], "ONNX files are made for one number of images"),
        (["--config", "FILE", "--config.model.nothing=1"], "nothing"),
        (["--workdir", "nowhere"], "no checkpoint in nowhere"),
    ],
)
def test_mistakes(tmp_path, arguments, sentence):
    file = str(tiny.write_config(tmp_path / "config.py", tmp_path, function="small"))
    with pytest.raises(UserError, match=sentence):
        command.run(["export", str(tmp_path / "out"), *(file if word == "FILE" else word for word in arguments)])
    assert not (tmp_path / "out").exists()

"""What all commands share: overrides of settings, and how a command ends."""

import pytest

from hpr_jax.commands.arguments import check_folder, path, run_command, split_overrides
from hpr_jax.errors import RunError, StoppedError, UserError


def test_overrides_with_and_without_an_equals_sign():
    arguments = [
        "--config",
        "x.py",
        "--config.train.seed=3",
        "image.jpg",
        "--config.a.b",
        "1,2",
        "--config.c=",
        "--config.d=e=f",
    ]
    rest, overrides = split_overrides(arguments)
    assert rest == ["--config", "x.py", "image.jpg"]
    assert overrides == [("train.seed", "3"), ("a.b", "1,2"), ("c", ""), ("d", "e=f")]
    with pytest.raises(UserError, match=r"--config\.train\.seed has no value"):
        split_overrides(["--config.train.seed"])


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "code", "sentence"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (raising(UserError("No such thing.")), 2, "hpr_jax: No such thing.\n"),
        (raising(RunError("The disk is full.")), 1, "hpr_jax: The disk is full.\n"),
        (raising(StoppedError("Stopped.", 75)), 75, "hpr_jax: Stopped.\n"),
        (raising(KeyboardInterrupt()), 130, "hpr_jax: stopped.\n"),
        (raising(PermissionError(13, "Permission denied", "x/y")), 2, "hpr_jax: x/y: Permission denied.\n"),
        (raising(OSError("it broke")), 2, "hpr_jax: A file: it broke.\n"),
    ],
)
def test_how_a_command_ends(run, code, sentence, capsys):
    assert run_command(run) == code
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", sentence)


def test_other_errors_are_mistakes_of_the_program():
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()))


def test_a_folder_for_output_may_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    check_folder(None, "workdir")
    check_folder(tmp_path / "new", "workdir")
    with pytest.raises(UserError, match=r"The workdir .*file is a file; give a folder"):
        check_folder(tmp_path / "file", "workdir")


def test_paths_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path("~/x") == tmp_path / "x"
    assert str(path("a/~b")) == "a/~b"


@pytest.mark.parametrize(("error", "leaves"), [(UserError("x"), [2]), (RunError("x"), [1]), (StoppedError("x", 75), [])])
def test_one_of_several_processes_does_not_wait_for_the_others(monkeypatch, error, leaves):
    """They wait for it. Those that stop have agreed to."""
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    run_command(raising(error), leave_at_once=True)
    assert codes == leaves
    run_command(raising(error))
    assert codes == leaves

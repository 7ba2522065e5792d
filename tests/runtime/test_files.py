"""Files and folders appear when they are complete."""

import pytest

from hpr_jax.runtime.files import whole_file, whole_folder, write_whole


def test_a_file_takes_the_place_of_an_earlier_one(tmp_path):
    path = tmp_path / "new" / ("x" * 250)
    for content in (b"first", b"second"):
        write_whole(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_earlier_one(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"earlier")

    def fail():
        with whole_file(path) as partial:
            partial.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_one_folder_are_written_at_the_same_time(tmp_path):
    with whole_file(tmp_path / "x") as first, whole_file(tmp_path / "y") as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"first", "y": b"second"}


def test_the_message_names_the_file_and_not_the_partial_one(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="Is a directory") as caught:
        write_whole(tmp_path / "x", b"")
    assert caught.value.filename == str(tmp_path / "x")


def test_a_folder_takes_the_place_of_an_empty_one(tmp_path):
    for path in (tmp_path / "new" / ("x" * 250), tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with whole_folder(path) as partial:
            (partial / "a").write_bytes(b"1")
            assert not path.exists() or not any(path.iterdir())
        assert (path / "a").read_bytes() == b"1"
        assert list(path.parent.glob(".*")) == []


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/mine").touch()

    def fill(path):
        with whole_folder(path) as partial:
            (partial / "a").touch()

    with pytest.raises(OSError, match="not empty") as caught:
        fill(tmp_path / "x")
    assert caught.value.filename == str(tmp_path / "x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "x"]

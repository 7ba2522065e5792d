"""Files appear when they are complete."""

import pytest

from hpr_jax.runtime.files import whole_file, write_whole


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


def test_the_message_names_the_file_and_not_the_partial_one(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="Is a directory") as caught:
        write_whole(tmp_path / "x", b"")
    assert caught.value.filename == str(tmp_path / "x")

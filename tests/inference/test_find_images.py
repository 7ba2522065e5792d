"""Which files predict takes for images."""

from pathlib import Path

import pytest

from hpr_jax.errors import UserError
from hpr_jax.inference.find_images import find_images


def test_images_of_a_folder_in_order(tmp_path):
    for name in ("b.JPG", "a.jpeg", "c.Png", "notes.txt", "d.webp", "e.tif"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "below").mkdir()
    (tmp_path / "below/f.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    assert [path.name for path in find_images([tmp_path])] == ["a.jpeg", "b.JPG", "c.Png", "d.webp", "e.tif"]
    assert [path.name for path in find_images([tmp_path], recursive=True)][2:] == ["f.jpg", "c.Png", "d.webp", "e.tif"]


def test_files_are_taken_whatever_their_names(tmp_path):
    (tmp_path / "picture").write_bytes(b"")
    assert find_images([tmp_path / "picture"]) == [tmp_path / "picture"]


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [([], "needs images"), (["nowhere"], "no image or folder nowhere"), (["."], r"The folder \. holds no images \(\.jpg, ")],
)
def test_nothing_to_take(tmp_path, monkeypatch, inputs, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        find_images([Path(path) for path in inputs])

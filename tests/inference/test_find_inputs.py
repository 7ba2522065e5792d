"""Which files predict takes for images and videos."""

from pathlib import Path

import pytest

from hpr_jax.errors import UserError
from hpr_jax.inference.find_inputs import find_inputs


def test_images_of_a_folder_in_order(tmp_path):
    for name in ("b.JPG", "a.jpeg", "c.Png", "notes.txt", "d.webp", "e.tif", "g.MOV"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "below").mkdir()
    (tmp_path / "below/f.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    rest = ["c.Png", "d.webp", "e.tif", "g.MOV"]
    assert [path.name for path in find_inputs([tmp_path])] == ["a.jpeg", "b.JPG", *rest]
    assert [path.name for path in find_inputs([tmp_path], recursive=True)] == ["a.jpeg", "b.JPG", "f.jpg", *rest]


def test_files_are_taken_whatever_their_names(tmp_path):
    (tmp_path / "picture").write_bytes(b"")
    assert find_inputs([tmp_path / "picture"]) == [tmp_path / "picture"]


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ([], "needs images, videos"),
        (["nowhere"], "no image, video or folder nowhere"),
        (["."], r"The folder \. holds no images \(\.jpg, .* and no videos"),
    ],
)
def test_nothing_to_take(tmp_path, monkeypatch, inputs, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        find_inputs([Path(path) for path in inputs])

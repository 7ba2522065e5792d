"""The folder in which a detector is exported: programs that JAX or ONNX Runtime runs alone, and a description of them.

`export.json` describes the folder, and has the SHA-256 digest of each of its other files. A program is a function of images
of one size, on one platform, in the form of `jax.export`, or an ONNX file. Its last arguments are

- of the kind `resized`: images uint8 `[B, H, W, 3]`, RGB, with the resized image at the top left; then the (height, width)
  of the resized images, and those of the original images, int32 `[B, 2]` each;
- of the kind `original`: images uint8 `[B, h, w, 3]` as they are; resizing them is a part of the program.

which ONNX files call `images`, `resized` and `original`. If the weights are a file, they are in front of these, a dictionary
of arrays by name; ONNX files have their weights inside. The result is a dictionary: `boxes` float32 `[B, n, 4]`, `scores`
float32 `[B, n]`, `labels` int32 `[B, n]`, `valid` bool `[B, n]`. An ONNX file carries a description of itself.
"""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax import export

from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError, shown
from hpr_jax.weights.manifest import size_and_digest
from hpr_jax.weights.published import parse
from hpr_jax.weights.source import EXPORT

FORMAT, VERSION = "hpr_jax.export", 1
RESIZED, ORIGINAL = "resized", "original"
WEIGHTS = "model.safetensors"
# The platform of ONNX files, which ONNX Runtime runs on a CPU.
ONNX = "onnx"


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of the folder.

    Attributes:
      file: its name.
      platform: `cpu`, `cuda`, `tpu` or `onnx`.
      height, width: of its images.
      kernels: whether it calls Triton kernels.
      calling_convention: version by which JAX decides whether it can run the program; of ONNX files that of the operators.
    """

    file: str
    platform: str
    height: int
    width: int
    kernels: bool
    calling_convention: int


@dataclasses.dataclass(frozen=True)
class Description:
    """What `export.json` says and a caller needs.

    Attributes:
      programs: of all platforms and sizes.
      classes: that labels are indices of.
      batch: number of images of a call; None: any.
      images: the kind of images, `RESIZED` or `ORIGINAL`.
      weights: name of the file of weights; None: they are in the programs, as they are in ONNX files in any case.
      side, max_side, canvas, detections: the settings of `config.evaluate`.
      image_bits: the setting of `config.data`.
      dtype: of activations.
    """

    programs: tuple[Program, ...]
    classes: Classes
    batch: int | None
    images: str
    weights: str | None
    side: int
    max_side: int
    canvas: int
    detections: int
    image_bits: int
    dtype: str

    def to_json(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        classes = content.pop("classes")
        content |= {"class_names": list(classes["names"]), "category_ids": list(classes["category_ids"])}
        return {**content, "batch": "any" if self.batch is None else self.batch}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Description":
        fields = [field.name for field in dataclasses.fields(Description)]
        values = {name: content[name] for name in fields if name != "classes"}
        values["classes"] = Classes(tuple(content["class_names"]), tuple(content["category_ids"]))
        values["programs"] = tuple(Program(**program) for program in content["programs"])
        values["batch"] = None if content["batch"] == "any" else int(content["batch"])
        return Description(**values)


def read_description(folder: Path) -> Description:
    """What a folder has, after its files were compared with their digests.

    Raises:
      UserError: it is of a newer version, or damaged.
    """
    path = folder / EXPORT
    try:
        content = parse(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    _check_version(path, content)
    damage = _damage(folder, content.get("files"))
    if damage:
        raise UserError(f"The exported detector {folder} is damaged: {damage}; copy or export it again.")
    return _described(path, content)


def _check_version(path: Path, content: Mapping[str, Any]) -> None:
    version = content.get("format_version")
    if content.get("format") != FORMAT or type(version) is not int or not 1 <= version <= VERSION:
        raise UserError(
            f"{path} is of the format {shown(content.get('format'))}, version {shown(version)}, and this hpr_jax reads "
            f"{FORMAT}, version {VERSION}; install a newer one."
        )


def _described(path: Path, content: Mapping[str, Any]) -> Description:
    try:
        return Description.from_json(content)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, a value is missing or of another kind; copy or export it again.") from error


def as_text(description: Description) -> str:
    """What an ONNX file carries; `from_text` reads it."""
    return json.dumps({"format": FORMAT, "format_version": VERSION, **description.to_json()})


def from_text(path: Path, text: str | None) -> Description:
    """The description that an ONNX file carries.

    Args:
      path: of the file, for messages.
      text: None: it carries none.

    Raises:
      UserError: it is of another program or a newer version, or damaged.
    """
    if text is None:
        raise UserError(
            f"{path} was not written by `export` of hpr_jax, or says nothing about its classes; export it again."
        )
    content = parse(text.encode(), str(path))
    _check_version(path, content)
    return _described(path, content)


def _damage(folder: Path, files: Any) -> str | None:
    """The first file that is not as it was written, as a clause; None if there is none."""
    if not isinstance(files, dict) or not all(Path(name).name == name for name in files):
        return f"{EXPORT} does not list its files"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            size, digest = size_and_digest(path)
        except OSError as error:
            return f"{name} cannot be read, {error.strerror}"
        if expected != {"size": size, "sha256": digest}:
            return f"{name} has changed since it was written"
    return None


def write_description(folder: Path, description: Description, notes: Mapping[str, Any]) -> None:
    """Writes `export.json`, after all other files of the folder.

    Args:
      notes: what people want to know beside the description.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        size, digest = size_and_digest(path)
        files[path.name] = {"size": size, "sha256": digest}
    content = {"format": FORMAT, "format_version": VERSION, **description.to_json(), **notes, "files": files}
    (folder / EXPORT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_packages(*names: str) -> None:
    """Checks that packages which ONNX files want are there.

    Raises:
      UserError: one is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f'ONNX files need the package {name}; install it with pip install "hpr_jax[onnx]".')


def check_serialization() -> None:
    """Checks that JAX can read and write programs.

    Raises:
      UserError: the package that it does that with is missing.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("JAX reads and writes exported programs with the package flatbuffers; pip install flatbuffers.")


def read_program(folder: Path, program: Program) -> export.Exported:
    """Reads a program, whose digest was compared.

    Raises:
      UserError: this JAX cannot run it.
    """
    check_serialization()
    oldest = export.minimum_supported_calling_convention_version
    newest = export.maximum_supported_calling_convention_version
    if not oldest <= program.calling_convention <= newest:
        mend = "install a newer JAX" if program.calling_convention > newest else "export the detector again"
        raise UserError(
            f"{folder / program.file} has version {program.calling_convention} of JAX's calling convention, and this JAX "
            f"runs {oldest} to {newest}; {mend}."
        )
    try:
        return export.deserialize(bytearray((folder / program.file).read_bytes()))
    # JAX raises errors of several libraries.
    except Exception as error:
        raise UserError(f"{folder / program.file} is no program that this JAX reads; export it again.") from error

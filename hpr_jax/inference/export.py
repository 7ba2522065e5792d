"""Writes a detector as programs that need nothing of this project; `export_format.py` describes them."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export
from ml_collections import ConfigDict

from hpr_jax.data.augmentation.crop_resize_flip import GREY, evaluation_geometries
from hpr_jax.errors import UserError
from hpr_jax.inference.detect import detections, in_image_pixels
from hpr_jax.inference.export_format import (
    FORMAT,
    ONNX,
    ORIGINAL,
    RESIZED,
    WEIGHTS,
    Description,
    Program,
    as_text,
    check_packages,
    check_serialization,
    write_description,
)
from hpr_jax.inference.export_readme import readme, resize_rule
from hpr_jax.inference.image_detector import GRID
from hpr_jax.inference.resize import resize
from hpr_jax.kernels.abstract_gpu import CUSTOM_CALL, abstract_gpu
from hpr_jax.models.detector import Detector
from hpr_jax.ops.padding import valid_mask
from hpr_jax.ops.platform import programs_for
from hpr_jax.runtime.files import whole_folder
from hpr_jax.weights.official_names import dotted_path
from hpr_jax.weights.safetensors_file import write_safetensors
from hpr_jax.weights.source import ONNX_SUFFIX, Source

Size = tuple[int, int]

# Bytes of weights that an ONNX file, a message of Protocol Buffers of at most 2 GiB, has room for beside its nodes.
LARGEST_ONNX = 2 * 10**9


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is exported of a detector.

    Attributes:
      platforms: some of `cpu`, `cuda`, `tpu` and `onnx`.
      batch: number of images of a call; None: any.
      sizes: (height, width) of the programs' inputs; (): those that images of every shape fit into.
      images: what the inputs are, `RESIZED` or `ORIGINAL`.
      weights_beside: whether the weights are a file beside the programs, which all programs of JAX share and a CPU rounds as
        an `ImageDetector` does.
      kernels: whether programs for CUDA call Triton kernels.
    """

    platforms: tuple[str, ...] = ("cpu",)
    batch: int | None = 1
    sizes: tuple[Size, ...] = ()
    images: str = RESIZED
    weights_beside: bool = True
    kernels: bool = False

    def __post_init__(self):
        if self.kernels and "cuda" not in self.platforms:
            raise UserError("--kernels are for NVIDIA GPUs; add --platform cuda, or leave them out.")
        if self.kernels and self.batch is None:
            raise UserError("Kernels are made for one number of images; give --batch N, or leave out --kernels.")
        if ONNX in self.platforms and self.batch is None:
            raise UserError("ONNX files are made for one number of images; give --batch N.")
        if self.images == ORIGINAL and not self.sizes:
            raise UserError("Programs that resize are made for images of one size; give it as --image-size HxW.")


def write_exported(folder: Path, source: Source, wanted: Wanted) -> None:
    """Writes a folder of programs. It appears when it is complete.

    Args:
      folder: what does not exist, or is an empty folder.
      source: the detector.

    Raises:
      UserError: the folder is in use or cannot be written, or the sizes do not suit the detector.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another.")
    if ONNX in wanted.platforms:
        check_packages("onnx")
    if set(wanted.platforms) - {ONNX}:
        check_serialization()
    sizes = wanted.sizes or default_sizes(source.config)
    _check_canvas(sizes, source.config, wanted)
    try:
        with whole_folder(folder) as partial:
            _write(partial, source, dataclasses.replace(wanted, sizes=sizes))
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written: {error.strerror}.") from error


def default_sizes(config: ConfigDict) -> tuple[Size, ...]:
    """The sizes that images of every shape fit into after they were resized: one for landscapes, one for portraits."""
    settings = config.evaluate
    if settings.canvas:
        return ((_on_grid(settings.canvas),) * 2,)
    short, long = (_on_grid(min(side, settings.max_side)) for side in (settings.side, settings.max_side))
    return ((short, long), (long, short)) if short != long else ((short, long),)


def _on_grid(side: int) -> int:
    """The side of the input that an `ImageDetector` would pad so many pixels to."""
    return -(-side // GRID) * GRID


def _check_canvas(sizes: Sequence[Size], config: ConfigDict, wanted: Wanted) -> None:
    canvas = config.evaluate.canvas
    for height, width in sizes if wanted.images == RESIZED else ():
        if min(height, width) < canvas:
            raise UserError(
                f"The size {height}x{width} is smaller than the canvas of {canvas}x{canvas} pixels that the detector sees; "
                f"give --size {canvas}x{canvas} or more."
            )


def _write(folder: Path, source: Source, wanted: Wanted) -> None:
    """Fills the folder."""
    about, programs, checks = _description(source, wanted), [], set()
    for platform in wanted.platforms:
        detector = _built_for(platform, source, wanted)
        for size in wanted.sizes:
            if platform == ONNX:
                programs.append(_write_onnx(folder, detector, source.config, size, wanted, about))
                continue
            exported = export_program(detector, source.config, platform, size, wanted)
            name = f"{platform}-{size[0]}x{size[1]}.jax_export"
            (folder / name).write_bytes(exported.serialize())
            kernels = wanted.kernels and platform == "cuda"
            programs.append(Program(name, platform, *size, kernels, exported.calling_convention_version))
            checks |= {str(check) for check in exported.disabled_safety_checks}
    if about.weights is not None:
        write_safetensors(folder / WEIGHTS, {name: np.asarray(one) for name, one in _weights(detector).items()}, {})
    description = dataclasses.replace(about, programs=tuple(programs))
    (folder / "README.md").write_text(readme(description), encoding="utf-8")
    write_description(folder, description, _notes(description, detector, sorted(checks)))


def _description(source: Source, wanted: Wanted) -> Description:
    """What there is to say before there are programs."""
    settings, for_jax = source.config.evaluate, bool(set(wanted.platforms) - {ONNX})
    return Description(
        programs=(),
        classes=source.classes,
        batch=wanted.batch,
        images=wanted.images,
        weights=WEIGHTS if wanted.weights_beside and for_jax else None,
        side=settings.side,
        max_side=settings.max_side,
        canvas=settings.canvas,
        detections=settings.detections,
        image_bits=source.config.data.image_bits,
        dtype=source.config.compute.dtype if for_jax else "float32",
    )


def _built_for(platform: str, source: Source, wanted: Wanted) -> Detector:
    """The detector with the operations that suit a platform."""
    compute = {**source.config.compute, "operations": "xla", "remat": ()}
    if wanted.kernels and platform == "cuda":
        compute["operations"] = "auto"
    if platform == ONNX:
        # ONNX Runtime computes little in bfloat16 on CPUs.
        compute["dtype"] = "float32"
    return source.build(compute)


def _notes(description: Description, detector: Detector, checks: list[str]) -> dict[str, Any]:
    """What people want to know beside the description."""
    return {
        "made_with": {name: _version(name) for name in _makers(description)},
        "disabled_safety_checks": checks,
        "normalisation": {
            "order": "RGB",
            "mean": list(detector.pixel_mean),
            "std": list(detector.pixel_std),
            "where": "inside the programs, whose input is uint8",
        },
        "resize": resize_rule(description),
        "scores": "Sigmoids of independent classes, in 0 to 1, highest first; a query may be detected as several classes. "
        "No further non-maximum suppression is meant. Where valid is false there is no detection.",
        "boxes": "(left, top, right, bottom) in pixels of the original image, between edges of pixels, clipped to the image",
    }


def _makers(description: Description) -> list[str]:
    """The packages that made the programs."""
    has_onnx = any(program.platform == ONNX for program in description.programs)
    return ["hpr_jax", "jax", "jaxlib", *(["onnx"] if has_onnx else [])]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def export_program(detector: Detector, config: ConfigDict, platform: str, size: Size, wanted: Wanted) -> export.Exported:
    """One program of a detector that was built for the platform's operations."""
    kernels = wanted.kernels and platform == "cuda"
    function = _with_weights(detector, _on_images(detector, config, size, wanted.images), wanted.weights_beside)
    checks = [export.DisabledSafetyCheck.custom_call(CUSTOM_CALL)] if kernels else []
    with programs_for(platform), abstract_gpu() if kernels else contextlib.nullcontext():
        made = export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)
        return made(*_arguments(detector, size, wanted))


def _write_onnx(
    folder: Path, detector: Detector, config: ConfigDict, size: Size, wanted: Wanted, about: Description
) -> Program:
    """Writes an ONNX file, which carries its description, so that it can be loaded without its folder.

    Raises:
      UserError: the detector does something that is not translated, or is too large.
    """
    from hpr_jax.inference.onnx.graph import OPSET
    from hpr_jax.inference.onnx.model import onnx_model
    from hpr_jax.inference.onnx.table import UntranslatableError

    weights = {name: np.asarray(one) for name, one in _weights(detector).items()}
    if sum(one.nbytes for one in weights.values()) > LARGEST_ONNX:
        raise UserError(f"The weights of this detector are larger than the {LARGEST_ONNX / 1e9} GB that an ONNX file holds.")
    program = Program(f"model-{size[0]}x{size[1]}{ONNX_SUFFIX}", ONNX, *size, False, OPSET)
    alone = dataclasses.replace(about, programs=(program,), weights=None, dtype="float32")
    function = _with_weights(detector, _on_images(detector, config, size, wanted.images), True)
    arguments = dict(zip(("images", "resized", "original"), _arguments(detector, size, wanted)[wanted.weights_beside :]))
    try:
        with programs_for(ONNX):
            model = onnx_model(function, weights, arguments, metadata={FORMAT: as_text(alone)})
    except UntranslatableError as error:
        raise UserError(f"This detector cannot become an ONNX file: {error}; export it for another platform.") from error
    (folder / program.file).write_bytes(model.SerializeToString())
    return program


def _arguments(detector: Detector, size: Size, wanted: Wanted) -> list[Any]:
    """The abstract arguments of a program."""
    batch: Any = export.symbolic_shape("batch")[0] if wanted.batch is None else wanted.batch
    arguments: list[Any] = [jax.ShapeDtypeStruct((batch, *size, 3), jnp.uint8)]
    if wanted.images == RESIZED:
        arguments += [jax.ShapeDtypeStruct((batch, 2), jnp.int32)] * 2
    if wanted.weights_beside:
        arguments.insert(0, {name: jax.ShapeDtypeStruct(one.shape, one.dtype) for name, one in _weights(detector).items()})
    return arguments


def _weights(detector: Detector) -> dict[str, jax.Array]:
    """The weights of a detector under our own names."""
    return {dotted_path(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(detector))}


def _with_weights(
    detector: Detector, detect: Callable[..., dict[str, jax.Array]], beside: bool
) -> Callable[..., dict[str, jax.Array]]:
    """A program out of a function whose first argument is the detector's state."""
    state = nnx.state(detector)
    if not beside:
        # XLA does not compute in advance what depends on weights alone, which would be rounded otherwise than at run time.
        # How it fuses constants differs from how it fuses arguments all the same: the last bits of results may, too.
        return lambda *arguments: detect(jax.lax.optimization_barrier(state), *arguments)

    def program(weights: dict[str, jax.Array], *arguments: jax.Array) -> dict[str, jax.Array]:
        flat = [(path, one.replace(weights[dotted_path(path)])) for path, one in nnx.to_flat_state(state)]
        return detect(nnx.from_flat_state(flat), *arguments)

    return program


def _on_images(detector: Detector, config: ConfigDict, size: Size, images: str) -> Callable[..., dict[str, jax.Array]]:
    """The function of the detector's state and images of one kind and size to detections."""
    graph, settings = nnx.split(detector)[0], config.evaluate

    def on_resized(state: nnx.State, images: jax.Array, resized: jax.Array, original: jax.Array) -> dict[str, jax.Array]:
        seen = resized
        if settings.canvas:
            images, seen = _on_canvas(images, resized), jnp.full_like(resized, settings.canvas)
        boxes, scores, labels, valid = detections(graph, settings.detections, state, images, seen)
        return {
            "boxes": in_image_pixels(boxes, resized, original),
            "scores": scores,
            "labels": labels,
            "valid": valid,
        }

    def on_original(state: nnx.State, images: jax.Array) -> dict[str, jax.Array]:
        (geometry,) = evaluation_geometries(np.array([size]), settings.side, settings.max_side)
        height, width = (_on_grid(settings.canvas or side) for side in geometry.size)
        padding = (0, 0), (0, height - geometry.size[0]), (0, width - geometry.size[1]), (0, 0)
        sizes = [jnp.broadcast_to(jnp.array(one, jnp.int32), (images.shape[0], 2)) for one in (geometry.size, size)]
        return on_resized(state, jnp.pad(resize(images, geometry.size), padding), *sizes)

    return on_resized if images == RESIZED else on_original


def _on_canvas(images: jax.Array, resized: jax.Array) -> jax.Array:
    """Images `[B, H, W, 3]` with grey around the resized images."""
    return jnp.where(valid_mask(resized, *images.shape[1:3]), images, jnp.uint8(GREY))

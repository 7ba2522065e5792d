"""An exported detector as a detector for notebooks and scripts: it is called as an `ImageDetector` is."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from ml_collections import ConfigDict

from hpr_jax.data.augmentation.crop_resize_flip import apply_to_image, evaluation_geometries
from hpr_jax.errors import UserError
from hpr_jax.inference.branches import TopQueries
from hpr_jax.inference.detections import Detections
from hpr_jax.inference.explanation import Explanation
from hpr_jax.inference.export_format import (
    FORMAT,
    ONNX,
    RESIZED,
    Description,
    Program,
    from_text,
    read_description,
    read_program,
)
from hpr_jax.inference.image_detector import ImageDetector
from hpr_jax.inference.onnx.session import OnnxSession
from hpr_jax.inference.pixels import ImageLike
from hpr_jax.types import Outputs
from hpr_jax.weights.safetensors_file import read_safetensors
from hpr_jax.weights.source import ONNX_SUFFIX


class ExportedDetector(ImageDetector):
    """A detector whose programs were exported. It has no module, and detects alone.

    Attributes:
      folder: of the programs.
      description: of the folder.
    """

    def __init__(self, place: Path):
        """Takes a folder, whose files are compared with their digests, or an ONNX file, which ONNX Runtime runs. Of a folder
        it takes the programs of this machine's platform, and ONNX files if there are none.

        Raises:
          UserError: it is damaged, or has no program for this platform or this JAX, or ONNX Runtime is missing.
        """
        alone = place.suffix == ONNX_SUFFIX and place.is_file()
        self.folder = place.parent if alone else place
        self._sessions: dict[str, OnnxSession] = {}
        if alone:
            self._sessions[place.name] = OnnxSession(place)
            self.description = from_text(place, self._sessions[place.name].metadata.get(FORMAT))
            # The file may have another name today.
            (program,) = self.description.programs
            self._programs = [dataclasses.replace(program, file=place.name)]
        else:
            self.description = read_description(place)
            self._programs = _programs_for_this_machine(place, self.description)
        self.classes, self.config = self.description.classes, _config(self.description)
        self._compiled: dict[Program, Callable[..., dict[str, jax.Array]]] = {}
        if self._programs[0].platform == ONNX:
            self._session(self._programs[0])
            return
        read_program(place, self._programs[0])
        weights = self.description.weights
        self._weights = [] if weights is None else [jax.device_put(read_safetensors(place / weights)[0])]

    def explain(self, image: ImageLike, query: int | None = None) -> Explanation:
        """Raises a UserError, as `outputs` does."""
        raise self._detects_alone()

    def outputs(self, image: ImageLike) -> Outputs:
        """Raises a UserError: exported programs return detections alone."""
        raise self._detects_alone()

    def branches(self, image: ImageLike, count: int = 10) -> dict[str, list[TopQueries]]:
        """Raises a UserError, as `outputs` does."""
        raise self._detects_alone()

    def _detects_alone(self) -> UserError:
        return UserError(
            f"The exported detector {self.folder} returns detections alone; load the checkpoint it was made of."
        )

    def input_shape(self, image: np.ndarray) -> tuple[int, int]:
        program = self._choose(image, self._resized_size(image))
        return program.height, program.width

    def _detect_all(self, images: Sequence[np.ndarray]) -> list[Detections]:
        size = self.config.evaluate.batch_size
        batches = (images[start : start + size] for start in range(0, len(images), size))
        return [found for batch in batches for found in self._detect_batch(batch)]

    def _detect_batch(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detects in as many images as a program takes, or fewer, with one call for each program that they need."""
        resized = [self._resized_size(image) for image in images]
        programs = [self._choose(image, size) for image, size in zip(images, resized)]
        found: dict[int, Detections] = {}
        for program in dict.fromkeys(programs):
            places = [place for place, one in enumerate(programs) if one == program]
            results = self._run(program, [images[place] for place in places], [resized[place] for place in places])
            for number, place in enumerate(places):
                arrays = (results[name][number] for name in ("boxes", "scores", "labels", "valid"))
                found[place] = self._detections(images[place], *arrays)
        return [found[place] for place in range(len(images))]

    def _resized_size(self, image: np.ndarray) -> tuple[int, int]:
        """The (height, width) that an image is resized to."""
        (geometry,) = evaluation_geometries(np.array([image.shape[:2]]), self.description.side, self.description.max_side)
        return geometry.size

    def _choose(self, image: np.ndarray, resized: tuple[int, int]) -> Program:
        """The smallest program that takes an image.

        Raises:
          UserError: none does.
        """
        whole = self.description.images == RESIZED
        needed = resized if whole else image.shape[:2]

        def takes(program: Program) -> bool:
            size = program.height, program.width
            return (size[0] >= needed[0] and size[1] >= needed[1]) if whole else size == needed

        fitting = [program for program in self._programs if takes(program)]
        if fitting:
            return min(fitting, key=lambda program: (program.height * program.width, program.file))
        height, width = image.shape[:2]
        becomes = f" becomes {needed[0]}x{needed[1]} and" if whole else ""
        sizes = ", ".join(f"{program.height}x{program.width}" for program in self._programs)
        option = "--size" if whole else "--image-size"
        raise UserError(
            f"The image of {height}x{width} pixels (height x width){becomes} fits no program in {self.folder}, which has "
            f"{sizes}; export the detector with {option} {needed[0]}x{needed[1]}, too."
        )

    def _run(self, program: Program, images: list[np.ndarray], resized: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        """Calls a program; what it computes of the places that no image fills is arbitrary."""
        batch, size = self.description.batch or len(images), (program.height, program.width)
        padded = np.zeros((batch, *size, 3), np.uint8)
        sizes = np.full((2, batch, 2), size, np.int32)
        for place, (image, (height, width)) in enumerate(zip(images, resized)):
            if self.description.images == RESIZED:
                (geometry,) = evaluation_geometries(
                    np.array([image.shape[:2]]), self.description.side, self.description.max_side
                )
                padded[place, :height, :width] = apply_to_image(image, geometry)
            else:
                padded[place] = image
            sizes[:, place] = (height, width), image.shape[:2]
        inputs: list[Any] = [padded, *sizes] if self.description.images == RESIZED else [padded]
        if program.platform == ONNX:
            return self._session(program)(*inputs)
        if program not in self._compiled:
            self._compiled[program] = jax.jit(read_program(self.folder, program).call)
        return jax.device_get(self._compiled[program](*self._weights, *inputs))

    def _session(self, program: Program) -> OnnxSession:
        if program.file not in self._sessions:
            self._sessions[program.file] = OnnxSession(self.folder / program.file)
        return self._sessions[program.file]


def _programs_for_this_machine(folder: Path, description: Description) -> list[Program]:
    """The programs of a folder for the platform of this JAX; those for ONNX if there are none.

    Raises:
      UserError: there are neither.
    """
    ours = export.default_export_platform()
    for platform in (ours, ONNX):
        programs = [program for program in description.programs if program.platform == platform]
        if programs:
            return programs
    platforms = ", ".join(sorted({program.platform for program in description.programs}))
    raise UserError(
        f"The detector in {folder} was exported for {platforms}, and this JAX runs on {ours}; export it again with "
        f"--platform {ours}."
    )


def _config(description: Description) -> ConfigDict:
    """The settings of an image detector that the description of an exported one has."""
    evaluate = {name: getattr(description, name) for name in ("side", "max_side", "canvas", "detections")}
    evaluate["batch_size"] = description.batch or 1
    return ConfigDict(
        {
            "evaluate": evaluate,
            "data": {"image_bits": description.image_bits},
            "compute": {"dtype": description.dtype},
        }
    )

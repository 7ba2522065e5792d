"""The README of an exported detector: the lines by which JAX or ONNX Runtime, and NumPy, alone call it."""

from hpr_jax.inference.export_format import ONNX, RESIZED, Description
from hpr_jax.weights.source import EXPORT

_README = """\
# An object detector as programs for {runtimes}

`{export}` describes the programs and lists the SHA-256 digests of all files. They were made by
[hpr_jax](https://openaccess.thecvf.com/content/CVPR2024/html/Zhao_Hybrid_Proposal_Refiner_Revisiting_DETR_Series_from_the_Faster_R-CNN_CVPR_2024_paper.html),
whose `hpr_jax.load("FOLDER")` calls them with images of any form.{examples}

{rules}
"""

_EXAMPLE = """ Without it {programs} need `pip install {packages}`:

```python
import json
from pathlib import Path

{imports}

folder = Path(".")  # this folder
about = json.loads((folder / "{export}").read_bytes())
{program}
{call}
keep = found["valid"] & (found["scores"] >= 0.3)
for box, label in zip(found["boxes"][keep], found["labels"][keep]):
    print(about["class_names"][label], box)  # left, top, right, bottom in pixels of the original image
```"""

_JAX = """\
platform = jax.export.default_export_platform()
program = next(one for one in about["programs"] if one["platform"] == platform)  # There may be several sizes.
detect = jax.jit(jax.export.deserialize(bytearray((folder / program["file"]).read_bytes())).call)
"""

_ONNX = """\
program = next(one for one in about["programs"] if one["platform"] == "onnx")  # There may be several sizes.
session = onnxruntime.InferenceSession(str(folder / program["file"]), providers=["CPUExecutionProvider"])
names = [one.name for one in session.get_outputs()]


def detect(*inputs):
    given = {one.name: array for one, array in zip(session.get_inputs(), inputs)}
    return dict(zip(names, session.run(None, given)))


"""

_WEIGHTS = """\

data = (folder / about["weights"]).read_bytes()
start = 8 + int.from_bytes(data[:8], "little")
header = json.loads(data[8:start])
header.pop("__metadata__", None)
types = {"F32": "<f4", "I32": "<i4", "U32": "<u4"}
weights = {}
for name, one in header.items():
    first, last = one["data_offsets"]
    numbers = np.frombuffer(data[start + first : start + last], types[one["dtype"]])
    weights[name] = numbers.reshape(one["shape"])
"""

_CALL_RESIZED = """\
images = np.zeros(({batch}, program["height"], program["width"], 3), np.uint8)
resized, original = (np.ones((len(images), 2), np.int32) for _ in range(2))  # (height, width) of each image
images[0, : image.shape[0], : image.shape[1]] = image  # RGB, resized by the rule below
resized[0], original[0] = image.shape[:2], original_size
found = detect({weights}images, resized, original)"""

_CALL_ORIGINAL = """\
images = np.zeros(({batch}, program["height"], program["width"], 3), np.uint8)
images[0] = image  # RGB, as it is
found = detect({weights}images)"""


def resize_rule(description: Description) -> str:
    """How images are resized, in words."""
    side, longest = description.side, description.max_side
    rule = (
        f"An image of h x w pixels is resized in proportion by s = min({side} / min(h, w), {longest} / max(h, w)), in "
        "float64, to max(1, floor(h * s + 0.5)) x max(1, floor(w * s + 0.5)) pixels, as "
        "OpenCV's cv2.resize with INTER_LINEAR does it."
    )
    if description.canvas:
        rule += f" The program itself puts it on a grey canvas of {description.canvas} x {description.canvas} pixels."
    if description.images == RESIZED:
        return f"{rule} The caller resizes, and puts the result at the top left of the program's input; the rest is ignored."
    return f"{rule} The program resizes, bit for bit as OpenCV does; it takes images of exactly its size."


def readme(description: Description) -> str:
    """The text of the README."""
    has_onnx = any(program.platform == ONNX for program in description.programs)
    has_jax = any(program.platform != ONNX for program in description.programs)
    runtimes = [name for name, there in (("JAX", has_jax), ("ONNX Runtime", has_onnx)) if there]
    examples = ""
    if has_jax:
        programs = "those for JAX" if has_onnx else "they"
        examples += _example(description, programs, "jax flatbuffers", ("jax", "jax.export"), _JAX, description.weights)
    if has_onnx:
        programs = "\n\nthe ONNX files" if has_jax else "they"
        examples += _example(description, programs, "onnxruntime numpy", ("onnxruntime",), _ONNX, None)
    rules = resize_rule(description)
    return _README.format(runtimes=" and ".join(runtimes), export=EXPORT, examples=examples, rules=rules)


def _example(
    description: Description, programs: str, packages: str, modules: tuple[str, ...], program: str, weights: str | None
) -> str:
    """The sentence about some of the programs, and the lines that call one of them."""
    call = _CALL_RESIZED if description.images == RESIZED else _CALL_ORIGINAL
    imports = sorted([*(f"import {module}" for module in modules), "import numpy as np"])
    return _EXAMPLE.format(
        programs=programs,
        packages=packages,
        imports="\n".join(imports),
        export=EXPORT,
        program=program + (_WEIGHTS if weights is not None else ""),
        call=call.format(batch=description.batch or 1, weights="weights, " if weights is not None else ""),
    )

"""The README of an exported detector: the lines by which JAX and NumPy alone call it."""

from hpr_jax.inference.export_format import RESIZED, Description
from hpr_jax.weights.source import EXPORT

_README = """\
# An object detector as programs for JAX

`{export}` describes the programs and lists the SHA-256 digests of all files. They were made by
[hpr_jax](https://openaccess.thecvf.com/content/CVPR2024/html/Zhao_Hybrid_Proposal_Refiner_Revisiting_DETR_Series_from_the_Faster_R-CNN_CVPR_2024_paper.html),
whose `hpr_jax.load("FOLDER")` calls them with images of any form. Without it they need `pip install jax flatbuffers`:

```python
import json
from pathlib import Path

import jax
import jax.export
import numpy as np

folder = Path(".")  # this folder
about = json.loads((folder / "{export}").read_bytes())
platform = jax.export.default_export_platform()
program = next(one for one in about["programs"] if one["platform"] == platform)  # There may be several sizes.
detect = jax.jit(jax.export.deserialize(bytearray((folder / program["file"]).read_bytes())).call)
{weights}
{call}
keep = found["valid"] & (found["scores"] >= 0.3)
for box, label in zip(found["boxes"][keep], found["labels"][keep]):
    print(about["class_names"][label], box)  # left, top, right, bottom in pixels of the original image
```

{rules}
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
    beside = description.weights is not None
    call = _CALL_RESIZED if description.images == RESIZED else _CALL_ORIGINAL
    return _README.format(
        export=EXPORT,
        weights=_WEIGHTS if beside else "",
        call=call.format(batch=description.batch or 1, weights="weights, " if beside else ""),
        rules=resize_rule(description),
    )

"""The classes of a file of weights."""

from collections.abc import Mapping
from typing import Any

from hpr_jax.data.dataset import Classes
from hpr_jax.data.sources.coco import COCO_CLASSES


def guess_classes(meta: Mapping[str, Any], count: int) -> Classes:
    """The `count` classes that a file names in its meta data; if it names none, COCO's if there are 80, else numbers."""
    dataset = meta.get("dataset_meta")
    dataset = dataset if isinstance(dataset, Mapping) else {}
    names = dataset.get("classes", dataset.get("CLASSES"))
    if not isinstance(names, list | tuple) or len(names) != count:
        names = COCO_CLASSES.names if count == len(COCO_CLASSES.names) else [f"class {i}" for i in range(count)]
    names = tuple(map(str, names))
    if names == COCO_CLASSES.names:
        return COCO_CLASSES
    ids = dataset.get("category_ids")
    if not isinstance(ids, list | tuple) or len(ids) != count or not all(isinstance(one, int | str) for one in ids):
        ids = range(1, count + 1)
    return Classes(names, tuple(ids))

"""Damaged and strange inputs for property-based tests.

Usually a test tries a few examples, the same ones each time. With `pytest --hypothesis-profile=many` it tries thousands of
random ones, whose outcomes `--hypothesis-show-statistics` counts.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st

from hpr_jax.data.dataset import Dataset
from hpr_jax.errors import UserError
from hpr_jax.evaluation.average_precision import coco_average_precision

# Words of Python and its libraries, which no sentence for a user has.
FOREIGN_WORDS = ("Error", "NoneType", "object is not", "invalid literal", "has no '", "Traceback", "not subscriptable")

# Values of a JSON document that are not what is expected there.
STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "0", "7", "\ud800", "a\0b", "/etc/passwd", "../x.jpg", 10**400, -(10**40), 1e999, 1e308, -0.0]),
    st.recursive(
        st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=5,
    ),
)


def examples(usual: int, many: int) -> settings:
    """Decorates a test with the number of examples that it usually tries, and with that under the profile `many`."""
    chosen = settings.get_current_profile_name() == "many"
    return settings(
        max_examples=many if chosen else usual,
        derandomize=not chosen,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def refused(error: UserError, *parts: str) -> None:
    """Checks that an error is one sentence in words for a user, which has these parts, and counts it."""
    sentence = str(error)
    assert all(part in sentence for part in parts), sentence
    assert sentence.endswith((".", "?"))
    assert "\n" not in sentence
    assert not any(word in sentence for word in FOREIGN_WORDS), sentence
    event("refused")


def accepted() -> None:
    """Counts an example that was understood."""
    event("accepted")


def evaluated_alike(dataset: Dataset) -> None:
    """Checks that both evaluators count the same, for a detection in each image."""
    ids, categories = dataset.records.image_ids, dataset.classes.category_ids
    found = [{"image_id": i, "category_id": categories[0], "bbox": [1, 2, 20, 15], "score": 0.5} for i in ids]
    slow, fast = (coco_average_precision(dataset, found, evaluator)[0] for evaluator in ("pycocotools", "hotcoco"))
    assert fast == pytest.approx(slow, abs=1e-9)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The places of all values of a JSON document."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@st.composite
def changed_documents(draw, document):
    """JSON documents with one to three changes: values are replaced, taken out, or stand there twice."""
    content = copy.deepcopy(document)
    known = list(places(content))[1:]
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(known))
        node = content
        try:
            for key in parents:
                node = node[key]
            change = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
            if change == "remove":
                del node[last]
            elif change == "double" and isinstance(node, list):
                node.append(node[last])
            else:
                node[last] = draw(STRANGE)
        except (KeyError, IndexError, TypeError):
            # An earlier change has taken the place away.
            continue
    return content


@st.composite
def damaged_bytes(draw, data: bytes):
    """The bytes of a file with one to four damages: some are changed, taken out, put in or zeroed, or the end is missing.

    Most damages are near the start, where files say what they hold.
    """
    damaged = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, min(len(damaged) - 1, draw(st.sampled_from([32, 256, len(damaged)]))))))
        length = draw(st.sampled_from([1, 1, 2, 4, 64]))
        match draw(st.sampled_from(["change", "change", "change", "remove", "insert", "zero", "fill", "cut"])):
            case "change":
                damaged[place : place + length] = draw(st.binary(min_size=length, max_size=length))[: len(damaged) - place]
            case "remove":
                del damaged[place : place + length]
            case "insert":
                damaged[place:place] = draw(st.binary(min_size=length, max_size=length))
            case "zero":
                damaged[place : place + length] = bytes(len(damaged[place : place + length]))
            case "fill":
                damaged[place : place + length] = b"\xff" * len(damaged[place : place + length])
            case "cut":
                del damaged[place:]
    return bytes(damaged)


def understood_or_refused(load: Callable[[Path], Dataset], folder: Path, *parts: str) -> None:
    """Asserts that damaged data is read and evaluated like other data, or refused with a sentence that has these parts."""
    try:
        dataset = load(folder)
    except UserError as error:
        refused(error, *parts)
        return
    accepted()
    evaluated_alike(dataset)
    assert np.all(np.isfinite(dataset.records.boxes))

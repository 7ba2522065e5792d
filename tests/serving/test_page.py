"""The page in a browser: a picture is dropped on it, and boxes can be chosen."""

import pytest

pytest.importorskip("starlette", reason="The extra `serve` is not installed.")

import io

import numpy as np
from browser import BROWSER, browser
from pictures import plain
from PIL import Image
from served import FakeDetector, served

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="There is no Chromium to show the page with.")]

BOXES = "document.querySelectorAll('#boxes g').length"
SHOWN = "!document.getElementById('panel').hidden"


@pytest.fixture(scope="module")
def port():
    with served(FakeDetector()) as port:
        yield port


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def opened(page, port):
    """The page anew, without complaints of the browser."""
    page.complaints.clear()
    page.size(1100, 900)
    page.call("Page.navigate", url=f"http://localhost:{port}/")
    page.until("document.readyState === 'complete' && document.title.startsWith('tiny')")
    yield page
    assert not page.complaints


@pytest.fixture
def picture(tmp_path):
    """A picture in which the first object's box is (0, 0, 90, 60)."""
    Image.fromarray(plain(80, 120, (90, 60, 0))).save(tmp_path / "<b>picture.png")
    return tmp_path / "<b>picture.png"


def set_value(page, name, value):
    """Moves a slider, as a user does."""
    page.run(
        f"(() => {{ const it = document.getElementById('{name}'); it.value = {value};"
        " it.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def test_threshold_and_classes(opened, picture):
    opened.drop(picture, 300, 100)
    opened.until(SHOWN)
    assert "<b>picture.png: 120\u00d780 pixels" in opened.run("document.getElementById('status').textContent")
    assert opened.run(BOXES) == 1
    assert opened.run("document.querySelector('#boxes text').textContent") == "cup 0.90"
    # The box lies on the picture as it is shown.
    assert opened.run(
        "(() => { const s = document.getElementById('stage').getBoundingClientRect();"
        " const r = document.querySelector('#boxes rect');"
        " return [r.getAttribute('width') / s.width, r.getAttribute('height') / s.height]; })()"
    ) == pytest.approx([90 / 120, 60 / 80], abs=1e-3)
    set_value(opened, "threshold", 0.1)
    assert opened.run("[...document.querySelectorAll('#detections tr')].map((row) => row.cells[0].textContent)") == [
        "cup",
        "hat",
    ]
    opened.run("document.querySelector('#classes input').click()")
    assert opened.run("[...document.querySelectorAll('#boxes text')].map((text) => text.textContent)") == ["hat 0.20"]
    opened.run("document.getElementById('all').click()")
    assert opened.run(BOXES) == 2
    opened.run("document.getElementById('none').click()")
    assert opened.run(BOXES) == 0


def test_branches(opened, picture):
    opened.drop(picture, 300, 100)
    opened.until(SHOWN)
    opened.run("document.querySelector('input[value=branches]').click()")
    opened.until("document.querySelectorAll('#branches details').length === 2")
    names = "[...document.querySelectorAll('#branches summary')].map((one) => one.textContent.trim())"
    assert opened.run(names) == ["primary", "dynamic_conv"]
    first = "document.querySelector('#branches details:last-child tbody tr').cells[1].textContent"
    assert opened.run(first) == "3"
    set_value(opened, "layer", 1)
    assert opened.run(first) == "2"
    # What is pointed at is marked in all branches, and drawn whatever its score.
    opened.run("document.querySelector('#branches details:last-child tbody tr').focus()")
    assert opened.run("document.querySelectorAll('#branches tr.marked').length") == 2


def test_the_keyboard_is_enough(opened, picture):
    """Tab, arrows and the space bar reach all of it; the slider has the focus after the file."""
    document = opened.call("DOM.getDocument")["root"]["nodeId"]
    file = opened.call("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
    opened.press("Tab", 9)
    assert opened.run("document.activeElement.id") == "file"
    opened.call("DOM.setFileInputFiles", nodeId=file, files=[str(picture)])
    opened.until(SHOWN)
    opened.press("Tab", 9)
    assert opened.run("document.activeElement.id") == "threshold"
    opened.press("ArrowRight", 39)
    assert opened.run("document.getElementById('threshold-value').textContent") == "0.31"


def test_what_is_refused_is_said(opened, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    opened.drop(tmp_path / "text.png", 300, 100)
    opened.until("document.getElementById('status').className === 'bad'")
    said = opened.run("document.getElementById('status').textContent")
    assert said == "This is no JPEG, PNG, WebP, BMP or TIFF image, or it is damaged."
    # The browser logs answers that are errors.
    assert all("415" in complaint for complaint in opened.complaints)
    opened.complaints.clear()


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (360, False)])
def test_grounds_and_widths(opened, picture, width, dark):
    """It has the ground that the user likes, and nothing is wider than a phone."""
    opened.size(width, 1200, dark=dark)
    opened.drop(picture, 100, 100)
    opened.until(f"{SHOWN} && {BOXES} === 1")
    assert opened.run("document.documentElement.scrollWidth <= innerWidth")
    with Image.open(io.BytesIO(opened.screenshot())) as image:
        pixels = np.asarray(image.convert("RGB"))
    ground = [0x14, 0x14, 0x15] if dark else [0xF5, 0xF5, 0xF4]
    assert (pixels[:, -1] == ground).all()
    assert 0.05 < (pixels == (90, 60, 0)).all(axis=-1).mean() < 0.6

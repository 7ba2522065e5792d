"""The report in a browser: what fits the ground is shown, and nothing is wider than a phone."""

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from test_report import subject, whole_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Chromium's words for the two grounds.
GROUNDS = {"light": (), "dark": ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")}


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="There is no Chromium to show the page with.")
@pytest.mark.parametrize(("ground", "width"), [("light", 1150), ("dark", 1150), ("light", 500)])
def test_it_is_shown(tmp_path, ground, width):
    (tmp_path / "page.html").write_text(whole_page(subject()))
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", *GROUNDS[ground])
    # As a page that is too wide would be scrolled, its last column of pixels would not be of the ground's colour.
    shot = (f"--window-size={width},3000", f"--screenshot={tmp_path / 'shot.png'}", (tmp_path / "page.html").as_uri())
    subprocess.run([str(BROWSER), *options, "--hide-scrollbars", *shot], check=True, capture_output=True, timeout=120)
    with Image.open(tmp_path / "shot.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    colour = [0xF5, 0xF5, 0xF4] if ground == "light" else [0x14, 0x14, 0x15]
    assert pixels.shape == (3000, width, 3)
    assert (pixels[:, -1] == colour).all()
    # There is something on the page, and little of it is as bright as the other ground.
    differs = (pixels != colour).any(axis=-1)
    assert 0.05 < differs.mean() < 0.9
    if ground == "dark":
        assert (pixels.min(axis=-1) > 0xF0).mean() < 0.01

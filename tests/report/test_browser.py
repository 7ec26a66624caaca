"""The HTML report in Chromium: light, dark, narrow and printed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from van_deploy.bundle import Bundle
from van_deploy.report.files import document_of_bundle
from van_deploy.report.render_html import html_from_document

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--disable-dev-shm-usage", "--enable-logging=stderr", "--v=0"),
)
DARK = "--blink-settings=preferredColorScheme=0"
TIMEOUT_S = 120


def chromium(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    page, profile = folder / "report.html", f"--user-data-dir={folder / 'profile'}"
    words = [str(CHROMIUM), *FLAGS, profile, *flags, page.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)


def screenshot(folder: Path, *flags: str, width: int = 1180) -> np.ndarray:
    target = folder / "shot.png"
    chromium(folder, f"--window-size={width},1600", f"--screenshot={target}", *flags)
    with Image.open(target) as image:
        return np.asarray(image.convert("RGB"), np.float64)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
def test_page_in_light_dark_narrow_and_printed(full: Bundle, tmp_path: Path) -> None:
    page = html_from_document(document_of_bundle(full))
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    light, dark = screenshot(tmp_path), screenshot(tmp_path, DARK)
    assert light.shape == dark.shape == (1600, 1180, 3)
    assert light[4, 4].min() > 235
    assert light.mean() > 200
    assert light.std() > 15, "there is something on the page"
    assert dark[4, 4].max() < 40
    assert dark.mean() < 80
    narrow = screenshot(tmp_path, width=500)
    assert (narrow[:, -3:] == narrow[0, 0]).all(), "nothing reaches over the right edge"
    result = chromium(tmp_path, "--dump-dom")
    assert "Throughput against accuracy: each artifact" in result.stdout
    assert [line for line in result.stderr.splitlines() if ":CONSOLE" in line] == []
    chromium(tmp_path, DARK, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'report.pdf'}")
    data = (tmp_path / "report.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    assert 2 <= data.count(b"/Type /Page\n") + data.count(b"/Type /Page ") <= 20

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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"
    ),
]


@pytest.fixture(scope="module")
def page(full: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html_from_document(document_of_bundle(full)), encoding="utf-8")
    return path


def chromium(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    words = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)


def screenshot(page: Path, folder: Path, *flags: str, width: int = 1180) -> np.ndarray:
    target = folder / "shot.png"
    size = f"--window-size={width},1600"
    chromium(page, folder / "profile", size, f"--screenshot={target}", *flags)
    with Image.open(target) as image:
        return np.asarray(image.convert("RGB"), np.float64)


def test_light_and_dark_mode(page: Path, tmp_path: Path) -> None:
    light = screenshot(page, tmp_path / "light")
    dark = screenshot(page, tmp_path / "dark", DARK)
    assert light.shape == dark.shape == (1600, 1180, 3)
    assert light[4, 4].min() > 235
    assert dark[4, 4].max() < 40
    assert light.mean() > 200
    assert dark.mean() < 80
    assert light.std() > 15, "there is something on the page"


def test_no_console_errors_and_no_overflow_in_a_narrow_window(page: Path, tmp_path: Path) -> None:
    result = chromium(page, tmp_path / "profile", "--dump-dom")
    assert "Throughput against accuracy: each artifact" in result.stdout
    assert [line for line in result.stderr.splitlines() if ":CONSOLE" in line] == []
    narrow = screenshot(page, tmp_path, width=500)
    assert (narrow[:, -3:] == narrow[0, 0]).all(), "nothing reaches over the right edge"


def test_print(page: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.pdf"
    chromium(page, tmp_path / "profile", DARK, "--no-pdf-header-footer", f"--print-to-pdf={target}")
    data = target.read_bytes()
    assert data.startswith(b"%PDF")
    assert 2 <= data.count(b"/Type /Page\n") + data.count(b"/Type /Page ") <= 20

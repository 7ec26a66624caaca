"""The web page in a real browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Running, serving, top5_of
from van_deploy.bundle import Bundle

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Yield a page, and check at the end that its only errors were refused requests."""
    page, problems = browser.new_page(viewport={"width": 1180, "height": 760}), list[str]()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    yield page
    page.close()
    assert [p for p in problems if "422" not in p and "401" not in p] == []


def test_image_upload_shows_bars_times_and_pytorch(
    page: Any, server: Running, digits: Bundle, golden_image: Path
) -> None:
    page.goto(f"http://{server.address}")
    page.wait_for_selector("#model option", state="attached")
    assert "10 classes" in page.inner_text("#about")
    page.set_input_files("#file", golden_image)
    page.locator(".bar i[style]").nth(9).wait_for(state="attached")
    top = top5_of(digits)
    assert page.locator("#bars li b").all_inner_texts() == [item.name for item in top]
    for bars in (".bar:not(.torch) i", ".bar.torch i"):
        styles = page.eval_on_selector_all(bars, "all => all.map(e => e.style.width)")
        shares = [float(style.removesuffix("%")) for style in styles]
        assert shares == pytest.approx([100 * item.probability for item in top], abs=0.01)
    labels = page.locator("#times span").all_inner_texts()
    assert labels == ["fp32-uint8", "PyTorch", "reading the file", "difference"]
    page.uncheck("#compare")
    page.locator(".bar.torch").first.wait_for(state="detached")
    assert page.locator(".bar").count() == 5
    page.select_option("#model", "van_digits-fp32")
    page.wait_for_selector("#times span:text-is('fp32')")
    assert page.inner_text("#address").endswith("/v2/models/van_digits-fp32")


def test_dropped_files_and_files_that_are_not_images(
    page: Any, server: Running, golden_image: Path, tmp_path: Path
) -> None:
    page.goto(f"http://{server.address}")
    page.wait_for_selector("#model option", state="attached")
    page.evaluate(
        """async (bytes) => {
            const file = new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"});
            const data = new DataTransfer();
            data.items.add(file);
            const drop = new DragEvent("drop", {dataTransfer: data, bubbles: true});
            document.querySelector("#drop").dispatchEvent(drop);
        }""",
        list(golden_image.read_bytes()),
    )
    page.wait_for_selector("#result li")
    assert page.inner_text("#file-name") == "dropped.png"
    (tmp_path / "note.txt").write_text("no image")
    page.set_input_files("#file", tmp_path / "note.txt")
    page.wait_for_selector("#error:visible")
    assert "it is in no known image format" in page.inner_text("#error")
    assert page.locator("#result").is_hidden()


def test_api_key_prompt(page: Any, digits: Bundle, golden_image: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("open-sesame")
    with serving(digits, api_key_file=tmp_path / "key") as server:
        page.goto(f"http://{server.address}")
        page.wait_for_selector("#locked:visible")
        page.fill("#secret", "wrong")
        with page.expect_response("**/models"):
            page.press("#secret", "Enter")
        assert page.locator("#locked").is_visible()
        page.fill("#secret", "open-sesame")
        page.press("#secret", "Enter")
        page.wait_for_selector("#model option", state="attached")
        assert page.locator("#locked").is_hidden()
        page.set_input_files("#file", golden_image)
        page.wait_for_selector("#result li")

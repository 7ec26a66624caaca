"""van-deploy predict: every kind of picture, and what is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Cli
from tests.each import each
from tests.serve.conftest import top5_of
from van_deploy.bundle import Bundle
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.embedded import write_digits_folder
from van_deploy.runners.network import Network
from van_deploy.serve.predict import Speed, predict, sources_from


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_digits_folder(tmp_path / "digits", "heldout", limit=11)


def document(result: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@each("artefact", ["fp32", "fp32-uint8", "pytorch"])
@each("batch", ["1", "4"])
def test_a_folder_through_every_artefact(
    digits: Bundle, folder: Path, cli: Cli, artefact: str, batch: str
) -> None:
    result = cli(
        *("predict", digits.path, folder, "--artefact", artefact),
        *("--batch", batch, "--top-k", "2", "--json"),
    )
    assert result.exit_code == 0
    predictions = document(result)["predictions"]
    assert len(predictions) == 11
    right = sum(p["top"][0]["name"] == Path(p["source"]).parent.name for p in predictions)
    assert right >= 10  # the network is right on 97 of 100
    assert all(len(p["top"]) == 2 for p in predictions)
    assert "11 images, " in result.stderr


def test_batches_are_filled_across_bad_pictures(digits: Bundle, folder: Path) -> None:
    files = sorted(folder.rglob("*.png"))[:5]
    bad = folder / "bad.png"
    bad.write_bytes(b"no picture")
    sizes: list[int] = []
    with Network(digits) as network:
        run = network.run
        network.run = lambda batch: sizes.append(len(batch)) or run(batch)  # type: ignore
        sources = [*files[:1], bad, *files[1:]]
        answers = list(predict(network, sources, batch=4, speed=(speed := Speed())))
    assert sizes == [4, 1]
    assert [a.source for a in answers] == [str(s) for s in sources]
    assert [a.error is None for a in answers] == [True, False, True, True, True, True]
    assert speed.pictures == 5


def test_json_lines_and_a_bad_picture(digits: Bundle, folder: Path, cli: Cli) -> None:
    (folder / "bad.png").write_bytes(b"no picture")
    result = cli("predict", digits.path, folder, "--jsonl")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 12
    assert sum(line["error"] is not None for line in lines) == 1
    assert result.exit_code == 5
    assert "1 of 12 pictures could not be read." in result.stderr


def as_timm_would(picture: Image.Image, digits: Bundle) -> int:
    transform = digits.manifest.preprocessing.transform()
    with Network(digits) as network:
        return int(network.run(transform(picture).numpy()[None])["logits"].argmax())


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1", "I;16", "LA"])
def test_every_mode_is_answered_as_timm_would(
    digits: Bundle, folder: Path, tmp_path: Path, cli: Cli, mode: str
) -> None:
    grey = Image.open(next(folder.rglob("*.png"))).convert("L").resize((64, 64))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        picture = grey.convert(mode)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    picture.save(path)
    result = cli("predict", digits.path, path, "--json")
    top = document(result)["predictions"][0]["top"][0]["index"]
    expected = grey if mode == "I;16" else picture.convert("RGB")
    assert top == as_timm_would(expected, digits)


def test_exif_orientation_is_applied(
    digits: Bundle, folder: Path, tmp_path: Path, cli: Cli
) -> None:
    upright = Image.open(next(folder.rglob("*.png"))).convert("RGB").resize((64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    paths = [tmp_path / name for name in ("turned.png", "upright.png")]
    turned, straight = document(cli("predict", digits.path, *paths, "--json"))["predictions"]
    assert turned["top"] == straight["top"]


def test_the_first_frame_of_an_animation(digits: Bundle, folder: Path, tmp_path: Path) -> None:
    frames = [Image.open(p).convert("L").resize((64, 64)) for p in sorted(folder.rglob("*.png"))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:4])
    frames[0].save(tmp_path / "b.gif")
    with Network(digits) as network:
        a, b = predict(network, sources_from([str(tmp_path / "a.gif"), str(tmp_path / "b.gif")]))
    assert a.top == b.top


def test_standard_input(digits: Bundle, original: Path) -> None:
    command = [sys.executable, "-m", "van_deploy", "predict", str(digits.path), "-", "--json"]
    done = subprocess.run(command, input=original.read_bytes(), capture_output=True, check=True)
    top = json.loads(done.stdout)["predictions"][0]["top"]
    expected = top5_of(digits)
    assert [c["index"] for c in top] == [c.index for c in expected]
    empty = subprocess.run(command, input=b"", capture_output=True, check=False)
    assert empty.returncode == 5
    assert b"Standard input is empty." in empty.stderr


@each(
    ("words", "error", "message"),
    [
        (["https://x.org/a.jpg"], UsageError, "is a URL; nothing is downloaded here"),
        (["nowhere.jpg"], ImageError, "There is no image 'nowhere.jpg'"),
    ],
)
def test_what_cannot_be_read_is_refused(
    words: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sources_from(words)


def test_impossible_requests(digits: Bundle, original: Path, cli: Cli) -> None:
    assert cli("predict", digits.path, original, "--batch", "9").exit_code == 2
    assert cli("predict", digits.path, original, "--top-k", "0").exit_code == 2
    twice = cli("predict", digits.path, "-", "-")
    assert (twice.exit_code, twice.stderr) == (
        2,
        "error: Standard input can be read once.\n  Give '-' once.\n",
    )
    assert cli("predict", digits.path, original, "--json", "--jsonl").exit_code == 2
    assert cli("predict", digits.path, original, "--artefact", "fp8").exit_code == 5
    table = cli("predict", digits.path, original, "--top-k", "99")
    assert table.exit_code == 0
    assert "95.7%" in table.stdout

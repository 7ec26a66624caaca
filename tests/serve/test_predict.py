"""van-deploy predict: every kind of image, and what is none."""

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


def tops_of(digits: Bundle, *paths: Path) -> list[Any]:
    with Network(digits) as network:
        return [answer.top for answer in predict(network, sources_from(paths))]


@each("artefact", ["fp32", "fp32-uint8", "pytorch"])
@each("batch", ["1", "4"])
def test_a_folder_through_every_artifact(
    digits: Bundle, folder: Path, cli: Cli, artefact: str, batch: str
) -> None:
    words = ("--artefact", artefact, "--batch", batch, "--top-k", "2", "--json")
    result = cli("predict", digits.path, folder, *words)
    assert result.exit_code == 0
    predictions = json.loads(result.stdout)["predictions"]
    assert len(predictions) == 11
    right = sum(p["top"][0]["name"] == Path(p["source"]).parent.name for p in predictions)
    assert right >= 10  # the network is right on 97 of 100
    assert all(len(p["top"]) == 2 for p in predictions)
    assert "11 images, " in result.stderr


def test_batches_are_filled_across_what_cannot_be_read(
    digits: Bundle, folder: Path, cli: Cli
) -> None:
    files = sorted(folder.rglob("*.png"))[:5]
    bad = folder / "bad.png"
    bad.write_bytes(b"no image")
    sizes: list[int] = []
    with Network(digits) as network:
        run = network.run
        network.run = lambda batch: sizes.append(len(batch)) or run(batch)  # type: ignore
        sources = [*files[:1], bad, *files[1:]]
        answers = list(predict(network, sources, batch=4, speed=(speed := Speed())))
    assert sizes == [4, 1]
    assert [a.source for a in answers] == [str(s) for s in sources]
    assert [a.error is None for a in answers] == [True, False, True, True, True, True]
    assert speed.images == 5
    result = cli("predict", digits.path, folder, "--jsonl")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert (len(lines), sum(line["error"] is not None for line in lines)) == (12, 1)
    assert result.exit_code == 5
    assert "1 of 12 images could not be read." in result.stderr


@each("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1", "I;16", "LA"])
def test_every_mode_is_answered_as_timm_would(
    digits: Bundle, tmp_path: Path, original: Path, mode: str
) -> None:
    grey = Image.open(original).convert("L").resize((64, 64))
    image = grey.convert(mode) if mode != "I;16" else grey
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path)
    as_timm = digits.manifest.preprocessing.transform()(
        grey if mode == "I;16" else image.convert("RGB")
    )
    with Network(digits) as network:
        expected = int(network.run(as_timm.numpy()[None])["logits"].argmax())
    assert tops_of(digits, path)[0][0].index == expected


def test_exif_orientation_and_the_first_frame_of_an_animation(
    digits: Bundle, folder: Path, tmp_path: Path
) -> None:
    frames = [Image.open(p).convert("RGB").resize((64, 64)) for p in sorted(folder.rglob("*.png"))]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    frames[0].rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    frames[0].save(tmp_path / "upright.png")
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:4])
    frames[0].save(tmp_path / "b.gif")
    names = ("turned.png", "upright.png", "a.gif", "b.gif")
    turned, upright, several, one = tops_of(digits, *(tmp_path / name for name in names))
    assert turned == upright
    assert several == one


def test_standard_input(digits: Bundle, original: Path) -> None:
    command = [sys.executable, "-m", "van_deploy", "predict", str(digits.path), "-", "--json"]
    done = subprocess.run(command, input=original.read_bytes(), capture_output=True, check=True)
    top = json.loads(done.stdout)["predictions"][0]["top"]
    assert [c["index"] for c in top] == [c.index for c in top5_of(digits)]
    empty = subprocess.run(command, input=b"", capture_output=True, check=False)
    assert empty.returncode == 5
    assert b"Standard input is empty." in empty.stderr


def test_what_is_not_possible(digits: Bundle, original: Path, cli: Cli) -> None:
    with pytest.raises(UsageError, match="is a URL; nothing is downloaded here"):
        sources_from(["https://x.org/a.jpg"])
    with pytest.raises(ImageError, match=r"There is no image 'nowhere\.jpg'"):
        sources_from(["nowhere.jpg"])
    for code, *words in (
        (2, original, "--batch", "9"),
        (2, original, "--top-k", "0"),
        (2, original, "--json", "--jsonl"),
        (2, "-", "-"),
        (5, original, "--artefact", "fp8"),
    ):
        assert cli("predict", digits.path, *map(str, words)).exit_code == code
    table = cli("predict", digits.path, original, "--top-k", "99")
    assert table.exit_code == 0
    assert "95.7%" in table.stdout

"""Every ``van-deploy`` command of the pages, and every example of a help text, is run as written.

``van_digits`` takes the place of the variants, so that nothing is downloaded here
(``tests/model/test_files.py`` downloads and exports them); small files take the place of the
user's. Commands that need a GPU run as well: without one they end with exit code 3, or gates
report what they skipped.
"""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from reliability.load import run_server
from tests.conftest import Cli
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.model.embedded import EMBEDDED_WEIGHTS, write_digits_folder
from van_deploy.model.van import random_van
from van_deploy.model.variants import VanConfig

ROOT = Path(__file__).parent.parent
KINDS = ("*.md", "docs/*.md", "van_deploy/cli/*.py")
FILES = sorted(file for kind in KINDS for file in ROOT.glob(kind))
EXAMPLE = re.compile(r"^    Example: van-deploy (.*)$", re.MULTILINE)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELLS = ("", "sh", "bash", "console")
HEADER = re.compile(r"^(\S.*)\n─{9}", re.MULTILINE)  # of a table in a sample of output
GPU_WORDS = (
    *({"--require", "gpu"}, {"--device", "cuda:0"}, {"--tune"}),
    *({"--runner", "ort-cuda"}, {"--backend", "tensorrt"}),
)
SHORTER = {"bench": ("--seconds", "0.05", "--limit", "0.5", "--runners", "ort-cpu*")}


def commands(page: Path) -> list[list[str]]:
    """Return the words of every command in the examples and shell blocks of a page."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(block for language, block in BLOCK.findall(text) if language in SHELLS)
    lines = blocks.replace("\\\n", " ").splitlines()
    every = (shlex.split(line.removeprefix("$ "), comments=True) for line in lines)
    examples = (shlex.split(example) for example in EXAMPLE.findall(text))
    return [*examples, *(words[1:] for words in every if words[:1] == ["van-deploy"])]


def table_headers(text: str) -> set[str]:
    """Return the header lines of the tables in a text, with single spaces."""
    return {" ".join(header.split()) for header in HEADER.findall(text)}


@pytest.fixture
def workspace(tmp_path: Path, precisions_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with the files that the pages name."""
    shutil.copytree(precisions_bundle, tmp_path / "dist" / "van_digits")
    write_digits_folder(tmp_path / "val", "heldout")
    write_digits_folder(tmp_path / "train", "train", 520)  # enough for --max-drop 0.2
    shutil.copytree(tmp_path / "train", tmp_path / "holiday")
    shutil.copytree(tmp_path / "train", tmp_path / "images")
    Image.new("RGB", (90, 70), (200, 30, 90)).save(tmp_path / "photo.jpg")
    config = VanConfig((8, 12, 16, 24), (1, 2, 1, 1), (4, 4, 2, 2), num_classes=10)
    state = random_van(config, seed=7).state_dict()
    shutil.copyfile(EMBEDDED_WEIGHTS, tmp_path / "mine.pth")  # trained: random logits pass no gate
    backbone = {f"backbone.{n}": t for n, t in state.items() if not n.startswith("head.")}
    torch.save({"state_dict": backbone}, tmp_path / "upernet_van_b2.pth")
    (tmp_path / "mine.toml").write_text('[model]\nname = "van_digits"\n')
    (tmp_path / "key.txt").write_text("secret\n")
    for words in ("genpkey -algorithm ed25519 -out", "pkey -pubout -out release.pem.pub -in"):
        command = ["openssl", *words.split(), "release.pem"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [f for f in FILES if commands(f)], ids=lambda page: page.name)
def test_every_command_of_a_page_runs(cli: Cli, workspace: Path, page: Path) -> None:
    driver, headers = nvidia_driver(), set[str]()
    has_gpu = driver is not None and bool(driver.gpus)
    for written in commands(page):
        words = [re.sub(r"van_b\d(?!\.pth)", "van_digits", word) for word in written]
        if "serve" in words[:1]:
            with run_server(Path(words[1]), *words[2:], "--port", "0") as (server, _):
                pass
            assert server.returncode == 0, written  # stopped as by a service manager
            continue
        stdin = Path(words.pop()).read_bytes() if "<" in words else None
        words = [word for word in words if word != "<"]
        shorter = () if "--paper-limits" in words else SHORTER.get(words[0], ())  # times nothing
        result = cli(*words, *shorter, stdin=stdin)
        headers |= table_headers(result.output)
        needs_gpu = any(some <= {*words} for some in GPU_WORDS) and "cpu" not in words
        if needs_gpu and not has_gpu:
            skipped = result.exit_code == 1 and "SKIPPED" in result.output
            assert result.exit_code == 3 or skipped, (written, result.output)
            assert result.stderr.startswith("error: "), result.output
        elif result.exit_code == 1:  # too few images to decide, or an engine without its GPU
            assert re.search("(?i)inconclusive|skipped", result.output), (written, result.output)
            assert not re.search(r"\bFAIL", result.output), (written, result.output)
        else:
            assert result.exit_code == 0, (written, result.output)
    unknown = table_headers(page.read_text(encoding="utf-8")) - headers
    assert not unknown, "no command of this page prints a table with this header"

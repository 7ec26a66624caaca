"""The snippets of docs/serving.md do what they say."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Cli
from van_deploy.bundle import Bundle
from van_deploy.data import open_image
from van_deploy.model.pixels import pixels_from_image
from van_deploy.runners.network import Network


@pytest.fixture(scope="module")
def text(repository: Path) -> str:
    return (repository / "docs/serving.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found
    return found


def test_python_with_onnx_runtime_alone(digits: Bundle, text: str, tmp_path: Path) -> None:
    (source,) = (block for block in blocks(text, "python") if "onnxruntime" in block)
    preprocessing = digits.manifest.preprocessing
    sizes = f"{preprocessing.image_size}, {preprocessing.resize_size}"
    assert "SIZE, SHORT_SIDE = 224, 248" in source
    (tmp_path / "main.py").write_text(source.replace("224, 248", sizes))
    shutil.copy(digits.path / "model.uint8.onnx", tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.jpg")
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    with Network(digits, "fp32-uint8") as network:
        pixels = pixels_from_image(open_image(tmp_path / "photo.jpg"), preprocessing)
        expected = np.argsort(-network.run(pixels[None])["logits"][0])[:5]
    assert done.stdout == f"{expected}\n"


def test_cpp_with_onnx_runtime_alone(digits: Bundle, text: str, tmp_path: Path) -> None:
    (source,) = blocks(text, "cpp")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    (tmp_path / "main.cpp").write_text(source)
    header = "#include <onnxruntime_cxx_api.h>\n"
    probe = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"],
        input=header,
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode:
        pytest.skip("ONNX Runtime's C++ headers are not installed")
    subprocess.run(
        [compiler, "-std=c++17", "main.cpp", "-lonnxruntime", "-o", "main"],
        cwd=tmp_path,
        check=True,
    )
    with Network(digits, "fp32-uint8") as network:
        picture = open_image(digits.path / "golden/0.png")
        pixels = pixels_from_image(picture, network.preprocessing)
        expected = network.run(pixels[None])["logits"][0]
    (tmp_path / "pixels.rgb").write_bytes(pixels.tobytes())
    model = digits.path / "model.uint8.onnx"
    done = subprocess.run(
        ["./main", model, "pixels.rgb", str(pixels.shape[0])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    np.testing.assert_allclose([float(v) for v in done.stdout.split()], expected, atol=1e-4)


def test_every_python_block_is_python(text: str) -> None:
    for block in blocks(text, "python"):
        ast.parse(block)


def test_every_command_exists_with_its_options(text: str, cli: Cli) -> None:
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    commands = [line.split() for line in lines if line.startswith("van-deploy ")]
    assert len(commands) == 9
    for _, command, *words in commands:
        help_text = cli(command, "--help").stdout
        for word in words:
            assert not word.startswith("--") or word in help_text

"""The commands of docs/serving.md exist, and the programs of docs/examples do what they say."""

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
from van_deploy.data.images import open_image
from van_deploy.model.preprocess import pixels_from_image
from van_deploy.runners.network import Network

DOCS = Path(__file__).parents[2] / "docs"
TEXT, EXAMPLES = (DOCS / "serving.md").read_text(encoding="utf-8"), DOCS / "examples"


def test_python_with_onnx_runtime_alone(digits: Bundle, tmp_path: Path) -> None:
    source = (EXAMPLES / "onnxruntime_image.py").read_text()
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


def test_cpp_with_onnx_runtime_alone(digits: Bundle, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    shutil.copy(EXAMPLES / "onnxruntime_image.cpp", tmp_path / "main.cpp")
    words = [compiler, "-std=c++17", "main.cpp", "-lonnxruntime", "-o", "main"]
    made = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "onnxruntime_cxx_api.h" in made.stderr:
        pytest.skip("ONNX Runtime's C++ headers are not installed")
    assert made.returncode == 0, made.stderr
    with Network(digits, "fp32-uint8") as network:
        picture = open_image(digits.path / "golden/0.png")
        pixels = pixels_from_image(picture, network.preprocessing)
        expected = network.run(pixels[None])["logits"][0]
    (tmp_path / "pixels.rgb").write_bytes(pixels.tobytes())
    model = digits.path / "model.uint8.onnx"
    words = ["./main", str(model), "pixels.rgb", str(pixels.shape[0])]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    np.testing.assert_allclose([float(v) for v in done.stdout.split()], expected, atol=1e-4)


def test_every_example_is_linked_and_every_command_exists_with_its_options(cli: Cli) -> None:
    files = sorted(EXAMPLES.iterdir())
    assert len(files) == 3
    for file in files:
        assert f"(examples/{file.name})" in TEXT
        if file.suffix == ".py":
            ast.parse(file.read_text())
    blocks = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [line.split() for line in lines if line.startswith("van-deploy ")]
    assert len(commands) == 9
    for _, command, *words in commands:
        help_text = cli(command, "--help").stdout
        assert not [word for word in words if word.startswith("--") and word not in help_text]

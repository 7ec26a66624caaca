"""The example programs in docs/examples (tests/test_pages.py runs the commands of the docs)."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from tests.serve.conftest import pixels_of
from van_deploy.bundle import Bundle
from van_deploy.runners.network import Network

EXAMPLES = Path(__file__).parents[2] / "docs/examples"


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if "onnxruntime_cxx_api.h" in done.stderr:
        pytest.skip("ONNX Runtime's C++ headers are not installed")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_example(digits: Bundle, tmp_path: Path) -> None:
    source, image = (EXAMPLES / "onnxruntime_image.py").read_text(), tmp_path / "photo.jpg"
    preprocessing = digits.manifest.preprocessing
    sizes = f"{preprocessing.image_size}, {preprocessing.resize_size}"
    assert "SIZE, SHORT_SIDE = 224, 248" in source
    (tmp_path / "main.py").write_text(source.replace("224, 248", sizes))
    shutil.copy(digits.path / "model.uint8.onnx", tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (47, 94, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # as of a camera held upright
    Image.fromarray(noise).save(image, exif=exif)
    with Network(digits, "fp32-uint8") as network:
        (logits,) = network.run(pixels_of(digits, [image]))["logits"]
    assert run([sys.executable, "main.py"], tmp_path) == f"{np.argsort(-logits)[:5]}\n"


def test_cpp_example(digits: Bundle, pixels: Any, expected: Any, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    source = str(EXAMPLES / "onnxruntime_image.cpp")
    run([compiler, "-std=c++17", source, "-lonnxruntime", "-o", "main"], tmp_path)
    (tmp_path / "pixels.rgb").write_bytes(pixels[0].tobytes())
    model = str(digits.path / "model.uint8.onnx")
    output = run(["./main", model, "pixels.rgb", str(len(pixels[0]))], tmp_path)
    logits = [float(number) for number in output.split()]
    np.testing.assert_allclose(logits, expected["logits"][0], atol=1e-4)

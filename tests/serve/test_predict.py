"""van-deploy predict (tests/data tests reading images), embedded preprocessing, docs/examples."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper
from PIL import ExifTags, Image

from tests.artifacts import Copy
from tests.conftest import Cli
from tests.each import each
from tests.serve.conftest import pixels_of, top5_of
from van_deploy.bundle import Bundle
from van_deploy.config import ExportSettings
from van_deploy.errors import GateFailed
from van_deploy.graph.embed import TOP_PROBABILITIES, embed_preprocessing
from van_deploy.model.embedded import write_digits_folder
from van_deploy.runners.network import Network
from van_deploy.serve import embedded
from van_deploy.serve.embedded import embed_artifacts

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)


@each("artifact", ["fp32", "fp32-uint8", "pytorch"])
def test_predict_on_a_folder_with_an_unreadable_file(
    digits: Bundle, tmp_path: Path, cli: Cli, artifact: str
) -> None:
    folder = write_digits_folder(tmp_path / "digits", "heldout", limit=11)
    words = ("--artifact", artifact, "--batch", "4", "--top-k", "2")
    result = cli("predict", digits.path, folder, *words, "--json")
    predictions = json.loads(result.stdout)["predictions"]
    assert (result.exit_code, len(predictions)) == (0, 11)
    correct = sum(p["top"][0]["name"] == Path(p["source"]).parent.name for p in predictions)
    assert correct >= 10  # the network classifies 97 of 100 correctly
    assert all(len(p["top"]) == 2 for p in predictions)
    assert f"{artifact}: 11 images, " in result.stderr
    (folder / "0/bad.png").write_bytes(b"no image")
    result = cli("predict", digits.path, folder, *words, "--jsonl")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line for line in lines if not line["error"]] == predictions
    (bad,) = (line for line in lines if line["error"])
    assert (bad["source"], bad["top"]) == (str(folder / "0/bad.png"), [])
    assert result.exit_code == 5
    assert "1 of 12 images could not be read." in result.stderr


def test_standard_input(digits: Bundle, golden_image: Path, cli: Cli) -> None:
    words = ("predict", digits.path, "-", "--json")
    result = cli(*words, stdin=golden_image.read_bytes())
    top = json.loads(result.stdout)["predictions"][0]["top"]
    assert [c["index"] for c in top] == [c.index for c in top5_of(digits)]
    empty = cli(*words, stdin=b"")
    assert (empty.exit_code, "Standard input is empty." in empty.stderr) == (5, True)


def test_invalid_arguments_and_missing_images(digits: Bundle, golden_image: Path, cli: Cli) -> None:
    for code, message, *words in (
        (5, "There is no image 'nowhere.jpg'", "nowhere.jpg"),
        (2, "does not take batches of 9", golden_image, "--batch", "9"),
        (2, "'--top-k'", golden_image, "--top-k", "0"),
        (2, "--jsonl", golden_image, "--json", "--jsonl"),
        (2, "can be read only once", "-", "-"),
        (5, "has no artifact 'fp8'", golden_image, "--artifact", "fp8"),
    ):
        assert message in cli.fails(code, "predict", digits.path, *words)
    assert "95.7%" in cli.passes("predict", digits.path, golden_image, "--top-k", "99")


def test_embedded_graphs_match_or_nothing_is_written(
    digits: Bundle, copy_bundle: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, batches = copy_bundle(digits), [PIXELS[:size] for size in (1, 2, 3)]
    settings = ExportSettings(embed_preprocess="normalize", outputs=("logits", "top5"))
    (result,) = embed_artifacts(Bundle.open(copy), settings, batches)
    assert (result.name, result.base, result.reused) == ("fp32-normalize", "fp32", False)
    assert result.agreement
    differences = {row["batch"]: row["difference"] for row in result.agreement["batches"]}
    assert [*differences] == [1, 2, 3]
    assert max(differences.values()) < 1e-6
    assert embed_artifacts(Bundle.open(copy), settings, batches)[0].reused

    def other_mean(model: Any, preprocessing: Any, *more: Any) -> Any:
        mean = tuple(value + 0.01 for value in preprocessing.mean)
        return embed_preprocessing(model, replace(preprocessing, mean=mean), *more)

    def nan_output(*args: Any) -> Any:
        """Return a graph whose last output is NaN."""
        model = embed_preprocessing(*args)
        node = next(n for n in model.graph.node if TOP_PROBABILITIES in n.output)
        node.output[list(node.output).index(TOP_PROBABILITIES)] = "correct"
        model.graph.initializer.append(numpy_helper.from_array(np.float32(np.nan), "nan"))
        model.graph.node.append(helper.make_node("Mul", ["correct", "nan"], [TOP_PROBABILITIES]))
        return model

    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    changed = settings.with_changes(outputs=("probabilities", "top5"))
    for faulty in (other_mean, nan_output):
        monkeypatch.setattr(embedded, "embed_preprocessing", faulty)
        with pytest.raises(GateFailed, match=r"At batch 1 'model\.normalize"):
            embed_artifacts(Bundle.open(copy), changed, batches)
        assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


# --- example programs --------------------------------------------------------------------------

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

"""van-deploy predict (how images are read: tests/data), and graphs with preprocessing inside."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from tests.artifacts import Copy
from tests.conftest import Cli
from tests.each import each
from tests.serve.conftest import top5_of
from van_deploy.bundle import Bundle
from van_deploy.config import ExportSettings
from van_deploy.errors import GateFailed, ImageError
from van_deploy.graph.embed import TOP_PROBABILITIES, embed_preprocessing
from van_deploy.model.embedded import write_digits_folder
from van_deploy.serve import embedded
from van_deploy.serve.embedded import embed_artifacts
from van_deploy.serve.predict import find_sources

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)


@each("artifact", ["fp32", "fp32-uint8", "pytorch"])
def test_a_folder_and_what_cannot_be_read(
    digits: Bundle, tmp_path: Path, cli: Cli, artifact: str
) -> None:
    folder = write_digits_folder(tmp_path / "digits", "heldout", limit=11)
    words = ("--artifact", artifact, "--batch", "4", "--top-k", "2")
    result = cli("predict", digits.path, folder, *words, "--json")
    assert result.exit_code == 0
    predictions = json.loads(result.stdout)["predictions"]
    assert len(predictions) == 11
    right = sum(p["top"][0]["name"] == Path(p["source"]).parent.name for p in predictions)
    assert right >= 10  # the network is right on 97 of 100
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


def test_standard_input(digits: Bundle, original: Path) -> None:
    command = [sys.executable, "-m", "van_deploy", "predict", str(digits.path), "-", "--json"]
    done = subprocess.run(command, input=original.read_bytes(), capture_output=True, check=True)
    top = json.loads(done.stdout)["predictions"][0]["top"]
    assert [c["index"] for c in top] == [c.index for c in top5_of(digits)]
    empty = subprocess.run(command, input=b"", capture_output=True, check=False)
    assert empty.returncode == 5
    assert b"Standard input is empty." in empty.stderr


def test_what_is_not_possible(digits: Bundle, original: Path, cli: Cli) -> None:
    with pytest.raises(ImageError, match=r"There is no image 'nowhere\.jpg'"):
        find_sources(["nowhere.jpg"])
    for code, *words in (
        (2, original, "--batch", "9"),
        (2, original, "--top-k", "0"),
        (2, original, "--json", "--jsonl"),
        (2, "-", "-"),
        (5, original, "--artifact", "fp8"),
    ):
        assert cli("predict", digits.path, *map(str, words)).exit_code == code
    table = cli("predict", digits.path, original, "--top-k", "99")
    assert table.exit_code == 0
    assert "95.7%" in table.stdout


def test_an_embedded_graph_is_the_same_network_or_nothing_is_written(
    digits: Bundle, copy_bundle: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, batches = copy_bundle(digits), [PIXELS[:size] for size in (1, 2, 3)]
    asked = ExportSettings(
        embed_preprocess="normalize", outputs=("logits", "probabilities", "top5")
    )
    (made,) = embed_artifacts(Bundle.open(copy), asked, batches)
    assert (made.name, made.base, made.reused) == ("fp32-normalize", "fp32", False)
    assert made.agreement is not None
    assert [row["batch"] for row in made.agreement["batches"]] == [1, 2, 3]
    assert max(row["difference"] for row in made.agreement["batches"]) < 1e-6
    (again,) = embed_artifacts(Bundle.open(copy), asked, batches)
    assert again.reused

    def other_mean(model: Any, preprocessing: Any, *more: Any) -> Any:
        mean = tuple(value + 0.01 for value in preprocessing.mean)
        return embed_preprocessing(model, replace(preprocessing, mean=mean), *more)

    def not_a_number(*given: Any) -> Any:
        """Return the right graph, but for its last output."""
        model = embed_preprocessing(*given)
        node = next(n for n in model.graph.node if TOP_PROBABILITIES in n.output)
        node.output[list(node.output).index(TOP_PROBABILITIES)] = "right"
        model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
        model.graph.node.append(helper.make_node("Div", ["zero", "zero"], ["nan"]))
        model.graph.node.append(helper.make_node("Mul", ["right", "nan"], [TOP_PROBABILITIES]))
        return model

    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for wrong in (other_mean, not_a_number):
        monkeypatch.setattr(embedded, "embed_preprocessing", wrong)
        with pytest.raises(GateFailed, match=r"At batch 1 'model\.normalize"):
            embed_artifacts(
                Bundle.open(copy), asked.with_changes(outputs=("logits", "top5")), batches
            )
        assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before

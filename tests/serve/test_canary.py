"""The canary: kept at export, reproduced by every artefact, and it dies when it should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Cli
from tests.each import each
from van_deploy.bundle import Bundle
from van_deploy.checks.canary import check_canary
from van_deploy.errors import BundleError, UsageError
from van_deploy.serve.embedded import embed_artefacts, plain_graphs


@pytest.fixture
def copy(digits: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits.path, tmp_path / "copy"))


def rewritten(path: Path, **changes: object) -> Bundle:
    """Return the bundle with entries of its preprocessing changed by hand."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["preprocessing"].update(changes)
    file.write_text(json.dumps(manifest))
    return Bundle.open(path)


@each("artefact", ["fp32", "fp32-uint8", "pytorch"])
def test_every_artefact_reproduces_it(digits: Bundle, artefact: str) -> None:
    report = check_canary(digits, artefact)
    assert report.passed
    assert report.max_change < 1e-5
    assert [c for c, _ in report.found] == [c for c, _ in report.expected]


@each(
    "changes", [{"mean": [0.5] * 3}, {"std": [0.2] * 3}, {"interpolation": "nearest"}], fresh="copy"
)
def test_wrong_preprocessing_kills_it(copy: Path, changes: dict[str, object]) -> None:
    report = check_canary(rewritten(copy, **changes), "fp32")
    assert not report
    assert "where PyTorch's has" in report.failures[0]


def test_another_picture_is_refused(copy: Path) -> None:
    Image.new("RGB", (8, 8)).save(copy / "canary.png")
    with pytest.raises(BundleError, match="missing or was changed"):
        check_canary(Bundle.open(copy))


def test_a_bundle_without_one_says_so(copy: Path) -> None:
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["canary"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="has no canary"):
        check_canary(Bundle.open(copy))


def test_embedding_again_changes_nothing(digits: Bundle, copy: Path) -> None:
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    bundle = Bundle.open(copy)
    assert plain_graphs(bundle) == ["fp32"]
    outputs = ("logits", "probabilities", "top5")
    (again,) = embed_artefacts(bundle, pixels, "uint8", outputs)
    assert again.reused
    (other,) = embed_artefacts(bundle, pixels, "uint8", ("top5",))
    assert not other.reused
    assert other.agreement is not None
    assert [row["batch"] for row in other.agreement["batches"]] == [1, 2, 3]
    assert Bundle.open(copy).artefact("fp32").sha256 == digits.artefact("fp32").sha256
    with pytest.raises(UsageError, match="There is nothing to embed"):
        embed_artefacts(bundle, pixels, "none")


def test_verify_asks_it(digits: Bundle, copy: Path, cli: Cli) -> None:
    good = cli("verify", copy, "--no-modules", "--json")
    assert good.exit_code == 0, good.stderr
    artefacts = json.loads(good.stdout)["artefacts"]
    assert all(entry["canary"] < 1e-5 for entry in artefacts.values())
    file = copy / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["canary"]["top5"][0]["probability"] = 0.5
    file.write_text(json.dumps(manifest))
    bad = cli("verify", copy, "--no-modules", "--json")
    assert bad.exit_code == 1
    failures = json.loads(bad.stdout)["artefacts"]["fp32"]["failures"]
    assert failures == [
        "the canary 'canary.png': class 2 has probability 0.9572 where PyTorch's has 0.5000"
    ]

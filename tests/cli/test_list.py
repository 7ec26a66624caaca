"""``van-deploy list``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cli
from van_deploy.model.variants import VARIANTS


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("empty_cache")
def test_every_variant_and_the_embedded_network_are_listed(cli: Cli) -> None:
    listed = {item["name"]: item for item in json.loads(cli("list", "--json").stdout)}
    assert list(listed) == [*VARIANTS, "van_digits"]
    assert listed["van_b0"] == {
        "name": "van_b0",
        "parameters": 4105800,
        "multiply_adds": VARIANTS["van_b0"].config.mac_count(224),
        "image_size": 224,
        "top1_percent": 75.4,
        "top1_on": "ImageNet-1K validation",
        "weights": "Visual-Attention-Network/VAN-Tiny-original:van_tiny_754.pth.tar",
        "note": "",
        "here": None,
    }
    assert listed["van_b4"]["weights"] is None
    assert "mmpretrain" in listed["van_b4"]["note"]
    assert Path(listed["van_digits"]["here"]).is_file()


@pytest.mark.usefixtures("empty_cache")
def test_the_table_fits_100_columns_and_says_everything(cli: Cli) -> None:
    result = cli("list")
    lines = result.stdout.splitlines()
    assert (result.exit_code, result.stderr) == (0, "")
    assert max(map(len, lines)) <= 100
    van_b1 = next(line for line in lines if line.startswith("van_b1"))
    assert van_b1 == (
        "van_b1       13.9 M      2.5 G  224     81.1  -     "
        "VAN-Small-original:van_small_811.pth.tar"
    )
    van_digits = next(line for line in lines if line.startswith("van_digits"))
    assert van_digits.endswith("  YES   in this package")
    assert "for commercial use, please contact" in result.stdout

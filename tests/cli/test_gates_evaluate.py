"""The command ``evaluate``: gates, layouts of labels, tasks, and Ray."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from tests.artifacts import Copy, Subject
from tests.checks import faults
from tests.checks.conftest import overwrite_artifact, tiny_bundle
from tests.cli.test_gates import ALLOW, fail, run_json
from tests.conftest import Cli
from van_deploy.bundle import Bundle
from van_deploy.data.images import image_set
from van_deploy.data.samples import verification_images

SYNSETS = ("n01440764", "n01443537", "n02123045", "n04254680")
CLASSES = (0, 1, 281, 805)


def evaluate(cli: Cli, *words: str | Path) -> dict[str, Any]:
    """Return the document of an evaluation that passes."""
    return run_json(cli, "evaluate", *words, *ALLOW)


@pytest.fixture
def path(digits: Subject, copy_bundle: Copy) -> Path:
    """Return a copy of the digits' bundle."""
    return copy_bundle(digits)


def test_unreadable_images_are_reported(
    cli: Cli, digits: Subject, path: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(digits.labelled, tmp_path / "images"))
    (images / "3" / "empty.png").touch()
    good = next((images / "5").glob("*.png"))
    (images / "5" / "torn.png").write_bytes(good.read_bytes()[:60])
    report = evaluate(cli, path, "--images", images, "--batch", "16")
    assert report["count"] == 60
    assert "class folders by class name" in report["images"]
    assert [Path(name).name for name, _ in report["unreadable"]] == ["empty.png", "torn.png"]
    assert all(reason for _, reason in report["unreadable"])
    assert list(report["accuracy"]) == ["pytorch", "fp32", "fp16", "int8"]
    top1 = [report["accuracy"][name]["top1"] for name in ("pytorch", "fp32")]
    assert top1[0] == top1[1] > 0.9
    assert Bundle.open(path).manifest.checks["evaluate"]["count"] == 60
    table = cli("evaluate", path, "--images", images).stdout
    assert "2 image(s) could not be read and were left out." in table
    assert "torn.png" in "".join(table.split())
    (tmp_path / "torn" / "5").mkdir(parents=True)
    shutil.copy(images / "5" / "torn.png", tmp_path / "torn" / "5")
    output = fail(cli, "evaluate", path, "--images", tmp_path / "torn", code=5)
    assert "None of the 1 images could be read" in output


@pytest.mark.parametrize("images", [5, 50])
def test_negated_logits_fail(cli: Cli, digits: Subject, path: Path, images: int) -> None:
    """Top-1 falls from 80 % to 0 %, on five images too."""
    for name in ("fp16", "int8"):
        overwrite_artifact(Bundle.open(path), name, faults.negate_logits(digits.graph(name)))
    words = ("--images", digits.labelled, "--limit", str(images), *ALLOW)
    losses = run_json(cli, "evaluate", path, *words, code=1)["losses"]
    outcomes = {name: loss["outcome"] for name, loss in losses.items()}
    assert outcomes == {"fp32": "pass", "fp16": "fail", "int8": "fail"}


def test_too_few_images_are_inconclusive(
    cli: Cli, digits: Subject, path: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    words = ("evaluate", path, "--images", digits.labelled, "--artifact", "int8")
    output = fail(cli, *words)
    message = "The data cannot decide: 'int8'; --allow-inconclusive accepts that."
    assert f"error: {message}" in output
    assert "INCONCLUSIVE int8: -6.02 to +6.02 pp of top-1 lost on 60 images" in output
    assert "about 381 images would decide at this rate of label flips" in output
    assert cli(*words, *ALLOW).exit_code == 0
    recipe.write_text("[gates.int8]\ntop1_loss = 7.0\n")
    (finding,) = run_json(cli, *words, "--recipe", recipe)["losses"]["int8"]["findings"]
    assert finding["limit"] == {"value": 7.0, "origin": "recipe [gates.int8]"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_gives_the_same_result(cli: Cli, digits: Subject, path: Path, ray: Any) -> None:
    words = ("--images", digits.labelled, "--batch", "8", "--artifact", "int8")
    here, there = evaluate(cli, path, *words), evaluate(cli, path, *words, "--on", "ray")
    for key in ("count", "unreadable", "accuracy", "losses", "dataset_sha256", "passed"):
        assert there[key] == here[key]


@pytest.fixture
def ray() -> Iterator[Any]:
    """Start Ray on this machine."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed (pip install 'van-deploy[ray]')")
    import ray

    quiet: dict[str, Any] = dict.fromkeys(
        ("include_dashboard", "log_to_driver", "configure_logging"), False
    )
    ray.init(num_cpus=2, object_store_memory=100 << 20, **quiet)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def samples() -> list[Image.Image]:
    """Return three images for each of four classes."""
    values = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), np.uint8)
    return [Image.fromarray(sample) for sample in values]


def test_all_imagenet_layouts_give_the_same_result(
    cli: Cli, samples: list[Image.Image], tmp_path: Path
) -> None:
    thousand = tiny_bundle(tmp_path, 1000)
    official, kaggle = tmp_path / "official" / "val", tmp_path / "kaggle" / "val"
    kit, csv = [], ["ImageId,PredictionString"]
    for number, sample in enumerate(samples):
        place, name = number % 4, f"ILSVRC2012_val_{number + 1:08d}"
        wnid = tmp_path / "wnid" / SYNSETS[place] / f"{number:02d}.png"
        index = tmp_path / "index" / str(CLASSES[place]) / f"{number:02d}.png"
        for file in (wnid, index, official / f"{name}.png", kaggle / f"{name}.png"):
            file.parent.mkdir(parents=True, exist_ok=True)
            sample.save(file)
        kit.append(str(3 - place + 1))
        csv.append(f"{name},{SYNSETS[place]} 1 2 30 40")
    truth = tmp_path / "official" / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("\n".join(kit))
    (tmp_path / "kaggle" / "LOC_val_solution.csv").write_text("\n".join(csv))
    layouts: dict[str, tuple[Path | str, ...]] = {
        "class folders by WordNet id": (tmp_path / "wnid",),
        "in the requested order (index)": (tmp_path / "index", "--class-order", "index"),
        "LOC_val_solution.csv": (kaggle,),
    }
    results = []
    for description, words in layouts.items():
        report = evaluate(cli, thousand, "--images", *words)
        assert description in report["images"]
        accuracy = report["accuracy"]
        results.append((report["count"], accuracy["pytorch"]["ece"], accuracy["fp32"]["top5"]))
    assert results == [pytest.approx(results[0], rel=1e-9)] * 3
    assert results[0][0] == 12
    output = fail(cli, "evaluate", thousand, "--images", official, code=5)
    assert "are the development kit's ids" in output


@pytest.fixture
def images(samples: list[Image.Image], tmp_path: Path) -> Path:
    """Return a folder of images without labels."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, sample in enumerate(samples):
        sample.save(folder / f"{number:02d}.png")
    return folder


def label_words(bundle: Path, images: Path, line: Any) -> tuple[str | Path, ...]:
    """Write a labels file from PyTorch's decisions, and return the command's arguments."""
    from van_deploy.runners.network import original_network

    loaded = original_network(Bundle.open(bundle))
    inputs = verification_images("", loaded.preprocessing, 12, image_set(images)).inputs
    with torch.inference_mode():
        decisions = (loaded.model(torch.from_numpy(inputs)).numpy() >= 0).astype(int)
    file = images.parent / "labels.txt"
    file.write_text("\n".join(f"{n:02d}.png{line(n, row)}" for n, row in enumerate(decisions)))
    return (bundle, "--images", images, "--labels", file)


def test_binary_network(cli: Cli, images: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, 1)
    # Three labels of twelve differ from the network's decisions.
    words = label_words(bundle, images, lambda n, row: f" {1 - row[0] if n < 3 else row[0]}")
    report = evaluate(cli, *words)
    assert report["task"] == "binary"
    assert {a["top1"] for a in report["accuracy"].values()} == {0.75}
    assert report["accuracy"]["fp32"]["top5"] is None
    negated = faults.negate_logits(onnx.load(bundle / "model.onnx"))
    overwrite_artifact(Bundle.open(bundle), "fp32", negated)
    broken = run_json(cli, "evaluate", *words, code=1)
    assert broken["accuracy"]["fp32"]["top1"] == 0.25
    assert broken["losses"]["fp32"]["flips"] == 12


def test_multi_label_network(cli: Cli, images: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, 4, "multi_label_classification")
    words = label_words(
        bundle, images, lambda n, row: f"\t{','.join(map(str, np.flatnonzero(row)))}"
    )
    report = evaluate(cli, *words)
    assert report["task"] == "multi-label"
    accuracy = report["accuracy"]["fp32"]
    assert (accuracy["metric"], accuracy["top1"]) == ("F1 (micro)", 1.0)
    assert (accuracy["top5"], accuracy["ece"]) == (None, None)
    zeroed = faults.zero_logits(onnx.load(bundle / "model.onnx"))
    overwrite_artifact(Bundle.open(bundle), "fp32", zeroed)
    output = fail(cli, "evaluate", *words)
    assert "error: Failed: 'fp32'." in output
    assert "F1 (micro) %" in output
    assert "top-1" not in output
    assert "Give --labels FILE with a line" in fail(cli, "evaluate", *words[:3], code=5)

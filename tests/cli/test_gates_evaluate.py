"""``van-deploy evaluate``: what passes, every way to say what an image is, and Ray."""

from __future__ import annotations

import importlib.util
import json
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
from tests.checks.conftest import overwritten, tiny_bundle
from tests.cli.test_gates import words_of
from tests.conftest import Cli
from van_deploy.bundle import Bundle
from van_deploy.data.images import image_set
from van_deploy.data.samples import verification_images

SYNSETS = ("n01440764", "n01443537", "n02123045", "n04254680")
CLASSES = (0, 1, 281, 805)


def evaluated(cli: Cli, *words: str | Path) -> dict[str, Any]:
    """Return the document of an evaluation that passed."""
    result = cli("evaluate", *words, "--json", "--allow-inconclusive")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def path(digits: Subject, copy_bundle: Copy) -> Path:
    """Return a copy of the digits' bundle."""
    return copy_bundle(digits)


def test_corrupt_images_are_left_out(cli: Cli, digits: Subject, path: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(digits.labelled, tmp_path / "images"))
    (images / "3" / "empty.png").touch()
    good = next((images / "5").glob("*.png"))
    (images / "5" / "torn.png").write_bytes(good.read_bytes()[:60])
    found = evaluated(cli, path, "--images", images, "--batch", "16")
    assert found["count"] == 60
    assert "class folders by class name" in found["images"]
    assert [Path(name).name for name, _ in found["unreadable"]] == ["empty.png", "torn.png"]
    assert all(reason for _, reason in found["unreadable"])
    assert list(found["accuracy"]) == ["pytorch", "fp32", "fp16", "int8"]
    top1 = [found["accuracy"][name]["top1"] for name in ("pytorch", "fp32")]
    assert top1[0] == top1[1] > 0.9
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["checks"]["evaluate"]["count"] == 60
    table = cli("evaluate", path, "--images", images)
    assert "2 image(s) could not be read and were left out." in table.stdout
    assert "torn.png" in "".join(table.stdout.split())
    (tmp_path / "torn" / "5").mkdir(parents=True)
    shutil.copy(images / "5" / "torn.png", tmp_path / "torn" / "5")
    refused = cli("evaluate", path, "--images", tmp_path / "torn")
    assert refused.exit_code == 5
    assert "None of the 1 images could be read" in refused.stderr


@pytest.mark.parametrize("images", [5, 50])
def test_negated_logits_never_pass(cli: Cli, digits: Subject, path: Path, images: int) -> None:
    """Top-1 from 80 % to 0 % on five images was a PASS, exit 0."""
    for name in ("fp16", "int8"):
        overwritten(Bundle.open(path), name, faults.negated(digits.graph(name)))
    words = ("--images", digits.labelled, "--limit", str(images), "--json")
    result = cli("evaluate", path, *words, "--allow-inconclusive")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-2] == "error: Failed: 'fp16', 'int8'."
    losses = json.loads(result.stdout)["losses"]
    outcomes = {name: loss["outcome"] for name, loss in losses.items()}
    assert outcomes == {"fp32": "pass", "fp16": "fail", "int8": "fail"}


def test_too_few_images_are_inconclusive(
    cli: Cli, digits: Subject, path: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    words = ("--images", digits.labelled, "--artifact", "int8")
    result = cli("evaluate", path, *words)
    assert result.exit_code == 1
    assert (
        "error: The data cannot decide: 'int8'; --allow-inconclusive would let that pass."
        in words_of(result.stderr)
    )
    text = words_of(result.stdout)
    assert "INCONCLUSIVE int8: -6.02 to +6.02 pp of top-1 lost on 60 images" in text
    assert "about 381 images would decide at this rate of label flips" in text
    assert cli("evaluate", path, *words, "--allow-inconclusive").exit_code == 0
    recipe.write_text("[gates.int8]\ntop1_loss = 7.0\n")
    named = cli("evaluate", path, *words, "--recipe", recipe, "--json")
    assert named.exit_code == 0
    (finding,) = json.loads(named.stdout)["losses"]["int8"]["findings"]
    assert finding["limit"] == {"value": 7.0, "origin": "recipe [gates.int8]"}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--batch", "0"), 2, "'--batch' is 0: it should be greater than or equal to 1."),
        (("--labels", "/nowhere.txt"), 5, "The labels '/nowhere.txt' cannot be read"),
    ],
)
def test_mistakes(
    cli: Cli, digits: Subject, words: tuple[str, ...], code: int, message: str
) -> None:
    result = cli("evaluate", digits.bundle.path, "--images", digits.labelled, *words)
    assert result.exit_code == code
    assert message in result.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_gives_one_machines_figures(cli: Cli, digits: Subject, path: Path, ray: Any) -> None:
    words = ("--images", digits.labelled, "--batch", "8", "--artifact", "int8")
    here, there = evaluated(cli, path, *words), evaluated(cli, path, *words, "--on", "ray")
    for key in ("count", "unreadable", "accuracy", "losses", "dataset_sha256", "passed"):
        assert there[key] == here[key]


@pytest.fixture
def ray() -> Iterator[Any]:
    """Return Ray with a cluster of this machine alone."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed (pip install 'van-deploy[ray]')")
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
        configure_logging=False,
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Return three pictures for each of four classes."""
    values = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), np.uint8)
    return [Image.fromarray(picture) for picture in values]


def test_imagenets_layouts_all_give_the_same_figures(
    cli: Cli, pictures: list[Image.Image], tmp_path: Path
) -> None:
    thousand = tiny_bundle(tmp_path, 1000)
    official, kaggle = tmp_path / "official" / "val", tmp_path / "kaggle" / "val"
    kit, csv = [], ["ImageId,PredictionString"]
    for number, picture in enumerate(pictures):
        place, name = number % 4, f"ILSVRC2012_val_{number + 1:08d}"
        wnid = tmp_path / "wnid" / SYNSETS[place] / f"{number:02d}.png"
        index = tmp_path / "index" / str(CLASSES[place]) / f"{number:02d}.png"
        for file in (wnid, index, official / f"{name}.png", kaggle / f"{name}.png"):
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
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
    figures = []
    for described, words in layouts.items():
        found = evaluated(cli, thousand, "--images", *words)
        assert described in found["images"]
        accuracy = found["accuracy"]
        figures.append((found["count"], accuracy["pytorch"]["ece"], accuracy["fp32"]["top5"]))
    assert figures == [pytest.approx(figures[0], rel=1e-9)] * 3
    assert figures[0][0] == 12
    refused = cli("evaluate", thousand, "--images", official)
    assert refused.exit_code == 5
    assert "are the development kit's ids" in refused.stderr


@pytest.fixture
def images(pictures: list[Image.Image], tmp_path: Path) -> Path:
    """Return a folder of pictures without labels."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:02d}.png")
    return folder


def labels_of(bundle: Path, images: Path, line: Any) -> tuple[str | Path, ...]:
    """Return a command's words, with a labels file of what PyTorch decides of each image."""
    from van_deploy.runners.network import original_network

    loaded = original_network(Bundle.open(bundle))
    inputs = verification_images("", loaded.preprocessing, 12, image_set(images)).inputs
    with torch.inference_mode():
        decided = (loaded.model(torch.from_numpy(inputs)).numpy() >= 0).astype(int)
    file = images.parent / "labels.txt"
    file.write_text("\n".join(f"{n:02d}.png{line(n, row)}" for n, row in enumerate(decided)))
    return (bundle, "--images", images, "--labels", file)


"""One logit and many labels: no argmax, no softmax, and no metric without a meaning."""


def test_one_logit_is_decided_at_one_half(cli: Cli, images: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, 1)
    # Three labels of twelve are not what the network says.
    words = labels_of(bundle, images, lambda n, row: f" {1 - row[0] if n < 3 else row[0]}")
    found = evaluated(cli, *words)
    assert found["task"] == "binary"
    assert {a["top1"] for a in found["accuracy"].values()} == {0.75}
    assert found["accuracy"]["fp32"]["top5"] is None
    negated = faults.negated(onnx.load(bundle / "model.onnx"))
    overwritten(Bundle.open(bundle), "fp32", negated)
    result = cli("evaluate", *words, "--json")
    assert result.exit_code == 1
    broken = json.loads(result.stdout)
    assert broken["accuracy"]["fp32"]["top1"] == 0.25
    assert broken["losses"]["fp32"]["flips"] == 12


def test_many_labels_are_judged_by_f1(cli: Cli, images: Path, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path, 4, "multi_label_classification")
    words = labels_of(bundle, images, lambda n, row: f"\t{','.join(map(str, np.flatnonzero(row)))}")
    found = evaluated(cli, *words)
    assert found["task"] == "multi-label"
    accuracy = found["accuracy"]["fp32"]
    assert (accuracy["metric"], accuracy["top1"]) == ("F1 (micro)", 1.0)
    assert (accuracy["top5"], accuracy["ece"]) == (None, None)
    zeroed = faults.zeroed(onnx.load(bundle / "model.onnx"))
    overwritten(Bundle.open(bundle), "fp32", zeroed)
    broken = cli("evaluate", *words)
    assert broken.exit_code == 1
    assert "error: Failed: 'fp32'." in broken.stderr
    assert "F1 (micro) %" in broken.stdout
    assert "top-1" not in broken.stdout
    missing = cli("evaluate", *words[:3])
    assert missing.exit_code == 5
    assert "Give --labels FILE with a line for each image" in missing.stderr

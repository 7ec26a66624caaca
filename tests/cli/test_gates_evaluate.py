"""The command ``evaluate``: gates, unreadable images, tasks, and Ray."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tests.artifacts import Subject
from tests.checks import faults
from tests.checks.conftest import spoil, tiny_bundle
from tests.cli.conftest import ALLOW
from tests.conftest import Cli
from tests.json_documents import edited
from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.checks.golden import samples_for
from van_deploy.runners.network import original_network

Labels = Callable[[int, npt.NDArray[np.int64]], str]


def test_unreadable_images_are_reported(
    cli: Cli, digits: Subject, path: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(digits.labelled, tmp_path / "images"))
    good = next((images / "5").glob("*.png"))
    for folder in (images, tmp_path / "torn"):
        (folder / "5").mkdir(parents=True, exist_ok=True)
        (folder / "5" / "torn.png").write_bytes(good.read_bytes()[:60])
    report = cli.document("evaluate", path, "--images", images, "--class-order", "index", ALLOW)
    assert report["count"] == 60
    assert "in the requested order (index)" in report["images"]
    ((name, reason),) = report["unreadable"]
    assert (Path(name).name, bool(reason)) == ("torn.png", True)
    assert list(report["accuracy"]) == ["pytorch", "fp32", "fp16", "int8"]
    assert report["accuracy"]["pytorch"]["top1"] == report["accuracy"]["fp32"]["top1"] > 0.9
    assert Bundle.open(path).manifest.checks["evaluate"]["count"] == 60
    output = cli.passes("evaluate", path, "--images", images, "--artifact", "fp32")
    assert "1 image(s) could not be read and were left out." in output
    assert "torn.png" in "".join(output.split())
    output = cli.fails(5, "evaluate", path, "--images", tmp_path / "torn")
    assert "None of the 1 images could be read" in output


@pytest.mark.parametrize("images", [5, 50])
def test_negated_logits_fail(cli: Cli, digits: Subject, path: Path, images: int) -> None:
    """Top-1 falls from 80 % to 0 %, on five images too."""
    for name in ("fp16", "int8"):
        spoil(path, name, faults.negate_logits)
    words = ("--images", digits.labelled, "--limit", str(images), ALLOW)
    losses = cli.document("evaluate", path, *words, code=1)["losses"]
    outcomes = {name: loss["outcome"] for name, loss in losses.items()}
    assert outcomes == {"fp32": "pass", "fp16": "fail", "int8": "fail"}


def test_too_few_images_are_inconclusive(
    cli: Cli, digits: Subject, path: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[gates.int8]\ntop1_loss = 7.0\n")
    words = ("evaluate", path, "--images", digits.labelled, "--artifact", "int8")
    output = cli.fails(1, *words)
    message = "The data cannot decide: 'int8'; --allow-inconclusive accepts that."
    assert f"error: {message}" in output
    assert "INCONCLUSIVE int8: -6.02 to +6.02 pp of top-1 lost on 60 images" in output
    assert "about 381 images would decide at this rate of label flips" in output
    cli.passes(*words, ALLOW)
    (finding,) = cli.document(*words, "--recipe", recipe)["losses"]["int8"]["findings"]
    assert finding["limit"] == {"value": 7.0, "origin": "recipe [gates.int8]"}


def test_artifacts_without_logits_are_skipped(cli: Cli, digits: Subject, path: Path) -> None:
    with edited(path / MANIFEST) as manifest:
        outputs = manifest["artifacts"]["fp16"]["graph"]["outputs"]
        outputs["probabilities"] = outputs.pop("logits")
    words = ("--images", digits.labelled, "--artifact", "fp16", "--artifact", "fp32")
    output = cli.fails(1, "evaluate", path, *words)
    assert "'fp16' was not checked (it has no logits); --allow-skip accuracy" in output
    cli.passes("evaluate", path, *words, "--allow-skip", "accuracy")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_gives_the_same_result(cli: Cli, digits: Subject, path: Path) -> None:
    ray: Any = pytest.importorskip("ray", reason="ray is not installed")
    quiet = dict.fromkeys(("include_dashboard", "log_to_driver", "configure_logging"), False)
    words = ("evaluate", path, "--images", digits.labelled, "--batch", "8", "--artifact", "int8")
    here = cli.document(*words, ALLOW)
    ray.init(num_cpus=2, object_store_memory=100 << 20, **quiet)
    try:
        there = cli.document(*words, ALLOW, "--on", "ray")
        spoil(path, "int8", faults.negate_logits)
        changed = cli.document(*words, ALLOW, "--on", "ray", code=1)
    finally:
        ray.shutdown()
    assert changed["losses"]["int8"]["outcome"] == "fail"  # not the networks of the first run
    for key in ("count", "unreadable", "accuracy", "losses", "dataset_sha256", "passed"):
        assert there[key] == here[key]


def write_labels(folder: Path, classes: int, problem: str, labels: Labels) -> tuple[Any, ...]:
    """Write a network, twelve images and their labels; return the command on them.

    ``labels`` receives the number of an image and the network's decisions on it.
    """
    images, path = folder / "images", tiny_bundle(folder, classes, problem)
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), np.uint8)
    for number, values in enumerate(pixels):
        Image.fromarray(values).save(images / f"{number:02d}.png")
    bundle = Bundle.open(path)
    samples = samples_for(bundle, original_network(bundle), images, 12)
    decisions = (samples.logits >= 0).astype(int)
    named = zip(samples.names, decisions, strict=True)
    lines = [f"{name}\t{labels(number, row)}" for number, (name, row) in enumerate(named)]
    (folder / "labels.txt").write_text("\n".join(lines))
    return ("evaluate", path, "--images", images, "--labels", folder / "labels.txt")


def test_binary_network(cli: Cli, tmp_path: Path) -> None:
    # Three labels of twelve differ from the network's decisions.
    words = write_labels(tmp_path, 1, "", lambda n, row: str(1 - row[0] if n < 3 else row[0]))
    report = cli.document(*words, ALLOW)
    assert report["task"] == "binary"
    assert {a["top1"] for a in report["accuracy"].values()} == {0.75}
    assert report["accuracy"]["fp32"]["top5"] is None
    spoil(words[1], "fp32", faults.negate_logits)
    broken = cli.document(*words, code=1)
    assert broken["accuracy"]["fp32"]["top1"] == 0.25
    assert broken["losses"]["fp32"]["flips"] == 12


def test_multi_label_network(cli: Cli, tmp_path: Path) -> None:
    problem = "multi_label_classification"
    words = write_labels(tmp_path, 4, problem, lambda n, row: ",".join(map(str, row.nonzero()[0])))
    report = cli.document(*words, ALLOW)
    accuracy = report["accuracy"]["fp32"]
    assert (report["task"], accuracy["metric"]) == ("multi-label", "F1 (micro)")
    assert (accuracy["top1"], accuracy["top5"], accuracy["ece"]) == (1.0, None, None)
    spoil(words[1], "fp32", faults.zero_logits)
    output = cli.fails(1, *words)
    assert "error: Failed: 'fp32'." in output
    assert "F1 (micro) %" in output
    assert "top-1" not in output
    assert "Give --labels FILE with a line" in cli.fails(5, *words[:4])

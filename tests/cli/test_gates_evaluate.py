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
from onnx import ModelProto
from PIL import Image

from tests.artifacts import Copy, Subject
from tests.checks import faults
from tests.checks.conftest import overwritten
from tests.cli.test_gates import document
from tests.conftest import Cli
from van_deploy.bundle import Bundle
from van_deploy.data import check_images
from van_deploy.model.random_weights import random_van
from van_deploy.model.variants import VanConfig

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SYNSETS = ("n01440764", "n01443537", "n02123045", "n04254680")  # classes 0, 1, 281, 805
CLASSES = (0, 1, 281, 805)


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """Return what must not depend on how an evaluation was run."""
    kept = ("count", "unreadable", "accuracy", "losses", "dataset_sha256", "passed")
    return {key: found[key] for key in kept}


def evaluated(cli: Cli, *words: str | Path) -> dict[str, Any]:
    """Return the document of an evaluation that passed."""
    result = cli("evaluate", *words, "--json", "--allow-inconclusive")
    assert result.exit_code == 0, result.stderr
    return document(result.stdout, "evaluate")


class TestTheDigits:
    def test_folders_by_index_and_it_is_kept(
        self, cli: Cli, judged: Subject, copy_of: Copy
    ) -> None:
        path = copy_of(judged)
        found = evaluated(cli, path, "--images", judged.labelled, "--batch", "16")
        assert found["count"] == 60
        assert "class folders by class name" in found["images"]
        assert list(found["accuracy"]) == ["pytorch", "fp32", "fp16", "int8"]
        assert found["accuracy"]["pytorch"]["top1"] > 0.9
        assert found["accuracy"]["fp32"]["top1"] == found["accuracy"]["pytorch"]["top1"]
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["checks"]["evaluate"]["count"] == 60

    def test_folders_by_name_and_a_labels_file_give_the_same(
        self, cli: Cli, judged: Subject, copy_of: Copy, tmp_path: Path
    ) -> None:
        path = copy_of(judged)
        by_index = evaluated(cli, path, "--images", judged.labelled)
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "class_names": DIGITS}))
        named, flat, lines = tmp_path / "named", tmp_path / "flat", []
        flat.mkdir()
        for file in sorted(judged.labelled.rglob("*.png")):
            label = int(file.parent.name)
            (named / DIGITS[label]).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, named / DIGITS[label])
            shutil.copy(file, flat)
            lines.append(f"{file.name} {DIGITS[label]}")
        labels = tmp_path / "labels.txt"
        labels.write_text("\n".join(lines))
        by_name = evaluated(cli, path, "--images", named)
        assert "class folders by class name" in by_name["images"]
        assert by_name["accuracy"] == by_index["accuracy"]
        by_file = evaluated(cli, path, "--images", flat, "--labels", labels)
        assert f"labels from '{labels}'" in by_file["images"]
        assert by_file["accuracy"] == by_index["accuracy"]

    def test_corrupt_images_are_named_counted_and_left_out(
        self, cli: Cli, judged: Subject, copy_of: Copy, tmp_path: Path
    ) -> None:
        images = tmp_path / "images"
        shutil.copytree(judged.labelled, images)
        (images / "3" / "empty.png").touch()
        good = next((images / "5").glob("*.png"))
        (images / "5" / "torn.png").write_bytes(good.read_bytes()[:60])
        path = copy_of(judged)
        found = evaluated(cli, path, "--images", images)
        assert found["count"] == 60
        names = [Path(name).name for name, _ in found["unreadable"]]
        assert names == ["empty.png", "torn.png"]
        assert all(reason for _, reason in found["unreadable"])
        table = cli("evaluate", path, "--images", images)
        assert "2 images could not be read and were left out." in table.stdout
        assert "torn.png" in "".join(table.stdout.split())

    @pytest.mark.parametrize("images", [5, 50])
    def test_an_artefact_with_its_logits_negated_never_passes(
        self, cli: Cli, judged: Subject, copy_of: Copy, images: int
    ) -> None:
        """Top-1 from 80 % to 0 % on five images was a PASS, exit 0."""
        path = copy_of(judged)
        for name in ("fp16", "int8"):
            overwritten(Bundle.open(path), name, faults.negated(judged.graph(name)))
        words = ("--images", judged.labelled, "--limit", str(images), "--json")
        result = cli("evaluate", path, *words, "--allow-inconclusive")
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-2] == "error: Failed: 'fp16', 'int8'."
        losses = json.loads(result.stdout)["losses"]
        outcomes = {name: loss["outcome"] for name, loss in losses.items()}
        assert outcomes == {"fp32": "pass", "fp16": "fail", "int8": "fail"}

    def test_too_few_images_are_inconclusive_and_say_how_many_would_do(
        self, cli: Cli, judged: Subject, copy_of: Copy
    ) -> None:
        words = ("--images", judged.labelled, "--artefact", "int8")
        path = copy_of(judged)
        result = cli("evaluate", path, *words)
        assert result.exit_code == 1
        assert (
            "error: The data cannot decide: 'int8'; --allow-inconclusive would let that pass."
            in " ".join(result.stderr.split())
        )
        text = " ".join(result.stdout.split())
        assert "INCONCLUSIVE int8: -6.02 to +6.02 pp of top-1 lost on 60 images" in text
        assert "about 381 images would decide at this rate of label flips" in text
        assert cli("evaluate", path, *words, "--allow-inconclusive").exit_code == 0
        assert cli("evaluate", path, *words, "--recipe", "van_digits").exit_code == 1

    def test_an_allowed_loss_of_the_recipe_is_named(
        self, cli: Cli, judged: Subject, copy_of: Copy, tmp_path: Path
    ) -> None:
        recipe = tmp_path / "mine.toml"
        recipe.write_text("[gates.int8]\ntop1_loss = 7.0\n")
        words = ("--images", judged.labelled, "--artefact", "int8", "--recipe", recipe, "--json")
        result = cli("evaluate", copy_of(judged), *words)
        assert result.exit_code == 0
        (finding,) = json.loads(result.stdout)["losses"]["int8"]["findings"]
        assert finding["limit"] == {"value": 7.0, "origin": "recipe [gates.int8]"}

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            (("--batch", "0"), 2, "'--batch' is 0: it should be greater than or equal to 1."),
            (("--labels", "/nowhere.txt"), 5, "The labels '/nowhere.txt' cannot be read"),
        ],
    )
    def test_mistakes(
        self, cli: Cli, judged: Subject, words: tuple[str, ...], code: int, message: str
    ) -> None:
        result = cli("evaluate", judged.bundle.path, "--images", judged.labelled, *words)
        assert result.exit_code == code
        assert message in result.stderr

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # Ray's own
    def test_ray_gives_the_figures_of_one_machine(
        self, cli: Cli, judged: Subject, copy_of: Copy, ray: Any
    ) -> None:
        path = copy_of(judged)
        words = ("--images", judged.labelled, "--batch", "8", "--artefact", "int8")
        here = evaluated(cli, path, *words)
        there = evaluated(cli, path, *words, "--on", "ray")
        assert figures(there) == figures(here)

    @pytest.fixture
    def ray(self) -> Iterator[Any]:
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


def tiny_bundle(folder: Path, classes: int, problem: str = "") -> Path:
    """Return the bundle of a tiny network of random weights, 32 x 32."""
    from van_deploy.config import BatchRange, ModelSettings, PreprocessingSettings, Recipe
    from van_deploy.pipeline import export_bundle, load_for

    config = VanConfig((8, 12, 16, 24), (1, 1, 1, 1), (4, 4, 2, 2), num_classes=classes)
    torch.save(random_van(config, seed=3).state_dict(), folder / "tiny.pth")
    if problem:
        (folder / "config.json").write_text(
            json.dumps({"model_type": "van", "problem_type": problem})
        )
    recipe = Recipe(
        model=ModelSettings(weights=str(folder / "tiny.pth")),
        preprocessing=PreprocessingSettings(image_size=32),
        batch=BatchRange(1, 2, 3),
    )
    export_bundle(load_for(recipe), recipe, folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("thousand"), 1000)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Return three pictures for each of four classes."""
    values = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), np.uint8)
    return [Image.fromarray(picture) for picture in values]


class TestAThousandClasses:
    """ImageNet's ways to say what an image is, with a tiny network of 1000 classes."""

    def test_every_layout_gives_the_same_figures(
        self, cli: Cli, thousand: Path, pictures: list[Image.Image], tmp_path: Path
    ) -> None:
        by_wnid, by_index = tmp_path / "wnid", tmp_path / "index"
        official, kaggle = tmp_path / "official" / "val", tmp_path / "kaggle" / "val"
        for folder in (official, kaggle):
            folder.mkdir(parents=True)
        kit, csv = [], ["ImageId,PredictionString"]
        for number, picture in enumerate(pictures):
            place = number % 4
            for folder in (by_wnid / SYNSETS[place], by_index / str(CLASSES[place])):
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(folder / f"{number:02d}.png")
            name = f"ILSVRC2012_val_{number + 1:08d}"
            for folder in (official, kaggle):
                picture.save(folder / f"{name}.png")
            kit.append(str(3 - place + 1))  # the kit numbers its classes in its own order
            csv.append(f"{name},{SYNSETS[place]} 1 2 30 40")
        truth = tmp_path / "official" / "ILSVRC2012_validation_ground_truth.txt"
        truth.write_text("\n".join(kit))
        (tmp_path / "kit.txt").write_text("\n".join(reversed(SYNSETS)))
        (tmp_path / "kaggle" / "LOC_val_solution.csv").write_text("\n".join(csv))
        documents = {
            "class folders by WordNet id": evaluated(cli, thousand, "--images", by_wnid),
            "in the order asked for (index)": evaluated(
                cli, thousand, "--images", by_index, "--class-order", "index"
            ),
            "ground_truth.txt": evaluated(
                cli, thousand, "--images", official, "--synsets", tmp_path / "kit.txt"
            ),
            "LOC_val_solution.csv": evaluated(cli, thousand, "--images", kaggle),
        }
        for described, found in documents.items():
            assert described in found["images"]
            assert found["count"] == 12
        confidences = [d["accuracy"]["pytorch"]["ece"] for d in documents.values()]
        assert confidences == pytest.approx([confidences[0]] * 4, rel=1e-9)
        accuracies = [d["accuracy"]["fp32"]["top5"] for d in documents.values()]
        assert len(set(accuracies)) == 1

    def test_each_layout_finds_the_labels_themselves(self, tmp_path: Path) -> None:
        from van_deploy.data import labelled_images

        for name in SYNSETS:
            (tmp_path / "folders" / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "folders" / name / "a.png")
            (tmp_path / "files").mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "files" / f"{name}_something.png")
        for folder in ("folders", "files"):
            assert [i.label for i in labelled_images(tmp_path / folder, 1000).items] == list(
                CLASSES
            )

    def test_the_kits_numbers_without_their_meaning_are_refused(
        self, cli: Cli, thousand: Path, pictures: list[Image.Image], tmp_path: Path
    ) -> None:
        (tmp_path / "val").mkdir()
        pictures[0].save(tmp_path / "val" / "a.png")
        (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("490\n")
        result = cli("evaluate", thousand, "--images", tmp_path / "val")
        assert result.exit_code == 5
        assert "Give --synsets FILE with one WordNet id a line" in result.stderr


class TestOtherTasks:
    """One logit and many labels: no argmax, no softmax, and no metric without a meaning."""

    @pytest.fixture
    def images(self, pictures: list[Image.Image], tmp_path: Path) -> Path:
        folder = tmp_path / "images"
        folder.mkdir()
        for number, picture in enumerate(pictures):
            picture.save(folder / f"{number:02d}.png")
        return folder

    @staticmethod
    def decided(bundle: Path, images: Path) -> np.ndarray:
        """Return what PyTorch decides at 0.5 of each image, ``(N, K)`` of 0 and 1."""
        from van_deploy.data import image_set
        from van_deploy.runners.original import original_network

        loaded = original_network(Bundle.open(bundle))
        inputs = check_images("", loaded.preprocessing, 12, image_set(images)).inputs
        with torch.inference_mode():
            return (loaded.model(torch.from_numpy(inputs)).numpy() >= 0).astype(int)

    def test_one_logit_is_decided_at_one_half(self, cli: Cli, images: Path, tmp_path: Path) -> None:
        bundle = tiny_bundle(tmp_path, 1)
        right = self.decided(bundle, images)[:, 0]
        right[:3] = 1 - right[:3]  # three labels of twelve are not what the network says
        labels = tmp_path / "labels.txt"
        labels.write_text("\n".join(f"{n:02d}.png {label}" for n, label in enumerate(right)))
        words = (bundle, "--images", images, "--labels", labels)
        found = evaluated(cli, *words)
        assert found["task"] == "binary"
        assert {a["top1"] for a in found["accuracy"].values()} == {0.75}
        assert found["accuracy"]["fp32"]["top5"] is None
        overwritten(Bundle.open(bundle), "fp32", faults.negated(graph_of(bundle)))
        result = cli("evaluate", *words, "--json")
        assert result.exit_code == 1
        broken = json.loads(result.stdout)
        assert broken["accuracy"]["fp32"]["top1"] == 0.25
        assert broken["losses"]["fp32"]["flips"] == 12

    def test_many_labels_are_judged_by_f1(self, cli: Cli, images: Path, tmp_path: Path) -> None:
        bundle = tiny_bundle(tmp_path, 4, "multi_label_classification")
        sets = self.decided(bundle, images)
        lines = [
            f"{n:02d}.png\t{','.join(map(str, np.flatnonzero(row)))}" for n, row in enumerate(sets)
        ]
        labels = tmp_path / "labels.txt"
        labels.write_text("\n".join(lines))
        words = (bundle, "--images", images, "--labels", labels)
        found = evaluated(cli, *words)
        assert found["task"] == "multi-label"
        accuracy = found["accuracy"]["fp32"]
        assert (accuracy["metric"], accuracy["top1"]) == ("F1 (micro)", 1.0)
        assert (accuracy["top5"], accuracy["ece"]) == (None, None)
        table = cli("evaluate", *words, "--allow-inconclusive").stdout
        assert "F1 (micro) %" in table
        assert "top-1" not in table
        overwritten(Bundle.open(bundle), "fp32", faults.zeroed(graph_of(bundle)))
        broken = cli("evaluate", *words, "--json")
        assert broken.exit_code == 1
        assert json.loads(broken.stdout)["losses"]["fp32"]["outcome"] == "fail"
        missing = cli("evaluate", bundle, "--images", images)
        assert missing.exit_code == 5
        assert "Give --labels FILE." in missing.stderr


def graph_of(bundle: Path) -> ModelProto:
    return onnx.load(bundle / "model.onnx")

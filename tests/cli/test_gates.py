"""``verify``, ``drift`` and ``check`` as a person and a CI server run them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from junitparser import Failure, JUnitXml, Skipped

from supply_chain.json_schemas import schema_of
from tests.artifacts import Copy, Subject, enter_engine
from tests.checks import faults
from tests.checks.conftest import overwritten
from tests.conftest import Cli
from van_deploy.bundle import Bundle

FEW = ("--against", "weights", "--count", "6")
UNDECIDED = "--allow-inconclusive"  # 60 images are too few for INT8


def document(text: str, name: str) -> dict[str, Any]:
    """Return a printed document, held against its schema."""
    found: dict[str, Any] = json.loads(text)
    jsonschema.validate(found, schema_of(name))
    return found


def perturbed_in(path: Path) -> Bundle:
    """Return the bundle with one block of its FP16 graph off by 1 %."""
    import onnx

    bundle = Bundle.open(path)
    model = faults.perturbed(onnx.load(bundle.verified("fp16")), "block3.1")
    return overwritten(bundle, "fp16", model)


class TestVerify:
    def test_right_artefacts_pass_and_it_is_kept(
        self, cli: Cli, judged: Subject, copy_of: Copy
    ) -> None:
        path = copy_of(judged)
        result = cli("verify", path, "--json")
        assert result.exit_code == 0
        found = document(result.stdout, "verify")
        assert found["passed"] is True
        assert list(found["artefacts"]) == ["fp32", "fp16", "int8"]
        assert len(found["names"]) == 16
        assert found["names"][:2] == ["golden/0.png", "golden/1.png"]
        kept = json.loads((path / "manifest.json").read_text())["checks"]["verify"]
        assert kept["passed"] is True
        assert set(kept["artefacts_sha256"]) == {"fp32", "fp16", "int8"}

    def test_the_table_says_where_each_limit_came_from(
        self, cli: Cli, judged: Subject, copy_of: Copy
    ) -> None:
        result = cli("verify", copy_of(judged), "--no-modules")
        assert result.exit_code == 0
        limits = [line.split() for line in result.stdout.splitlines() if line.startswith("LIMIT")]
        assert [words[1] for words in limits] == ["fp32", "fp16", "int8"]
        assert all(words[5] == "dB," and "recorded" in words for words in limits)

    def test_a_broken_artefact_ends_with_1_and_is_named(
        self, cli: Cli, judged: Subject, copy_of: Copy
    ) -> None:
        path = copy_of(judged)
        perturbed_in(path)
        result = cli("verify", path)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-2:] == [
            "error: Failed: 'fp16'.",
            "  See the rows above; `van-deploy drift` names the module.",
        ]
        lines = result.stdout.splitlines()
        assert any(line.startswith("FAIL") and "fp16: SQNR" in line for line in lines)
        assert "block3.1." in result.stdout
        chosen = cli("verify", path, "--artefact", "fp32", "--no-modules", "--json")
        assert chosen.exit_code == 0
        found = document(chosen.stdout, "verify")
        assert list(found["artefacts"]) == ["fp32"]
        assert found["artefacts"]["fp32"]["worst_modules"] == []

    def test_limits_of_a_recipe_apply_and_are_named(
        self, cli: Cli, judged: Subject, copy_of: Copy, tmp_path: Path
    ) -> None:
        recipe = tmp_path / "hard.toml"
        recipe.write_text("[gates.fp16]\nsqnr_db = 120.0\n")
        words = ("--artefact", "fp16", "--no-modules", "--recipe", recipe)
        result = cli("verify", copy_of(judged), *words)
        assert result.exit_code == 1
        assert "dB is below 120.0 dB (recipe [gates.fp16])" in " ".join(result.stdout.split())

    def test_keys_of_before_are_refused(self, cli: Cli, judged: Subject, tmp_path: Path) -> None:
        recipe = tmp_path / "old.toml"
        recipe.write_text("[gates.fp16]\nmargin_db = 3.0\n")
        result = cli("verify", judged.bundle.path, "--recipe", recipe)
        assert result.exit_code == 5
        assert "the key 'gates.fp16.margin_db' is unknown." in result.stderr

    def test_the_users_images_against_the_original_network(
        self, cli: Cli, judged: Subject, copy_of: Copy
    ) -> None:
        path = copy_of(judged)
        refused = cli("verify", path, "--images", judged.labelled)
        assert refused.exit_code == 2
        assert (
            "error: --images is given, and other images than the golden samples can only be "
            "compared with the original network.\n  Add --against weights." in refused.stderr
        )
        words = ("--artefact", "fp32", "--images", judged.labelled, "--json")
        result = cli("verify", path, *FEW, *words)
        assert result.exit_code == 0
        found = document(result.stdout, "verify")
        assert found["against"] == "the original network"
        assert found["modules"] == "PyTorch, the rewritten network in float64"
        assert str(judged.labelled) in found["images"]
        assert len(found["names"]) == 6

    def test_mistakes_end_with_2(self, cli: Cli, judged: Subject) -> None:
        result = cli("verify", judged.bundle.path, "--runner", "onnx")
        assert (result.exit_code, result.stdout) == (2, "")
        message = "'--runner' is 'onnx': it should be 'ort-cpu' or 'ort-cuda'."
        assert f"error: {message}" in result.stderr

    def test_an_artefact_that_is_not_there(self, cli: Cli, judged: Subject) -> None:
        result = cli("verify", judged.bundle.path, "--artefact", "fp8")
        assert result.exit_code == 5
        assert "has no artefact 'fp8'; it has: fp32, fp16, int8." in result.stderr

    def test_a_runner_that_is_not_here_verifies_nothing(
        self, cli: Cli, judged: Subject, copy_of: Copy
    ) -> None:
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime has the provider")
        words = ("--runner", "ort-cuda", "--allow-skip", "runtimes")
        result = cli("verify", copy_of(judged), *words)
        assert result.exit_code == 1
        assert "No artefact could be run on this machine, so nothing was verified." in result.stderr
        assert "no CUDAExecutionProvider in the ONNX Runtime" in " ".join(result.stdout.split())

    def test_an_engine_without_a_gpu_needs_leave(
        self, cli: Cli, judged: Subject, copy_of: Copy
    ) -> None:
        path = copy_of(judged)
        enter_engine(path, "x", made_from="fp16")
        words = ("--artefact", "fp32", "--artefact", "x", "--no-modules")
        refused = cli("verify", path, *words)
        if "x: engine not executed: no GPU" not in refused.stdout:
            pytest.skip("this machine has a GPU")
        assert refused.exit_code == 1
        assert (
            "error: 'x' was not checked (engine not executed: no GPU); --allow-skip engines "
            "would let that pass." in " ".join(refused.stderr.split())
        )
        assert cli("verify", path, *words, "--allow-skip", "runtimes").exit_code == 1
        assert cli("verify", path, *words, "--allow-skip", "engines").exit_code == 0


class TestGoldenSamples:
    def test_without_them_the_remedy_is_said(
        self, cli: Cli, judged: Subject, copy_of: Copy
    ) -> None:
        path = copy_of(judged)
        manifest = path / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "golden": None}))
        result = cli("verify", path)
        assert result.exit_code == 5
        assert result.stderr.splitlines()[-2].endswith("has no golden samples.")
        assert "--against weights" in result.stderr
        assert cli("verify", path, *FEW, "--artefact", "fp32", "--no-modules").exit_code == 0

    def test_an_edited_file_is_refused(self, cli: Cli, judged: Subject, copy_of: Copy) -> None:
        path = copy_of(judged)
        (path / "golden.npz").write_bytes(b"edited")
        result = cli("verify", path)
        assert result.exit_code == 5
        assert "golden.npz' was changed after the manifest was written" in result.stderr


class TestDrift:
    def test_the_perturbed_block_comes_first(
        self, cli: Cli, judged: Subject, copy_of: Copy, tmp_path: Path
    ) -> None:
        path, plot = copy_of(judged), tmp_path / "plots" / "drift.svg"
        perturbed_in(path)
        result = cli("drift", path, "--count", "2", "--json", "--plot", plot)
        assert result.exit_code == 0
        found = document(result.stdout, "drift")
        assert found["artefacts"]["fp16"]["worst_names"][0] == "block3.1"
        assert [row["name"] for row in found["artefacts"]["fp32"]["rows"]][:3] == [
            "patch_embed1",
            "block1.0",
            "block1.1",
        ]
        assert [link["name"] for link in found["chain"]] == [
            *("PyTorch float32", "rewritten, float64", "fp32", "fp16", "int8")
        ]
        root = ElementTree.parse(plot).getroot()
        assert root.tag.endswith("svg")
        texts = {element.text for element in root.iter() if element.text}
        assert {"fp16 block3.1", "fp32 block1.0"} <= texts

    def test_stages_against_model_onnx(self, cli: Cli, judged: Subject, copy_of: Copy) -> None:
        path = copy_of(judged)
        words = ("--count", "1", "--level", "stage", "--artefact", "fp16", "--top", "2")
        result = cli("drift", path, *words, "--against", "golden")
        assert result.exit_code == 0
        rows = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("stage")]
        assert rows[0] == "stage"
        assert len(rows) == 3
        text = " ".join(result.stdout.split())
        assert "Parts are compared with model.onnx in ONNX Runtime" in text
        assert "Extra outputs keep a runtime from fusing" in text

    def test_numbers_that_make_no_sense(self, cli: Cli, judged: Subject) -> None:
        assert cli("drift", judged.bundle.path, "--top", "-1").exit_code == 2


@pytest.fixture(scope="module")
def made(judged: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a baseline that was written from the bundle as it is; not to be changed."""
    from van_deploy.api import Bundle as Opened

    folder = tmp_path_factory.mktemp("checked")
    bundle = Opened(shutil.copytree(judged.bundle.path, folder / "bundle"))
    report = bundle.check(
        folder / "baseline.json",
        update=True,
        evaluate=judged.labelled,
        allow_inconclusive=True,
    )
    assert report.passed
    return folder / "baseline.json"


class TestCheck:
    @pytest.fixture
    def good(self, made: Path, judged: Subject, copy_of: Copy, tmp_path: Path) -> tuple[Path, Path]:
        """Return a bundle and its baseline."""
        return copy_of(judged), Path(shutil.copy(made, tmp_path / "baseline.json"))

    def test_a_baseline_is_met_then_missed(
        self, cli: Cli, judged: Subject, good: tuple[Path, Path], tmp_path: Path
    ) -> None:
        path, baseline = good
        junit, summary = tmp_path / "out" / "junit.xml", tmp_path / "summary.md"
        words = ("--baseline", baseline, "--evaluate", judged.labelled)
        result = cli("check", path, *words, "--json", "--junit", junit, UNDECIDED)
        assert result.exit_code == 0
        found = document(result.stdout, "check")
        assert found["counts"] == {
            "pass": len(found["rows"]) - 1,
            "fail": 0,
            "inconclusive": 1,
            "skipped": 0,
        }
        suites = JUnitXml.fromfile(str(junit))
        assert (suites.failures, suites.skipped, suites.errors) == (0, 1, 0)
        assert suites.tests == len(found["rows"])
        written = json.loads(baseline.read_text())
        written["artefacts"]["fp16"]["sqnr_db"] += 10.0
        written["artefacts"]["int8"]["accuracy"]["top1"] += 2
        baseline.write_text(json.dumps(written))
        summary.write_text("what another step wrote\n")
        worse = cli("check", path, *words, UNDECIDED, "--junit", junit, "--summary", summary)
        assert worse.exit_code == 1
        assert worse.stderr.splitlines()[-2] == (
            "error: Failed: 'baseline/fp16/SQNR', 'baseline/int8/top-1'."
        )
        failed = [c for s in JUnitXml.fromfile(str(junit)) for c in s if failures_of(c)]
        assert {case.name for case in failed} == {"fp16/SQNR", "int8/top-1"}
        text = summary.read_text()
        assert text.startswith("what another step wrote\n## ❌ van-deploy: van_digits failed")
        assert "| ❌ FAIL | baseline/fp16/SQNR |" in text

    def test_one_near_tie_more_passes(
        self, cli: Cli, judged: Subject, good: tuple[Path, Path]
    ) -> None:
        """One in 200 images failed."""
        path, baseline = good
        written = json.loads(baseline.read_text())
        written["artefacts"]["fp32"]["accuracy"]["top1"] += 1
        baseline.write_text(json.dumps(written))
        words = ("--baseline", baseline, "--evaluate", judged.labelled, UNDECIDED)
        result = cli("check", path, *words)
        assert result.exit_code == 0, result.stderr

    def test_too_few_images_need_leave(
        self, cli: Cli, judged: Subject, good: tuple[Path, Path]
    ) -> None:
        path, baseline = good
        result = cli("check", path, "--baseline", baseline, "--evaluate", judged.labelled)
        assert result.exit_code == 1
        assert (
            "error: The data cannot decide: 'gate/evaluate/int8'; --allow-inconclusive would let "
            "that pass." in " ".join(result.stderr.split())
        )

    def test_a_broken_artefact_fails_its_gate_and_its_figures(
        self, cli: Cli, good: tuple[Path, Path]
    ) -> None:
        path, baseline = good
        perturbed_in(path)
        words = ("--baseline", baseline, "--json", "--allow-skip", "accuracy")
        result = cli("check", path, *words)
        assert result.exit_code == 1
        rows = {row["name"]: row["finding"] for row in json.loads(result.stdout)["rows"]}
        assert rows["gate/verify/fp16"]["outcome"] == "fail"
        assert rows["gate/verify/fp32"]["outcome"] == "pass"
        assert rows["baseline/fp16/modules"]["outcome"] == "fail"
        assert rows["baseline/fp16/modules"]["message"].startswith("block3.1.")
        assert rows["baseline/int8/modules"]["outcome"] == "pass"

    def test_an_artefact_that_was_deleted_fails_whatever_may_be_skipped(
        self, cli: Cli, good: tuple[Path, Path]
    ) -> None:
        """`--allow-skip` passed it."""
        path, baseline = good
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["artefacts"]["fp16"]
        (path / "manifest.json").write_text(json.dumps(manifest))
        kinds = [
            w
            for kind in ("engines", "runtimes", "accuracy", "speed")
            for w in ("--allow-skip", kind)
        ]
        result = cli("check", path, "--baseline", baseline, *kinds)
        assert result.exit_code == 1
        assert "error: Failed: 'baseline/fp16'." in result.stderr
        assert "the baseline has this artifact and the bundle lacks it" in " ".join(
            result.stdout.split()
        )

    def test_what_was_not_measured_needs_leave_of_its_kind(
        self, cli: Cli, good: tuple[Path, Path], tmp_path: Path
    ) -> None:
        path, baseline = good
        enter_engine(path, "x", made_from="fp16")
        junit = tmp_path / "junit.xml"
        words = ("--baseline", baseline, "--junit", junit)
        refused = cli("check", path, *words, "--allow-skip", "accuracy")
        if "no GPU" not in refused.stdout:
            pytest.skip("this machine has a GPU")
        assert refused.exit_code == 1
        assert "'gate/verify/x' was not checked (engine not executed: no GPU)" in refused.stderr
        assert "--allow-skip engines would let that pass." in " ".join(refused.stderr.split())
        assert JUnitXml.fromfile(str(junit)).failures == 1
        assert cli("check", path, *words, "--allow-skip", "engines").exit_code == 1
        both = ("--allow-skip", "engines", "--allow-skip", "accuracy")
        allowed = cli("check", path, *words, *both)
        assert allowed.exit_code == 0
        assert "Not in the baseline: x." in " ".join(allowed.stdout.split())
        suites = JUnitXml.fromfile(str(junit))
        assert suites.failures == 0
        skipped = [c for s in suites for c in s if any(isinstance(r, Skipped) for r in c.result)]
        assert {case.name for case in skipped} == {
            "verify/x",
            *(f"{name}/top-{k}" for name in ("fp32", "fp16", "int8") for k in (1, 5)),
        }

    def test_the_wrong_baseline_is_refused(
        self, cli: Cli, judged: Subject, good: tuple[Path, Path], tmp_path: Path
    ) -> None:
        path, baseline = good
        none = cli("check", path, "--baseline", tmp_path / "none.json")
        assert none.exit_code == 5
        assert "Make one with --update, look at it, and commit it." in none.stderr
        other = cli("check", path, "--baseline", baseline, *FEW)
        assert other.exit_code == 5
        assert "The baseline was measured with other images to verify on: " in other.stderr
        written = json.loads(baseline.read_text())
        for key, value, said in (
            ("model", "van_b1", "another model: van_b1, and now van_digits."),
            ("weights_sha256", "0" * 64, "other weights: 000000000000, and now "),
            ("schema", "van-deploy/baseline/1", "this version reads 'van-deploy/baseline/2'."),
            ("stranger", 1, "is no baseline: the key 'stranger' is unknown."),
        ):
            baseline.write_text(json.dumps({**written, key: value}))
            refused = cli("check", path, "--baseline", baseline)
            assert refused.exit_code == 5
            assert said in " ".join(refused.stderr.split())
        baseline.write_text(json.dumps(written)[:-10])
        assert "is no baseline: " in cli("check", path, "--baseline", baseline).stderr

    def test_another_evaluation_set_is_refused(
        self, cli: Cli, judged: Subject, good: tuple[Path, Path], tmp_path: Path
    ) -> None:
        """Baselines were compared across evaluation sets."""
        path, baseline = good
        images = Path(shutil.copytree(judged.labelled, tmp_path / "images"))
        next((images / "5").glob("*.png")).unlink()
        words = ("--baseline", baseline, "--evaluate", images, UNDECIDED)
        result = cli("check", path, *words)
        assert result.exit_code == 5
        assert "The baseline was measured with another evaluation set: " in result.stderr

    def test_speed_is_compared_by_the_interval_of_its_median(
        self, cli: Cli, judged: Subject, copy_of: Copy, tmp_path: Path
    ) -> None:
        path, baseline = copy_of(judged), tmp_path / "baseline.json"
        words = ("--baseline", baseline, "--speed", "--json")
        assert cli("check", path, *words, "--update").exit_code == 0
        written = json.loads(baseline.read_text())
        for name, factor in (("fp32", 1000), ("fp16", 0.001), ("int8", 1)):
            for key in ("ratio", "low", "high"):
                written["artefacts"][name]["speed"][key] *= factor
        written["artefacts"]["int8"]["speed"] |= {"low": 0.01, "high": 100.0}
        baseline.write_text(json.dumps(written))
        result = cli("check", path, *words)
        assert result.exit_code == 1
        rows = {row["name"]: row["finding"] for row in document(result.stdout, "check")["rows"]}
        assert rows["baseline/fp32/speed"]["outcome"] == "fail"
        assert rows["baseline/fp16/speed"]["outcome"] == "pass"
        assert rows["baseline/int8/speed"]["outcome"] == "inconclusive"
        allowed = cli("check", path, "--baseline", baseline, "--allow-skip", "speed")
        assert allowed.exit_code == 0


def failures_of(case: object) -> bool:
    return any(isinstance(entry, Failure) for entry in case.result)  # type: ignore[attr-defined]

"""The commands ``verify``, ``drift`` and ``check``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from junitparser import JUnitXml, Skipped

from tests.artifacts import Copy, Subject, add_placeholder_engine
from tests.checks import faults
from tests.checks.conftest import overwrite_artifact
from tests.conftest import Cli
from van_deploy.bundle import Bundle
from van_deploy.files import file_sha256

FEW = ("--against", "weights", "--count", "6")
ALLOW = ("--allow-inconclusive",)  # 60 images are too few for INT8


def one_line(text: str) -> str:
    return " ".join(text.split())


def run_json(cli: Cli, *words: object, code: int = 0) -> dict[str, Any]:
    """Run a command with ``--json``, check its exit code, and return the document."""
    result = cli(*words, "--json")
    assert result.exit_code == code, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def fail(cli: Cli, *words: object, code: int = 1) -> str:
    """Run a command that must fail, and return its output in one line."""
    result = cli(*words)
    assert result.exit_code == code, result.output
    return one_line(result.output)


def perturb_fp16(path: Path) -> Bundle:
    """Perturb one block of the bundle's FP16 graph by 1 %."""
    bundle = Bundle.open(path)
    model = faults.perturb_block(onnx.load(bundle.verified_path("fp16")), "block3.1")
    return overwrite_artifact(bundle, "fp16", model)


def edit_json(file: Path, change: Any) -> None:
    """Apply ``change`` to the content of a JSON file."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def outcomes_of(document: dict[str, Any]) -> dict[str, str]:
    """Return the outcome of each row of a check."""
    return {row["name"]: row["finding"]["outcome"] for row in document["rows"]}


@pytest.fixture
def path(digits: Subject, copy_bundle: Copy) -> Path:
    """Return a copy of the bundle of van_digits."""
    return copy_bundle(digits)


def test_verify_passes_and_is_recorded(cli: Cli, path: Path) -> None:
    report = run_json(cli, "verify", path)
    assert report["passed"] is True
    assert list(report["artifacts"]) == ["fp32", "fp16", "int8"]
    assert len(report["names"]) == 16
    assert report["names"][:2] == ["golden/0.png", "golden/1.png"]
    record = json.loads((path / "manifest.json").read_text())["checks"]["verify"]
    assert record["passed"] is True
    assert set(record["artifacts_sha256"]) == {"fp32", "fp16", "int8"}


def test_verify_names_a_broken_artifact(cli: Cli, path: Path) -> None:
    perturb_fp16(path)
    result = cli("verify", path)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-2:] == [
        "error: Failed: 'fp16'.",
        "  See the rows above; `van-deploy drift` finds the module.",
    ]
    lines = result.stdout.splitlines()
    assert any(line.startswith("FAIL") and "fp16: SQNR" in line for line in lines)
    assert "block3.1." in result.stdout
    limits = [line.split() for line in lines if line.startswith("LIMIT")]
    assert [words[1] for words in limits] == ["fp32", "fp16", "int8"]
    assert all(words[5] == "dB," and "recorded" in words for words in limits)
    selected = run_json(cli, "verify", path, "--artifact", "fp32", "--no-modules")["artifacts"]
    assert (list(selected), selected["fp32"]["worst_modules"]) == (["fp32"], [])


def test_verify_uses_the_limits_of_a_recipe(cli: Cli, path: Path) -> None:
    recipe = path.parent / "mine.toml"
    recipe.write_text("[gates.fp16]\nsqnr_db = 120.0\n")
    output = fail(cli, "verify", path, "--artifact", "fp16", "--no-modules", "--recipe", recipe)
    assert "dB is below 120.0 dB (recipe [gates.fp16])" in output


def test_verify_with_user_images_and_the_network(cli: Cli, digits: Subject, path: Path) -> None:
    words = ("--artifact", "fp32", "--images", digits.labelled)
    report = run_json(cli, "verify", path, *FEW, *words)
    assert report["against"] == "the original network"
    assert report["modules"] == "PyTorch, the rewritten network in float64"
    assert str(digits.labelled) in report["images"]
    assert len(report["names"]) == 6
    output = fail(cli, "verify", path, "--images", "x", code=2)
    assert "--images needs the original network" in output
    output = fail(cli, "verify", path, "--artifact", "fp8", code=5)
    assert "has no artifact 'fp8'; it has: fp32, fp16, int8." in output


def test_verify_fails_on_skips_that_are_not_allowed(cli: Cli, path: Path) -> None:
    add_placeholder_engine(path, "x", made_from="fp16")
    words = ("verify", path, "--artifact", "fp32", "--artifact", "x", "--no-modules")
    output = fail(cli, *words)
    if "x: engine not executed: no GPU" not in output:
        pytest.skip("this machine has a GPU")
    assert "error: 'x' was not checked (engine not executed: no GPU); --allow-skip eng" in output
    assert "drift" not in output  # nothing is wrong with a module
    fail(cli, *words, "--allow-skip", "runtimes")
    assert cli(*words, "--allow-skip", "engines").exit_code == 0
    cuda = ("--artifact", "fp32", "--runner", "ort-cuda", "--allow-skip", "runtimes")
    output = fail(cli, "verify", path, *cuda)
    assert "No artifact could be run on this machine, so nothing was" in output
    assert "CUDAExecutionProvider" in output


def test_verify_refuses_edited_or_missing_golden_samples(cli: Cli, path: Path) -> None:
    content = (path / "golden.npz").read_bytes()
    (path / "golden.npz").write_bytes(b"edited")
    output = fail(cli, "verify", path, code=5)
    assert "golden.npz' was changed after the manifest was written" in output
    (path / "golden.npz").write_bytes(content)
    edit_json(path / "manifest.json", lambda values: values.update(golden=None))
    output = fail(cli, "verify", path, code=5)
    assert "has no golden samples." in output
    assert "--against weights" in output
    assert cli("verify", path, *FEW, "--artifact", "fp32", "--no-modules").exit_code == 0


def test_drift_ranks_the_perturbed_block_first(cli: Cli, path: Path) -> None:
    perturb_fp16(path)
    report = run_json(cli, "drift", path, "--count", "2")
    assert report["artifacts"]["fp16"]["worst_names"][0] == "block3.1"
    names = [row["name"] for row in report["artifacts"]["fp32"]["rows"]]
    assert names[:3] == ["patch_embed1", "block1.0", "block1.1"]
    assert [row["name"] for row in report["chain"]] == [
        *("PyTorch float32", "rewritten, float64", "fp32", "fp16", "int8")
    ]
    words = ("--count", "1", "--level", "stage", "--artifact", "int8", "--top", "2")
    result = cli("drift", path, *words, "--against", "golden")
    assert result.exit_code == 0
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("stage")]
    assert (rows[0], len(rows)) == ("stage", 3)
    assert "Parts are compared with model.onnx in ONNX Runtime" in one_line(result.stdout)


@pytest.fixture(scope="module")
def saved_baseline(digits: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a baseline of the unchanged bundle; not to be changed."""
    from van_deploy.api import Bundle as ApiBundle

    folder = tmp_path_factory.mktemp("checked")
    bundle = ApiBundle(shutil.copytree(digits.bundle.path, folder / "bundle"))
    file, images = folder / "baseline.json", digits.labelled
    assert bundle.check(file, update=True, evaluate=images, allow_inconclusive=True).passed
    return file


@pytest.fixture
def baseline(saved_baseline: Path, tmp_path: Path) -> Path:
    """Return a copy of the baseline."""
    return Path(shutil.copy(saved_baseline, tmp_path / "baseline.json"))


def test_check_compares_with_the_baseline(
    cli: Cli, digits: Subject, path: Path, baseline: Path, tmp_path: Path
) -> None:
    junit, summary = tmp_path / "out" / "junit.xml", tmp_path / "summary.md"
    words = ("check", path, "--baseline", baseline, "--evaluate", digits.labelled)
    # One near-tie more or less of 60 images may change by chance.
    top1 = json.loads(baseline.read_text())["artifacts"]["fp32"]["top-1"]["value"]
    one_more = {"value": round(top1 + 100 / 60, 9)}
    edit_json(baseline, lambda v: v["artifacts"]["fp32"].update({"top-1": one_more}))
    report = run_json(cli, *words, "--junit", junit, *ALLOW)
    total = len(report["rows"])
    assert report["counts"] == {"pass": total - 1, "fail": 0, "inconclusive": 1, "skipped": 0}
    suites = JUnitXml.fromfile(str(junit))
    counts = (suites.tests, suites.failures, suites.skipped, suites.errors)
    assert counts == (total, 0, 1, 0)

    def raise_baseline(values: Any) -> None:
        values["artifacts"]["fp16"]["SQNR"]["value"] += 10.0
        values["artifacts"]["int8"]["top-1"]["value"] += 200 / 60

    edit_json(baseline, raise_baseline)
    summary.write_text("what another step wrote\n")
    result = cli(*words, "--junit", junit, "--summary", summary)
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) < 60
    assert "error: Failed: 'baseline/fp16/SQNR', 'baseline/int8/top-1'." in result.stderr
    text = summary.read_text()
    assert text.startswith("what another step wrote\n## ❌ van-deploy: van_digits failed")
    assert "| ❌ FAIL | baseline/fp16/SQNR |" in text
    assert JUnitXml.fromfile(str(junit)).failures == 3, "including what is undecided"


def test_check_fails_on_a_broken_artifact_and_keeps_the_baseline(
    cli: Cli, path: Path, baseline: Path
) -> None:
    perturb_fp16(path)
    words, before = ("check", path, "--baseline", baseline), baseline.read_text()
    outcomes = outcomes_of(run_json(cli, *words, "--allow-skip", "accuracy", code=1))
    failed = {name for name, outcome in outcomes.items() if outcome == "fail"}
    assert failed == {"gate/verify/fp16", "baseline/fp16/SQNR"}
    fail(cli, *words, "--update")
    assert baseline.read_text() == before, "only values that pass become a baseline"


def test_check_fails_on_a_deleted_artifact_with_all_skips_allowed(
    cli: Cli, path: Path, baseline: Path
) -> None:
    edit_json(path / "manifest.json", lambda values: values["artifacts"].pop("fp16"))
    kinds = ("engines", "runtimes", "accuracy", "speed")
    allow = [word for kind in kinds for word in ("--allow-skip", kind)]
    output = fail(cli, "check", path, "--baseline", baseline, *allow)
    assert "error: Failed: 'baseline/fp16'." in output
    assert "this artifact is in the baseline and not in the bundle" in output


def test_check_fails_on_skips_that_are_not_allowed(
    cli: Cli, path: Path, baseline: Path, tmp_path: Path
) -> None:
    add_placeholder_engine(path, "x", made_from="fp16")
    junit = tmp_path / "junit.xml"
    words = ("check", path, "--baseline", baseline, "--junit", junit)
    output = fail(cli, *words, "--allow-skip", "accuracy")
    if "no GPU" not in output:
        pytest.skip("this machine has a GPU")
    assert "'gate/verify/x' was not checked (engine not executed: no GPU)" in output
    assert JUnitXml.fromfile(str(junit)).failures == 1
    fail(cli, *words, "--allow-skip", "engines")
    result = cli(*words, "--allow-skip", "engines", "--allow-skip", "accuracy")
    assert result.exit_code == 0
    assert "Not in the baseline: x." in one_line(result.stdout)
    suites = JUnitXml.fromfile(str(junit))
    assert suites.failures == 0
    skipped = {c.name for s in suites for c in s if any(isinstance(r, Skipped) for r in c.result)}
    tops = (f"{name}/top-{k}" for name in ("fp32", "fp16", "int8") for k in (1, 5))
    assert skipped == {"verify/x", *tops}


def test_check_refuses_a_baseline_of_something_else(
    cli: Cli, digits: Subject, path: Path, baseline: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(digits.labelled, tmp_path / "images"))
    next((images / "5").glob("*.png")).unlink()
    text, weights = baseline.read_text(), digits.bundle.manifest.weights.sha256
    reference = json.loads(text)["reference_sha256"]
    other_model = text.replace('"van_digits"', '"van_b1"')
    for content, words, message in (
        (None, (), "Write one with --update, review it, and commit it."),
        (text, FEW, "The baseline was measured with other images to verify on: "),
        (text, ("--evaluate", images), "was measured with another evaluation set: "),
        (other_model, (), "another model: van_b1, this run has van_digits."),
        (text.replace(weights, "0" * 64), (), "other weights: 000000000000, this run has "),
        (text.replace(reference, "0" * 64), (), "other reference outputs or class names: 0000"),
        (text.replace("line/4", "line/2"), (), "this version reads 'van-deploy/baseline/4'."),
        ('{"stranger": 1, ' + text[1:], (), "the key 'stranger' is unknown."),
        (text[:-10], (), "is damaged: "),
    ):
        baseline.unlink(missing_ok=True)
        if content is not None:
            baseline.write_text(content)
        assert message in fail(cli, "check", path, "--baseline", baseline, *words, code=5)


def test_check_refuses_golden_samples_with_other_outputs(
    cli: Cli, path: Path, baseline: Path
) -> None:
    """The graph could have been changed with them, so that ``verify`` passes."""
    golden = path / "golden.npz"
    arrays = dict(np.load(golden))
    arrays["logits"] = arrays["logits"][:, ::-1]
    np.savez(golden, **arrays)
    files = {"golden.npz": file_sha256(golden)}
    edit_json(path / "manifest.json", lambda m: m["artifacts"]["fp32"]["files"].update(files))
    message = fail(cli, "check", path, "--baseline", baseline, code=5)
    assert "other reference outputs or class names" in message


@pytest.mark.slow
def test_check_compares_speed_by_its_interval(cli: Cli, path: Path, tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    words = ("check", path, "--baseline", baseline)
    assert cli(*words, "--speed", "--update").exit_code == 0

    def change_speeds(values: Any) -> None:
        for name, low, high in (("fp32", 1e3, 1e4), ("fp16", 1e-6, 1e-5), ("int8", 0.01, 100)):
            speed = {"value": (low * high) ** 0.5, "interval": [low, high]}
            values["artifacts"][name]["speed"] = speed

    edit_json(baseline, change_speeds)
    outcomes = outcomes_of(run_json(cli, *words, "--speed", code=1))
    speeds = [outcomes[f"baseline/{name}/speed"] for name in ("fp32", "fp16", "int8")]
    assert speeds == ["fail", "pass", "inconclusive"]
    assert cli(*words, "--allow-skip", "speed").exit_code == 0

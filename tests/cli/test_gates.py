"""The commands ``verify``, ``drift`` and ``check``."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from junitparser import JUnitXml, Skipped

import van_deploy as vd
from tests.artifacts import Subject
from tests.checks import faults
from tests.checks.conftest import spoil
from tests.cli.conftest import ALLOW, npz, replace_file
from tests.conftest import Cli
from tests.each import each
from tests.json_documents import edit_json, edited
from tests.plans import add_plan
from van_deploy.bundle import Bundle

FEW = ("--against", "weights", "--count", "6")
NAMES = ["fp32", "fp16", "int8"]
PLAN = "plan-sm_89"


def outcomes_of(document: dict[str, Any]) -> dict[str, str]:
    """Return the outcome of each row of a check."""
    return {row["name"]: row["finding"]["outcome"] for row in document["rows"]}


@pytest.fixture
def perturbed(path: Path) -> Path:
    """Return a bundle in whose FP16 graph one block differs by 1 %."""
    spoil(path, "fp16", partial(faults.perturb_block, block="block3.1"))
    return path


def test_verify_passes_and_is_recorded(cli: Cli, path: Path) -> None:
    report = cli.document("verify", path)
    assert (report["passed"], report["against"]) == (True, "the golden samples")
    assert report["modules"].startswith("model.onnx in ONNX Runtime, which passes its gate")
    assert report["names"][:3] == ["golden/0.png", "golden/1.png", "golden 2"]
    assert [finding["value"] for finding in report["findings"]] == [0.0, 0.0], "the originals"
    assert list(report["artifacts"]) == NAMES
    for name, verdict in report["artifacts"].items():
        assert [row["batch"] for row in verdict["batches"]] == [1, 2, 3, 4, 5, 6]
        assert verdict["findings"][0]["value"] == verdict["comparison"]["sqnr_db"]
        assert verdict["margin_db"] == pytest.approx(3.0, abs=0.01)
        assert verdict["limit"]["origin"].endswith(" dB recorded at creation, minus 3")
        assert len(verdict["worst_modules"]) == (0 if name == "fp32" else 10)
    record = Bundle.open(path).manifest.checks["verify"]
    assert (record["passed"], list(record["artifacts_sha256"])) == (True, NAMES)


def test_a_perturbed_block_is_found_by_all_gates(cli: Cli, perturbed: Path, baseline: Path) -> None:
    result = cli("verify", perturbed)
    assert (result.exit_code, "block3.1." in result.stdout) == (1, True)
    assert result.stderr.splitlines()[-2:] == [
        "error: Failed: 'fp16'.",
        "  See the rows above; `van-deploy drift` finds the module.",
    ]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [words[1] for words in lines if words[:1] == ["LIMIT"]] == NAMES
    report = cli.document("drift", perturbed, "--count", "2")
    names = [row["name"] for row in report["artifacts"]["fp32"]["rows"]]
    assert names[:3] == ["patch_embed1", "block1.0", "block1.1"]
    links = ["PyTorch float32", "rewritten, float64", *NAMES]
    assert [row["name"] for row in report["chain"]] == links
    onnx_alone = cli.document("drift", perturbed, "--count", "2", "--against", "golden")
    assert list(onnx_alone["artifacts"]) == ["fp16", "int8"]
    for found in (report, onnx_alone):
        assert found["artifacts"]["fp16"]["worst_names"][0] == "block3.1"
    stages = cli.passes("drift", perturbed, "--level", "stage", "--artifact", "int8", "--top", "2")
    rows = [line.split()[0] for line in stages.splitlines() if line.startswith("stage")]
    assert (rows[0], len(rows)) == ("stage", 3)
    modules = ("--level", "module", "--artifact", "int8", "--against", "golden", "--top", "30")
    assert "int8: modules, the worst 30" in cli.passes("drift", perturbed, *modules)
    words, before = ("check", perturbed, "--baseline", baseline), baseline.read_text()
    outcomes = outcomes_of(cli.document(*words, "--allow-skip", "accuracy", code=1))
    failed = {name for name, outcome in outcomes.items() if outcome == "fail"}
    assert failed == {"gate/verify/fp16", "baseline/fp16/SQNR"}
    cli.fails(1, *words, "--update")
    assert baseline.read_text() == before, "only values that pass become a baseline"


def test_verify_with_user_images_the_network_and_a_recipe(
    cli: Cli, digits: Subject, path: Path
) -> None:
    edit_json(path / "manifest.json", "golden", None)
    message = "has no golden samples. Use the original network (--against weights)"
    assert message in cli.fails(5, "verify", path)
    cli.passes("verify", path, *FEW, "--artifact", "fp32", "--no-modules")
    recipe = path.parent / "mine.toml"
    recipe.write_text("[gates.fp16]\nsqnr_db = 120.0\n")
    words = (*FEW, "--images", digits.labelled, "--recipe", recipe)
    report = cli.document("verify", path, *words, code=1)
    assert report["against"] == "the original network"
    assert report["modules"] == "PyTorch, the rewritten network in float64"
    assert (len(report["names"]), str(digits.labelled) in report["images"]) == (6, True)
    verdicts = report["artifacts"]
    assert [verdicts[name]["outcome"] for name in NAMES] == ["pass", "fail", "pass"]
    assert " is below 120.0 dB (recipe [gates.fp16])" in verdicts["fp16"]["reason"]
    assert all(verdict["worst_modules"] for verdict in verdicts.values())


def test_skipped_engines_fail_unless_they_are_allowed(
    cli: Cli, path: Path, baseline: Path, tmp_path: Path
) -> None:
    add_plan(Bundle.open(path))
    assert f"modules of '{PLAN}' cannot be compared" in cli.fails(
        2, "drift", path, "--artifact", PLAN
    )
    engines = ("--allow-skip", "engines")
    verify = ("verify", path, "--no-modules", "--artifact", PLAN, "--artifact")
    output = cli.fails(1, *verify, "fp32")
    if f"{PLAN}: engine not executed: no GPU" not in output:
        pytest.skip("this machine has a GPU")
    assert f"error: '{PLAN}' was not checked (engine not executed: no GPU); --allow" in output
    assert "drift" not in output  # nothing is wrong with a module
    cli.fails(1, *verify, "fp32", "--allow-skip", "runtimes")
    cli.passes(*verify, "fp32", *engines)
    cuda = ("--artifact", "fp32", "--runner", "ort-cuda", "--allow-skip", "runtimes")
    for words in (("verify", path, *cuda), (*verify, PLAN), (*verify, PLAN, *engines)):
        assert "No artifact could be run on this machine, so nothing was" in cli.fails(1, *words)
    junit = tmp_path / "junit.xml"
    check = ("check", path, "--baseline", baseline, "--junit", junit, "--allow-skip")
    every = ("runtimes", *engines, "--allow-skip", "accuracy")
    assert "No artifact could be run" in cli.fails(1, *check, *every, "--runner", "ort-cuda")
    assert JUnitXml.fromfile(str(junit)).failures > 4, "what runs nothing allows no skip"
    assert f"'gate/verify/{PLAN}' was not checked (engine" in cli.fails(1, *check, "accuracy")
    assert JUnitXml.fromfile(str(junit)).failures == 1
    cli.fails(1, *check, "engines")
    output = cli.passes(*check, "engines", "--allow-skip", "accuracy")
    assert f"Not in the baseline: {PLAN}." in " ".join(output.split())
    suites = JUnitXml.fromfile(str(junit))
    assert suites.failures == 0
    skipped = {c.name for s in suites for c in s if any(isinstance(r, Skipped) for r in c.result)}
    assert skipped == {f"verify/{PLAN}", *(f"{name}/top-{k}" for name in NAMES for k in (1, 5))}
    with edited(path / "manifest.json") as manifest:
        del manifest["artifacts"]["fp16"]
    kinds = ("accuracy", "--allow-skip", "speed", "--allow-skip", "runtimes")
    output = cli.fails(1, *check, "engines", "--allow-skip", *kinds)
    assert "error: Failed: 'baseline/fp16'." in output
    assert "this artifact is in the baseline and not in the bundle" in output


@each(
    ("name", "content", "new_digest", "message"),
    [
        ("golden.npz", b"?", False, "golden.npz' was changed after the manifest was written"),
        ("golden/1.png", b"", False, "1.png' was changed after the manifest was written"),
        ("golden.npz", b"PK", True, "are damaged"),
        ("golden.npz", npz(noise_db=1.0), True, "inputs is not a file in the archive"),
    ],
    fresh="path",
)
def test_verify_refuses_edited_golden_samples(
    cli: Cli, path: Path, name: str, content: bytes, new_digest: bool, message: str
) -> None:
    replace_file(path, name, content, new_digest)
    # The files of the selected artifact do not include the golden samples.
    assert message in cli.fails(5, "verify", path, "--artifact", "int8")


@pytest.fixture(scope="module")
def saved_baseline(digits: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a baseline of the unchanged bundle; not to be changed."""
    folder = tmp_path_factory.mktemp("checked")
    bundle = vd.open_bundle(shutil.copytree(digits.bundle.path, folder / "bundle"))
    file, images = folder / "baseline.json", digits.labelled
    assert bundle.check(file, update=True, evaluate=images, allow_inconclusive=True).passed
    return file


@pytest.fixture
def baseline(saved_baseline: Path, tmp_path: Path) -> Path:
    """Return a copy of the baseline."""
    return Path(shutil.copy(saved_baseline, tmp_path / "baseline.json"))


def test_check_compares_with_the_baseline(
    cli: Cli, digits: Subject, baseline: Path, tmp_path: Path
) -> None:
    junit, summary = tmp_path / "out" / "junit.xml", tmp_path / "summary.md"
    words = ("check", digits.bundle.path, "--baseline", baseline, "--evaluate", digits.labelled)

    with edited(baseline) as values:  # a near-tie of 60 images may change by chance
        values["artifacts"]["fp32"]["top-1"]["value"] += 100 / 60
        values["artifacts"]["fp32"]["SQNR"] |= {"value": 300.0, "instruction_set": "another"}
    report = cli.document(*words, "--junit", junit, ALLOW)
    total = len(report["rows"])
    assert report["counts"] == {"pass": total - 1, "fail": 0, "inconclusive": 1, "skipped": 0}
    suites = JUnitXml.fromfile(str(junit))
    counts = (suites.tests, suites.failures, suites.skipped, suites.errors)
    assert counts == (total, 0, 1, 0)
    with edited(baseline) as values:
        values["artifacts"]["fp16"]["SQNR"]["value"] += 10.0
        values["artifacts"]["int8"]["top-1"]["value"] += 200 / 60
    summary.write_text("what another step wrote\n")
    output = cli.fails(1, *words, "--junit", junit, "--summary", summary)
    assert "error: Failed: 'baseline/fp16/SQNR', 'baseline/int8/top-1'." in output
    text = summary.read_text()
    assert text.startswith("what another step wrote\n## ❌ van-deploy: van_digits failed")
    assert "| ❌ FAIL | baseline/fp16/SQNR |" in text
    for option in ("--summary", "--junit"):
        assert "cannot be written: No such" in cli.fails(5, *words[:4], option, "/proc/none/file")
    written = cli.fails(5, *words[:3], "/proc/none/file", "--update")
    assert "'/proc/none/file' cannot be written: No such file" in written
    assert JUnitXml.fromfile(str(junit)).failures == 3, "including what is undecided"


def test_check_refuses_a_baseline_of_something_else(
    cli: Cli, digits: Subject, path: Path, baseline: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(digits.labelled, tmp_path / "images"))
    next((images / "5").glob("*.png")).unlink()
    text, weights = baseline.read_text(), digits.bundle.manifest.weights.sha256
    reference = json.loads(text)["reference_sha256"]
    words = ("check", path, "--baseline", baseline)
    for content, more, message in (
        (text, FEW, "The baseline was measured with other images to verify on: "),
        (text, ("--evaluate", images), "was measured with another evaluation set: "),
        (text.replace('"van_digits"', '"van_b1"'), (), "another model: van_b1, this run has van"),
        (text.replace(weights, "0" * 64), (), "other weights: 000000000000, this run has "),
        (text.replace(reference, "0" * 64), (), "other reference outputs or class names: 0000"),
        (text.replace("line/5", "line/2"), (), "this version reads 'van-deploy/baseline/5'."),
        ('{"stranger": 1, ' + text[1:], (), "the key 'stranger' is unknown."),
        (text[:-10], (), "is damaged: "),
    ):
        baseline.write_text(content)
        assert message in cli.fails(5, *words, *more)
    baseline.unlink()
    assert "Write one with --update, review it, and" in cli.fails(5, *words)
    # The graph could have been changed with the golden samples, so that ``verify`` passes.
    arrays = dict(np.load(path / "golden.npz"))
    replace_file(path, "golden.npz", npz(**{**arrays, "logits": arrays["logits"][:, ::-1]}))
    baseline.write_text(text)
    assert "other reference outputs or class names" in cli.fails(5, *words)


@pytest.mark.slow
def test_check_compares_speed_by_its_interval(cli: Cli, path: Path, tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    words = ("check", path, "--baseline", baseline)
    cli.passes(*words, "--speed", "--update")

    for name, low, high in (("fp32", 1e3, 1e4), ("int8", 0.01, 100)):
        speed = {"value": (low * high) ** 0.5, "interval": [low, high]}
        edit_json(baseline, f"artifacts {name} speed", speed)
    edit_json(baseline, "artifacts fp16 speed", {"value": 0.0})  # written by hand
    outcomes = outcomes_of(cli.document(*words, "--speed", code=1))
    speeds = [outcomes[f"baseline/{name}/speed"] for name in NAMES]
    assert speeds == ["fail", "pass", "inconclusive"]
    cli.passes(*words, "--allow-skip", "speed")

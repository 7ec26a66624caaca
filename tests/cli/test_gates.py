"""``verify``, ``drift`` and ``check`` as a person and a CI server run them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from junitparser import JUnitXml, Skipped

from tests.artifacts import Copy, Subject, add_placeholder_engine
from tests.checks import faults
from tests.checks.conftest import overwritten
from tests.conftest import Cli
from van_deploy.bundle import Bundle

FEW = ("--against", "weights", "--count", "6")
UNDECIDED = "--allow-inconclusive"  # 60 images are too few for INT8


def words_of(text: str) -> str:
    return " ".join(text.split())


def perturbed_in(path: Path) -> Bundle:
    """Return the bundle with one block of its FP16 graph off by 1 %."""
    bundle = Bundle.open(path)
    model = faults.perturbed(onnx.load(bundle.verified_path("fp16")), "block3.1")
    return overwritten(bundle, "fp16", model)


def rewritten(file: Path, change: Any) -> None:
    """Change what a JSON file holds."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.fixture
def path(digits: Subject, copy_bundle: Copy) -> Path:
    """Return a copy of the digits' bundle."""
    return copy_bundle(digits)


def test_right_artifacts_pass_and_it_is_kept(cli: Cli, path: Path) -> None:
    result = cli("verify", path, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["passed"] is True
    assert list(found["artifacts"]) == ["fp32", "fp16", "int8"]
    assert len(found["names"]) == 16
    assert found["names"][:2] == ["golden/0.png", "golden/1.png"]
    kept = json.loads((path / "manifest.json").read_text())["checks"]["verify"]
    assert kept["passed"] is True
    assert set(kept["artifacts_sha256"]) == {"fp32", "fp16", "int8"}


def test_a_broken_artifact_ends_with_1_and_is_named(cli: Cli, path: Path) -> None:
    perturbed_in(path)
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
    chosen = cli("verify", path, "--artifact", "fp32", "--no-modules", "--json")
    assert chosen.exit_code == 0
    found = json.loads(chosen.stdout)["artifacts"]
    assert (list(found), found["fp32"]["worst_modules"]) == (["fp32"], [])


@pytest.mark.parametrize(
    ("key", "code", "said"),
    [
        ("sqnr_db = 120.0", 1, "dB is below 120.0 dB (recipe [gates.fp16])"),
        ("margin_db = 3.0", 5, "the key 'gates.fp16.margin_db' is unknown."),
    ],
)
def test_a_recipes_limits_are_named(cli: Cli, path: Path, key: str, code: int, said: str) -> None:
    recipe = path.parent / "mine.toml"
    recipe.write_text(f"[gates.fp16]\n{key}\n")
    words = ("--artifact", "fp16", "--no-modules", "--recipe", recipe)
    result = cli("verify", path, *words)
    assert result.exit_code == code
    assert said in words_of(result.output)


def test_the_users_images_and_the_network(cli: Cli, digits: Subject, path: Path) -> None:
    words = ("--artifact", "fp32", "--images", digits.labelled, "--json")
    result = cli("verify", path, *FEW, *words)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["against"] == "the original network"
    assert found["modules"] == "PyTorch, the rewritten network in float64"
    assert str(digits.labelled) in found["images"]
    assert len(found["names"]) == 6


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            ("--images", "x"),
            2,
            "--images needs the original network: the bundle has",
        ),
        (("--runner", "onnx"), 2, "'--runner' is 'onnx': it should be 'ort-cpu' or"),
        (("--artifact", "fp8"), 5, "has no artifact 'fp8'; it has: fp32, fp16, int8."),
    ],
)
def test_mistakes(cli: Cli, digits: Subject, words: tuple[str, str], code: int, said: str) -> None:
    result = cli("verify", digits.bundle.path, *words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in words_of(result.stderr)


def test_what_is_not_run_here_needs_leave(cli: Cli, path: Path) -> None:
    add_placeholder_engine(path, "x", made_from="fp16")
    words = ("--artifact", "fp32", "--artifact", "x", "--no-modules")
    refused = cli("verify", path, *words)
    if "x: engine not executed: no GPU" not in refused.stdout:
        pytest.skip("this machine has a GPU")
    assert refused.exit_code == 1
    assert (
        "error: 'x' was not checked (engine not executed: no GPU); --allow-skip engines "
        "accepts that." in words_of(refused.stderr)
    )
    assert cli("verify", path, *words, "--allow-skip", "runtimes").exit_code == 1
    assert cli("verify", path, *words, "--allow-skip", "engines").exit_code == 0
    cuda = ("--artifact", "fp32", "--runner", "ort-cuda", "--allow-skip", "runtimes")
    nothing = cli("verify", path, *cuda)
    assert nothing.exit_code == 1
    assert "No artifact could be run on this machine, so nothing was" in nothing.stderr
    assert "CUDAExecutionProvider" in nothing.stdout


def test_golden_samples_that_are_edited_or_gone(cli: Cli, path: Path) -> None:
    right = (path / "golden.npz").read_bytes()
    (path / "golden.npz").write_bytes(b"edited")
    result = cli("verify", path)
    assert result.exit_code == 5
    assert "golden.npz' was changed after the manifest was written" in result.stderr
    (path / "golden.npz").write_bytes(right)
    rewritten(path / "manifest.json", lambda values: values.update(golden=None))
    result = cli("verify", path)
    assert result.exit_code == 5
    assert result.stderr.splitlines()[-2].endswith("has no golden samples.")
    assert "--against weights" in result.stderr
    assert cli("verify", path, *FEW, "--artifact", "fp32", "--no-modules").exit_code == 0


def test_the_perturbed_block_comes_first(cli: Cli, path: Path) -> None:
    perturbed_in(path)
    result = cli("drift", path, "--count", "2", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["artifacts"]["fp16"]["worst_names"][0] == "block3.1"
    names = [row["name"] for row in found["artifacts"]["fp32"]["rows"]]
    assert names[:3] == ["patch_embed1", "block1.0", "block1.1"]
    assert [link["name"] for link in found["chain"]] == [
        *("PyTorch float32", "rewritten, float64", "fp32", "fp16", "int8")
    ]


def test_stages_against_model_onnx(cli: Cli, path: Path) -> None:
    words = ("--count", "1", "--level", "stage", "--artifact", "fp16", "--top", "2")
    result = cli("drift", path, *words, "--against", "golden")
    assert result.exit_code == 0
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("stage")]
    assert (rows[0], len(rows)) == ("stage", 3)
    text = words_of(result.stdout)
    assert "Parts are compared with model.onnx in ONNX Runtime" in text
    assert cli("drift", path, "--top", "-1").exit_code == 2


@pytest.fixture(scope="module")
def made(digits: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a baseline that was written from the bundle as it is; not to be changed."""
    from van_deploy.api import Bundle as Opened

    folder = tmp_path_factory.mktemp("checked")
    bundle = Opened(shutil.copytree(digits.bundle.path, folder / "bundle"))
    report = bundle.check(
        folder / "baseline.json",
        update=True,
        evaluate=digits.labelled,
        allow_inconclusive=True,
    )
    assert report.passed
    return folder / "baseline.json"


@pytest.fixture
def baseline(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the baseline."""
    return Path(shutil.copy(made, tmp_path / "baseline.json"))


def test_a_baseline_is_met_and_missed(
    cli: Cli, digits: Subject, path: Path, baseline: Path, tmp_path: Path
) -> None:
    junit, summary = tmp_path / "out" / "junit.xml", tmp_path / "summary.md"
    words = ("--baseline", baseline, "--evaluate", digits.labelled)
    # One near-tie more or less of 200 images failed.
    top1 = json.loads(baseline.read_text())["artifacts"]["fp32"]["top-1"]["value"]
    one_more = {"value": round(top1 + 100 / 60, 9)}
    rewritten(baseline, lambda v: v["artifacts"]["fp32"].update({"top-1": one_more}))
    result = cli("check", path, *words, "--json", "--junit", junit, UNDECIDED)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    rest = len(found["rows"]) - 1
    assert found["counts"] == {"pass": rest, "fail": 0, "inconclusive": 1, "skipped": 0}
    suites = JUnitXml.fromfile(str(junit))
    assert (suites.failures, suites.skipped, suites.errors) == (0, 1, 0)
    assert suites.tests == len(found["rows"])

    def better(values: Any) -> None:
        values["artifacts"]["fp16"]["SQNR"]["value"] += 10.0
        values["artifacts"]["int8"]["top-1"]["value"] += 200 / 60

    rewritten(baseline, better)
    summary.write_text("what another step wrote\n")
    worse = cli("check", path, *words, "--junit", junit, "--summary", summary)
    assert worse.exit_code == 1
    assert len(worse.stdout.splitlines()) < 60
    assert worse.stderr.splitlines()[-2] == (
        "error: Failed: 'baseline/fp16/SQNR', 'baseline/int8/top-1'."
    )
    text = summary.read_text()
    assert text.startswith("what another step wrote\n## ❌ van-deploy: van_digits failed")
    assert "| ❌ FAIL | baseline/fp16/SQNR |" in text
    assert JUnitXml.fromfile(str(junit)).failures == 3, "and what is undecided"


def test_a_broken_artifact_fails_twice(cli: Cli, path: Path, baseline: Path) -> None:
    perturbed_in(path)
    words = ("--baseline", baseline, "--json", "--allow-skip", "accuracy")
    result = cli("check", path, *words)
    assert result.exit_code == 1
    rows = {row["name"]: row["finding"] for row in json.loads(result.stdout)["rows"]}
    failed = {name for name, finding in rows.items() if finding["outcome"] == "fail"}
    assert failed == {"gate/verify/fp16", "baseline/fp16/SQNR"}
    before = baseline.read_text()
    assert cli("check", path, "--baseline", baseline, "--update").exit_code == 1
    assert baseline.read_text() == before  # only what holds its gates becomes a baseline


def test_a_deleted_artifact_fails_whatever_may_be_skipped(
    cli: Cli, path: Path, baseline: Path
) -> None:
    """`--allow-skip` passed it."""
    rewritten(path / "manifest.json", lambda values: values["artifacts"].pop("fp16"))
    kinds = ("engines", "runtimes", "accuracy", "speed")
    leave = [word for kind in kinds for word in ("--allow-skip", kind)]
    result = cli("check", path, "--baseline", baseline, *leave)
    assert result.exit_code == 1
    assert "error: Failed: 'baseline/fp16'." in result.stderr
    said = "this artifact is in the baseline and not in the bundle"
    assert said in words_of(result.stdout)


def test_what_was_not_measured_needs_leave(
    cli: Cli, path: Path, baseline: Path, tmp_path: Path
) -> None:
    add_placeholder_engine(path, "x", made_from="fp16")
    junit = tmp_path / "junit.xml"
    words = ("--baseline", baseline, "--junit", junit)
    refused = cli("check", path, *words, "--allow-skip", "accuracy")
    if "no GPU" not in refused.stdout:
        pytest.skip("this machine has a GPU")
    assert refused.exit_code == 1
    assert "'gate/verify/x' was not checked (engine not executed: no GPU)" in refused.stderr
    assert JUnitXml.fromfile(str(junit)).failures == 1
    assert cli("check", path, *words, "--allow-skip", "engines").exit_code == 1
    both = ("--allow-skip", "engines", "--allow-skip", "accuracy")
    allowed = cli("check", path, *words, *both)
    assert allowed.exit_code == 0
    assert "Not in the baseline: x." in words_of(allowed.stdout)
    suites = JUnitXml.fromfile(str(junit))
    assert suites.failures == 0
    skipped = {c.name for s in suites for c in s if any(isinstance(r, Skipped) for r in c.result)}
    tops = (f"{name}/top-{k}" for name in ("fp32", "fp16", "int8") for k in (1, 5))
    assert skipped == {"verify/x", *tops}


def test_the_wrong_baseline_is_refused(
    cli: Cli, digits: Subject, path: Path, baseline: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(digits.labelled, tmp_path / "images"))
    next((images / "5").glob("*.png")).unlink()
    text = baseline.read_text()
    name, weights, schema = (
        text.replace(*pair)
        for pair in (
            ('"van_digits"', '"van_b1"'),
            (digits.bundle.manifest.weights.sha256, "0" * 64),
            ("van-deploy/baseline/4", "van-deploy/baseline/2"),
        )
    )
    other = "The baseline was measured with other images to verify on: "
    for written, words, said in (
        (None, (), "Write one with --update, review it, and commit it."),
        (text, FEW, other),
        (text, ("--evaluate", images), "was measured with another evaluation set: "),
        (name, (), "another model: van_b1, this run has van_digits."),
        (weights, (), "other weights: 000000000000, this run has "),
        (schema, (), "this version reads 'van-deploy/baseline/4'."),
        ('{"stranger": 1, ' + text[1:], (), "the key 'stranger' is unknown."),
        (text[:-10], (), "is damaged: "),
    ):
        baseline.unlink(missing_ok=True)
        if written is not None:
            baseline.write_text(written)
        refused = cli("check", path, "--baseline", baseline, *words)
        assert refused.exit_code == 5
        assert said in words_of(refused.stderr)


@pytest.mark.slow
def test_speed_is_compared_by_its_interval(cli: Cli, path: Path, tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    words = ("--baseline", baseline, "--speed", "--json")
    assert cli("check", path, *words, "--update").exit_code == 0

    def other(values: Any) -> None:
        for name, low, high in (("fp32", 1e3, 1e4), ("fp16", 1e-6, 1e-5), ("int8", 0.01, 100)):
            speed = {"value": (low * high) ** 0.5, "interval": [low, high]}
            values["artifacts"][name]["speed"] = speed

    rewritten(baseline, other)
    result = cli("check", path, *words)
    assert result.exit_code == 1
    rows = {row["name"]: row["finding"] for row in json.loads(result.stdout)["rows"]}
    outcomes = [rows[f"baseline/{n}/speed"]["outcome"] for n in ("fp32", "fp16", "int8")]
    assert outcomes == ["fail", "pass", "inconclusive"]
    assert cli("check", path, *words[:2], "--allow-skip", "speed").exit_code == 0

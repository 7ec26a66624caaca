"""``verify``, ``drift`` and ``check`` as a person and a CI server run them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from junitparser import Failure, JUnitXml, Skipped

from tests.artifacts import Copy, Subject, put
from tests.checks import faults
from tests.conftest import Cli
from tests.described import entry
from tests.golden_forms import misfits
from van_deploy.bundle import Bundle, Origin, writing

FEW = ("--count", "6")


def perturbed_in(path: Path) -> Bundle:
    """Return the bundle with one block of its FP16 graph off by 1 %."""
    import onnx

    bundle = Bundle.open(path)
    model = faults.perturbed(onnx.load(bundle.verified("fp16")), "block3.1")
    return put(bundle, "fp16", "fp16", model)


def with_engine(path: Path) -> None:
    """Enter a file as an engine: nothing on this machine runs it."""
    with writing(path) as draft:
        draft.file("engines/x.plan").write_bytes(b"no plan")
        origin = Origin(name="fp32", sha256=draft.artefacts["fp32"].sha256)
        draft.record(entry("x", "engine", "fp16", "engines/x.plan", made_from=origin))


class TestVerify:
    def test_right_artefacts_pass_and_it_is_kept(
        self, cli: Cli, judged: Subject, copy_of: Copy
    ) -> None:
        path = copy_of(judged)
        result = cli("verify", path, *FEW, "--json")
        assert result.exit_code == 0
        document = json.loads(result.stdout)
        assert misfits(document, "verify") == []
        assert document["passed"] is True
        assert list(document["artefacts"]) == ["fp32", "fp16", "int8"]
        assert document["count"] == 6
        kept = json.loads((path / "manifest.json").read_text())["checks"]["verify"]
        assert kept["passed"] is True
        assert set(kept["artefacts_sha256"]) == {"fp32", "fp16", "int8"}

    def test_a_broken_artefact_ends_with_1_and_is_named(
        self, cli: Cli, judged: Subject, copy_of: Copy
    ) -> None:
        path = copy_of(judged)
        perturbed_in(path)
        result = cli("verify", path, *FEW)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-2:] == [
            "error: 1 of 3 artefacts failed: 'fp16'.",
            "  See the rows above; `van-deploy drift` names the module.",
        ]
        lines = result.stdout.splitlines()
        assert any(line.startswith("FAIL") and "fp16: block3.1." in line for line in lines)
        chosen = cli("verify", path, *FEW, "--artefact", "fp32", "--no-modules", "--json")
        assert chosen.exit_code == 0
        document = json.loads(chosen.stdout)
        assert list(document["artefacts"]) == ["fp32"]
        assert document["artefacts"]["fp32"]["modules"] == []

    def test_limits_of_a_recipe_apply(
        self, cli: Cli, judged: Subject, copy_of: Copy, tmp_path: Path
    ) -> None:
        recipe = tmp_path / "hard.toml"
        recipe.write_text("[gates.fp16]\nsqnr_db = 120.0\n")
        words = ("--artefact", "fp16", "--no-modules", "--recipe", recipe)
        result = cli("verify", copy_of(judged), *FEW, *words)
        assert result.exit_code == 1
        assert "dB is below 120.0 dB" in " ".join(result.stdout.split())

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--count", "5"), "5 images are fewer than the bundle's largest batch, 6."),
            (
                ("--runner", "onnx"),
                "'--runner' is 'onnx': it should be 'ort-cpu', 'ort-cuda' or 'ort-tensorrt'.",
            ),
        ],
    )
    def test_mistakes_end_with_2(
        self, cli: Cli, judged: Subject, words: tuple[str, ...], message: str
    ) -> None:
        result = cli("verify", judged.bundle.path, *words)
        assert (result.exit_code, result.stdout) == (2, "")
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
        result = cli("verify", copy_of(judged), *FEW, "--runner", "ort-cuda")
        assert result.exit_code == 1
        assert "No artefact could be run on this machine, so nothing was verified." in result.stderr
        assert "no CUDAExecutionProvider in the ONNX Runtime" in " ".join(result.stdout.split())


class TestDrift:
    def test_the_perturbed_block_comes_first(
        self, cli: Cli, judged: Subject, copy_of: Copy, tmp_path: Path
    ) -> None:
        path, plot = copy_of(judged), tmp_path / "plots" / "drift.svg"
        perturbed_in(path)
        result = cli("drift", path, "--count", "2", "--json", "--plot", plot)
        assert result.exit_code == 0
        document = json.loads(result.stdout)
        assert misfits(document, "drift") == []
        assert document["artefacts"]["fp16"]["worst"][0] == "block3.1"
        assert [row["name"] for row in document["artefacts"]["fp32"]["rows"]][:3] == [
            "patch_embed1",
            "block1.0",
            "block1.1",
        ]
        assert [step["name"] for step in document["chain"]][-3:] == ["fp32", "fp16", "int8"]
        root = ElementTree.parse(plot).getroot()
        assert root.tag.endswith("svg")
        texts = {element.text for element in root.iter() if element.text}
        assert "fp16: error that each block adds" in texts

    def test_stages_and_the_top_of_them(self, cli: Cli, judged: Subject, copy_of: Copy) -> None:
        path = copy_of(judged)
        words = ("--count", "1", "--level", "stage", "--artefact", "fp16", "--top", "2")
        result = cli("drift", path, *words)
        assert result.exit_code == 0
        rows = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("stage")]
        assert rows[0] == "stage"
        assert len(rows) == 3
        assert "Extra outputs keep a run time from fusing" in " ".join(result.stdout.split())

    def test_numbers_that_make_no_sense(self, cli: Cli, judged: Subject) -> None:
        assert cli("drift", judged.bundle.path, "--top", "-1").exit_code == 2


class TestCheck:
    @pytest.fixture
    def good(self, cli: Cli, judged: Subject, copy_of: Copy, tmp_path: Path) -> tuple[Path, Path]:
        """Return a bundle and the baseline that was written from it."""
        path, baseline = copy_of(judged), tmp_path / "baseline.json"
        words = ("--baseline", baseline, *FEW, "--evaluate", judged.labelled)
        result = cli("check", path, *words, "--update")
        assert result.exit_code == 0
        assert f"Wrote {baseline}; look at it and commit it." in result.stderr
        return path, baseline

    def test_a_baseline_is_written_then_met_then_missed(
        self, cli: Cli, judged: Subject, good: tuple[Path, Path], tmp_path: Path
    ) -> None:
        path, baseline = good
        junit, summary = tmp_path / "out" / "junit.xml", tmp_path / "summary.md"
        words = ("--baseline", baseline, *FEW, "--evaluate", judged.labelled)
        result = cli("check", path, *words, "--json", "--junit", junit)
        assert result.exit_code == 0
        document = json.loads(result.stdout)
        assert misfits(document, "check") == []
        assert document["counts"]["failed"] == document["counts"]["skipped"] == 0
        assert document["counts"]["new"] == 0
        suites = JUnitXml.fromfile(str(junit))
        assert (suites.failures, suites.skipped, suites.errors) == (0, 0, 0)
        assert suites.tests == len(document["rows"]) == document["counts"]["passed"]
        written = json.loads(baseline.read_text())
        written["figures"]["verify/fp16/sqnr_db"]["value"] += 10.0
        written["figures"]["evaluate/int8/top1"]["value"] += 10.0
        baseline.write_text(json.dumps(written))
        summary.write_text("what another step wrote\n")
        worse = cli("check", path, *words, "--junit", junit, "--summary", summary)
        assert worse.exit_code == 1
        assert worse.stderr.splitlines()[-2] == (
            "error: 2 rows failed: evaluate/int8/top1, verify/fp16/sqnr_db."
        )
        failed = [c for s in JUnitXml.fromfile(str(junit)) for c in s if failures_of(c)]
        assert {case.name for case in failed} == {"fp16/sqnr_db", "int8/top1"}
        text = summary.read_text()
        assert text.startswith("what another step wrote\n## ❌ van-deploy: van_digits failed")
        assert "| ❌ | `verify/fp16/sqnr_db` |" in text

    def test_a_broken_artefact_fails_its_gate_and_its_figures(
        self, cli: Cli, good: tuple[Path, Path]
    ) -> None:
        path, baseline = good
        perturbed_in(path)
        result = cli("check", path, "--baseline", baseline, *FEW, "--json", "--allow-skip")
        assert result.exit_code == 1
        rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
        assert rows["gate/verify/fp16"]["outcome"] == "failed"
        assert rows["gate/verify/fp32"]["outcome"] == "passed"
        worse = [name for name, row in rows.items() if row["outcome"] == "failed"]
        assert any(name.startswith("drift/fp16/block3.1.") for name in worse)
        assert not any(name.startswith(("drift/fp32", "drift/int8")) for name in worse)

    def test_what_cannot_be_checked_needs_leave(
        self, cli: Cli, judged: Subject, good: tuple[Path, Path], tmp_path: Path
    ) -> None:
        path, baseline = good
        with_engine(path)
        words = ("--baseline", baseline, *FEW, "--junit", tmp_path / "junit.xml")
        refused = cli("check", path, *words, "--evaluate", judged.labelled)
        assert refused.exit_code == 1
        assert "gate/verify/x: engine not executed: no GPU" in refused.stderr
        assert "--allow-skip would let that pass." in refused.stderr
        assert JUnitXml.fromfile(str(tmp_path / "junit.xml")).failures == 2
        allowed = cli("check", path, *words, "--evaluate", judged.labelled, "--allow-skip")
        assert allowed.exit_code == 0
        suites = JUnitXml.fromfile(str(tmp_path / "junit.xml"))
        assert (suites.failures, suites.skipped) == (0, 2)
        skipped = [c for s in suites for c in s if any(isinstance(r, Skipped) for r in c.result)]
        assert {case.name for case in skipped} == {"verify/x", "evaluate/x"}

    def test_the_wrong_baseline_is_refused(
        self, cli: Cli, judged: Subject, good: tuple[Path, Path], tmp_path: Path
    ) -> None:
        path, baseline = good
        none = cli("check", path, "--baseline", tmp_path / "none.json", *FEW)
        assert none.exit_code == 5
        assert "Make one with --update, look at it, and commit it." in none.stderr
        other = cli("check", path, "--baseline", baseline, "--count", "7")
        assert other.exit_code == 5
        assert "The baseline was measured with other images: " in other.stderr
        broken = tmp_path / "broken.json"
        shutil.copy(baseline, broken)
        broken.write_text(broken.read_text()[:-10])
        assert "is no baseline: " in cli("check", path, "--baseline", broken, *FEW).stderr

    def test_speed_is_compared_beyond_its_spread_only(
        self, cli: Cli, judged: Subject, copy_of: Copy, tmp_path: Path
    ) -> None:
        path, baseline = copy_of(judged), tmp_path / "baseline.json"
        words = ("--baseline", baseline, *FEW, "--speed", "--json")
        assert cli("check", path, *words, "--update").exit_code == 0
        written = json.loads(baseline.read_text())
        figures = {k: v for k, v in written["figures"].items() if k.startswith("speed/")}
        assert set(figures) == {f"speed/{name}/ratio" for name in ("fp32", "fp16", "int8")}
        for figure in figures.values():
            assert figure["spread"] > 0
            figure["value"] *= 1000
            figure["slack"] = 0.0
        baseline.write_text(json.dumps(written))
        result = cli("check", path, *words)
        assert result.exit_code == 1
        rows = json.loads(result.stdout)["rows"]
        assert {r["name"] for r in rows if r["outcome"] == "failed"} == set(figures)


def failures_of(case: object) -> bool:
    return any(isinstance(entry, Failure) for entry in case.result)  # type: ignore[attr-defined]

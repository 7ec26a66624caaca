"""What verify finds of right and broken artefacts, and the part that drift names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from tests.artifacts import Copy, Subject, put
from tests.checks import faults
from tests.checks.conftest import Broken
from van_deploy.bundle import Bundle
from van_deploy.checks.drift import drift_of_bundle
from van_deploy.checks.gates import Allowed, Outcome
from van_deploy.checks.layers import Level
from van_deploy.checks.reference import samples_for
from van_deploy.checks.verdicts import ArtefactVerdict
from van_deploy.checks.verify import verify_bundle
from van_deploy.config import DriftSettings, VerifySettings
from van_deploy.errors import GateFailed
from van_deploy.graph.embed import embed_preprocessing

DIGITS_BLOCKS = [f"block{s}.{b}" for s, depth in enumerate((2, 2, 3, 2), 1) for b in range(depth)]


def verdict_of(whole: Subject, bundle: Bundle, name: str) -> ArtefactVerdict:
    return verify_bundle(bundle, whole.samples, VerifySettings(artefacts=(name,))).artefacts[name]


def worst(whole: Subject, bundle: Bundle, name: str, level: Level = "block") -> str:
    asked = DriftSettings(level=level, artefacts=(name,))
    report = drift_of_bundle(bundle, whole.samples.first(2), asked, loaded=whole.loaded)
    return report.artefacts[name].worst[0].name


def caught(whole: Subject, bundle: Bundle, name: str, block: str) -> None:
    verdict = verdict_of(whole, bundle, name)
    assert verdict.outcome is Outcome.FAIL, verdict.findings
    assert worst(whole, bundle, name) == block


class TestRightArtefacts:
    def test_they_pass_on_the_golden_samples_and_say_where_limits_came_from(
        self, digits: Subject
    ) -> None:
        report = verify_bundle(digits.bundle, digits.samples)
        assert report.passed
        assert report.against == "the golden samples"
        assert report.modules == "model.onnx in ONNX Runtime, which holds on the golden samples"
        for verdict in report.artefacts.values():
            assert verdict.outcome is Outcome.PASS, verdict.failures
            assert [row.batch for row in verdict.batches] == [1, 2, 3, 4, 5, 6]
            assert verdict.margin_db == pytest.approx(3.0, abs=0.01)
            assert verdict.limit is not None
            assert verdict.limit.origin.endswith(" dB recorded when it was made, minus 3")
            assert bool(verdict.modules) == (verdict.artefact != "fp32")

    def test_they_pass_against_the_original_network(self, digits: Subject) -> None:
        samples = samples_for(digits.bundle, digits.loaded, None)
        report = verify_bundle(digits.bundle, samples, loaded=digits.loaded)
        assert report.passed
        assert report.modules == "PyTorch, the rewritten network in float64"
        assert all(len(verdict.modules) > 40 for verdict in report.artefacts.values())
        assert np.array_equal(samples.logits, digits.samples.logits)

    def test_the_shared_network(self, cifar: Subject) -> None:
        report = verify_bundle(cifar.bundle, cifar.samples)
        assert {v.artefact: v.outcome.value for v in report.artefacts.values()} == {
            "fp32": "pass",
            "fp16": "pass",
            "int8": "pass",
        }

    def test_without_a_record_the_floor_alone_holds(self, digits: Subject, copy_of: Copy) -> None:
        """Another runtime, provider or class than the record's."""
        bundle = put(Bundle.open(copy_of(digits)), "fp16", "fp16", digits.graph("fp16"))
        verdict = verdict_of(digits, bundle, "fp16")
        assert verdict.outcome is Outcome.PASS
        assert verdict.limit is not None
        assert (verdict.limit.value, verdict.limit.origin) == (45.0, "floor for fp16")

    def test_an_embedded_graph(self, digits: Subject, broken: Broken) -> None:
        model = embed_preprocessing(digits.graph("fp32"), digits.loaded.preprocessing, "uint8")
        bundle = broken(digits, "fp32-uint8", "fp32", model, embedded="uint8")
        assert verdict_of(digits, bundle, "fp32-uint8").outcome is Outcome.PASS

    def test_a_graph_of_first_classes_alone(self, digits: Subject, copy_of: Copy) -> None:
        copy = Bundle.open(copy_of(digits))
        right = digits.loaded.preprocessing
        for preprocessing, outcome in (
            (right, Outcome.PASS),
            (right.override(mean=(0.9,)), Outcome.FAIL),
        ):
            model = embed_preprocessing(digits.graph("fp32"), preprocessing, "uint8", ("top5",))
            name = f"top5-{outcome.value}"
            bundle = put(copy, name, "fp32", model, embedded="uint8")
            verdict = verdict_of(digits, bundle, name)
            assert verdict.outcome is outcome
            assert verdict.findings[0].rule == "probabilities"


class TestBrokenArtefacts:
    @pytest.mark.parametrize(
        ("precision", "block"),
        [
            *(("fp16", block) for block in DIGITS_BLOCKS[::3]),
            ("fp32", "block1.0"),
            ("fp32", "block4.1"),
        ],
    )
    def test_one_blocks_weights_perturbed_by_1_percent(
        self, digits: Subject, broken: Broken, precision: str, block: str
    ) -> None:
        model = faults.perturbed(digits.graph(precision), block)
        caught(digits, broken(digits, "broken", precision, model), "broken", block)

    def test_a_wrong_mean_and_deviation_inside_the_graph(
        self, digits: Subject, broken: Broken
    ) -> None:
        right = digits.loaded.preprocessing
        model = faults.wrong_normalisation(
            digits.graph("fp32"), (right.mean[0], right.std[0]), (0.5, 0.5)
        )
        caught(digits, broken(digits, "wrong", "fp32", model), "wrong", "patch_embed1")

    def test_a_wrong_mean_in_an_embedded_graph(self, digits: Subject, broken: Broken) -> None:
        wrong = digits.loaded.preprocessing.override(mean=(0.35,))
        model = embed_preprocessing(digits.graph("fp32"), wrong, "uint8")
        bundle = broken(digits, "fp32-uint8", "fp32", model, embedded="uint8")
        verdict = verdict_of(digits, bundle, "fp32-uint8")
        assert verdict.failures[0].startswith("SQNR ")

    def test_a_batch_frozen_inside_the_graph(self, digits: Subject, broken: Broken) -> None:
        model = faults.frozen_batch(digits.graph("fp32"), "block2.1", (1, 32, 8, 8))
        bundle = broken(digits, "frozen", "fp32", model)
        verdict = verdict_of(digits, bundle, "frozen")
        failed = [row.batch for row in verdict.batches if row.outcome is Outcome.FAIL]
        assert failed == [2, 3, 4, 5, 6]
        assert any(text.startswith("batch 2: it does not run: ") for text in verdict.failures)
        assert verdict.failures[-1].startswith("they cannot be compared: does not run at batch 2")

    def test_a_batch_frozen_at_the_input(self, digits: Subject, broken: Broken) -> None:
        model = digits.graph("fp32")
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        verdict = verdict_of(digits, broken(digits, "frozen", "fp32", model), "frozen")
        assert "its batch is frozen at 1" in verdict.failures

    def test_a_graph_that_does_not_load_fails_and_the_others_are_still_judged(
        self, digits: Subject, broken: Broken
    ) -> None:
        model = digits.graph("fp16")
        node = next(node for node in model.graph.node if node.op_type == "Gelu")
        node.op_type = "Gelo"
        bundle = broken(digits, "fp16", "fp16", model)
        report = verify_bundle(
            bundle, digits.samples, VerifySettings(modules=False, artefacts=("fp16", "fp32"))
        )
        assert [v.outcome for v in report.artefacts.values()] == [Outcome.FAIL, Outcome.PASS]
        (failure,) = report.artefacts["fp16"].failures
        assert failure.startswith("it does not load: ONNX Runtime")
        assert "This is an invalid model" in failure
        assert not report

    @pytest.mark.parametrize("norm", ["norm1", "norm4"])
    def test_a_layer_norm_that_overflows_in_fp16(
        self, digits: Subject, broken: Broken, norm: str
    ) -> None:
        """ONNX Runtime's CPU kernels compute it in FP32, so the logits are right."""
        model = faults.overflowing_layer_norm(digits.graph("fp16"), norm)
        bundle = broken(digits, "fp16", "fp16", model)
        caught(digits, bundle, "fp16", norm)
        failures = verdict_of(digits, bundle, "fp16").failures
        assert f"'{norm}.squares' passes 65504, the largest number of FP16" not in failures[1:]
        assert "passes 65504, the largest number of FP16" in failures[0]

    def test_an_overflow_that_cannot_be_looked_for_is_no_pass(
        self, digits: Subject, broken: Broken
    ) -> None:
        """Any exception there meant 'no overflow'."""
        model = digits.graph("fp16")
        model.opset_import[0].version = 17  # no Gelu there, which ONNX Runtime finds in its own
        verdict = verdict_of(digits, broken(digits, "fp16", "fp16", model), "fp16")
        assert verdict.outcome is Outcome.FAIL

    def test_another_mean_in_the_manifest_than_in_the_file(self, digits: Subject) -> None:
        manifest = digits.bundle.manifest
        wrong = replace(manifest.preprocessing, mean=(0.5, 0.5, 0.5))
        bundle = Bundle(digits.bundle.path, manifest.model_copy(update={"preprocessing": wrong}))
        assert (
            "the file was made for mean [0.305, 0.305, 0.305], the manifest says [0.5, 0.5, 0.5]"
            in verdict_of(digits, bundle, "fp32").failures
        )


class TestDrift:
    def test_without_the_network_parts_are_compared_with_model_onnx(
        self, digits: Subject, broken: Broken
    ) -> None:
        bundle = broken(digits, "fp16", "fp16", faults.perturbed(digits.graph("fp16"), "block3.1"))
        report = drift_of_bundle(bundle, digits.samples.first(2))
        assert list(report.artefacts) == ["fp16", "int8"]
        assert report.artefacts["fp16"].worst[0].name == "block3.1"
        assert [link.name for link in report.chain] == ["PyTorch float32", "fp32", "fp16", "int8"]

    def test_a_model_onnx_that_does_not_hold_is_no_reference(
        self, digits: Subject, broken: Broken
    ) -> None:
        model = faults.perturbed(digits.graph("fp32"), "block1.0")
        bundle = broken(digits, "fp32", "fp32", model)
        with pytest.raises(GateFailed, match=r"model\.onnx does not hold on the golden samples"):
            drift_of_bundle(bundle, digits.samples)
        verdict = verdict_of(digits, bundle, "fp16")
        assert verdict.outcome is Outcome.PASS, "its logits are right"
        report = verify_bundle(bundle, digits.samples, VerifySettings(artefacts=("fp16",)))
        assert not report, "its modules were compared with nothing"

    def test_a_wrong_scale_is_named_though_its_error_is_small(
        self, digits: Subject, broken: Broken
    ) -> None:
        layer = "block2.1.mlp.fc2"
        model = faults.scale_doubled(digits.graph("int8"), layer, factor=8)
        bundle = broken(digits, "int8", "int8", model)
        asked = DriftSettings(level="module", artefacts=("int8",))
        report = drift_of_bundle(bundle, digits.samples, asked, loaded=digits.loaded)
        first = report.artefacts["int8"].worst[0]
        assert first.name == layer
        assert "times the one of least error on the golden images" in first.fault


def test_an_engine_that_was_not_run_is_no_pass_unless_named(digits: Subject, copy_of: Copy) -> None:
    """Verify passed with every engine skipped."""
    from tests.artifacts import enter_engine

    bundle = enter_engine(copy_of(digits), "x", made_from="fp16")
    report = verify_bundle(bundle, digits.samples, VerifySettings(modules=False))
    engine = report.artefacts["x"]
    if engine.outcome is not Outcome.SKIPPED:
        pytest.skip("this machine has a GPU")
    assert engine.reason == "engine not executed: no GPU"
    assert not report
    named = replace(report, allowed=Allowed(("engines",)))
    assert named
    assert not replace(report, allowed=Allowed(("runtimes",)))
    asked = VerifySettings(artefacts=("x",), allow_skip=("engines",))
    alone = verify_bundle(bundle, digits.samples, asked)
    assert not alone, "nothing was verified"


def test_logits_of_a_graph_on_disk_are_those_of_the_report(digits: Subject) -> None:
    """The first finding is the SQNR that the record and the table show."""
    verdict = verdict_of(digits, digits.bundle, "int8")
    assert verdict.comparison is not None
    assert verdict.findings[0].value == verdict.comparison.sqnr_db
    assert onnx.load(digits.bundle.verified("int8")).graph.output[0].name == "logits"

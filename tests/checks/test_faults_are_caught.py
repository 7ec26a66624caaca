"""Each deliberately broken artefact is caught by verify, and named by drift."""

from __future__ import annotations

import pytest

from tests.checks import faults
from tests.checks.conftest import Broken, Subject
from van_deploy.bundle import Bundle
from van_deploy.checks.drift import drift_of_bundle
from van_deploy.checks.verify import ArtefactVerdict, verify_bundle
from van_deploy.graph.embed import embed_preprocessing
from van_deploy.model.pixels import normalised

DIGITS_BLOCKS = [f"block{s}.{b}" for s, depth in enumerate((2, 2, 3, 2), 1) for b in range(depth)]


def verdict_of(whole: Subject, bundle: Bundle, name: str) -> ArtefactVerdict:
    report = verify_bundle(bundle, whole.loaded, whole.pictures, artefacts=[name], threads=1)
    return report.artefacts[0]


def worst(whole: Subject, bundle: Bundle, name: str, level: str = "block") -> str:
    images = normalised(whole.pictures.pixels[:4], whole.loaded.preprocessing)
    report = drift_of_bundle(
        bundle,
        whole.loaded,
        images,
        level=level,  # type: ignore[arg-type]
        artefacts=[name],
    )
    return report.artefacts[0].worst[0].name


def caught(whole: Subject, bundle: Bundle, name: str, block: str) -> None:
    verdict = verdict_of(whole, bundle, name)
    assert verdict.outcome == "failed", verdict
    assert worst(whole, bundle, name) == block


def test_artefacts_that_are_right_pass(digits: Subject) -> None:
    report = verify_bundle(digits.bundle, digits.loaded, digits.pictures, threads=1)
    outcomes = {verdict.artefact: verdict.outcome for verdict in report.artefacts}
    assert outcomes == {"fp32": "passed", "fp16": "passed", "int8": "passed"}
    for verdict in report.artefacts:
        assert verdict.margin_db is not None
        assert verdict.module_margin_db is not None
        assert verdict.margin_db > 5
        assert verdict.module_margin_db > 2
        assert [batch.batch for batch in verdict.batches] == [1, 2, 3, 4, 5, 6]
    assert report.passed


@pytest.mark.parametrize("block", DIGITS_BLOCKS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_blocks_weights_perturbed_by_1_percent(
    digits: Subject, broken: Broken, precision: str, block: str
) -> None:
    model = faults.perturbed(digits.graph(precision), block)
    caught(digits, broken(digits, "fp16", precision, model), "fp16", block)


def test_a_wrong_mean_and_deviation_inside_the_graph(digits: Subject, broken: Broken) -> None:
    right = digits.loaded.preprocessing
    model = faults.wrong_normalisation(
        digits.graph("fp32"), (right.mean[0], right.std[0]), (0.5, 0.5)
    )
    caught(digits, broken(digits, "wrong", "fp32", model), "wrong", "patch_embed1")


def test_a_wrong_mean_in_an_embedded_graph(digits: Subject, broken: Broken) -> None:
    wrong = digits.loaded.preprocessing.override(mean=(0.35,))
    model = embed_preprocessing(digits.graph("fp32"), wrong, "uint8")
    bundle = broken(digits, "fp32-uint8", "fp32", model, embedded="uint8")
    verdict = verdict_of(digits, bundle, "fp32-uint8")
    assert verdict.outcome == "failed"
    assert any(text.startswith("SQNR") for text in verdict.failures)


def test_an_embedded_graph_that_is_right(digits: Subject, broken: Broken) -> None:
    model = embed_preprocessing(digits.graph("fp32"), digits.loaded.preprocessing, "uint8")
    bundle = broken(digits, "fp32-uint8", "fp32", model, embedded="uint8")
    assert verdict_of(digits, bundle, "fp32-uint8").outcome == "passed"


def test_a_manifest_with_another_mean_than_the_file(digits: Subject, broken: Broken) -> None:
    bundle = broken(digits, "fp16", "fp16", digits.graph("fp16"))
    manifest = {**bundle.manifest, "preprocessing": {**bundle.manifest["preprocessing"]}}
    manifest["preprocessing"]["mean"] = [0.5, 0.5, 0.5]
    verdict = verdict_of(digits, Bundle(bundle.path, manifest), "fp32")
    assert verdict.outcome == "failed"
    assert (
        "the file was made for mean [0.305, 0.305, 0.305], the manifest says [0.5, 0.5, 0.5]"
        in verdict.failures
    )

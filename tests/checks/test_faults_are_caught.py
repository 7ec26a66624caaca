"""Each deliberately broken artefact is caught by verify, and named by drift."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import ModelProto

from tests.artifacts import Subject
from tests.checks import faults
from tests.checks.conftest import Broken
from van_deploy.bundle import Bundle
from van_deploy.checks.drift import drift_of_bundle
from van_deploy.checks.steps import faults_of, steps_of_graph
from van_deploy.checks.verdicts import ArtefactVerdict
from van_deploy.checks.verify import verify_bundle
from van_deploy.data import check_images
from van_deploy.graph.embed import embed_preprocessing

DIGITS_BLOCKS = [f"block{s}.{b}" for s, depth in enumerate((2, 2, 3, 2), 1) for b in range(depth)]
CIFAR_BLOCKS = ["block1.1", "block3.4", "block4.0"]


def verdict_of(whole: Subject, bundle: Bundle, name: str) -> ArtefactVerdict:
    report = verify_bundle(bundle, whole.loaded, whole.pictures, artefacts=[name], threads=1)
    return report.artefacts[0]


def worst(whole: Subject, bundle: Bundle, name: str, level: str = "block") -> str:
    images = whole.pictures.inputs[:2]
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


@pytest.mark.parametrize(
    ("precision", "block"),
    [*(("fp16", block) for block in DIGITS_BLOCKS), ("fp32", "block1.0"), ("fp32", "block4.1")],
)
def test_one_blocks_weights_perturbed_by_1_percent(
    digits: Subject, broken: Broken, precision: str, block: str
) -> None:
    model = faults.perturbed(digits.graph(precision), block)
    caught(digits, broken(digits, "broken", precision, model), "broken", block)


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


def test_swapped_channels(digits: Subject, broken: Broken) -> None:
    """Grey digits cannot show it, so the network looks at photographs."""
    photographs = check_images("", digits.loaded.preprocessing, 8)
    whole = replace(digits, pictures=photographs)
    bundle = broken(digits, "fp16", "fp16", faults.swapped_channels(digits.graph("fp16")))
    caught(whole, bundle, "fp16", "patch_embed1")


def test_an_embedded_graph_that_is_right(digits: Subject, broken: Broken) -> None:
    model = embed_preprocessing(digits.graph("fp32"), digits.loaded.preprocessing, "uint8")
    bundle = broken(digits, "fp32-uint8", "fp32", model, embedded="uint8")
    assert verdict_of(digits, bundle, "fp32-uint8").outcome == "passed"


def test_a_manifest_with_another_mean_than_the_file(digits: Subject, broken: Broken) -> None:
    bundle = broken(digits, "fp16", "fp16", digits.graph("fp16"))
    other = replace(bundle.manifest.preprocessing, mean=(0.5, 0.5, 0.5))
    manifest = bundle.manifest.model_copy(update={"preprocessing": other})
    verdict = verdict_of(digits, Bundle(bundle.path, manifest), "fp32")
    assert verdict.outcome == "failed"
    assert (
        "the file was made for mean [0.305, 0.305, 0.305], the manifest says [0.5, 0.5, 0.5]"
        in verdict.failures
    )


def test_a_batch_frozen_inside_the_graph(digits: Subject, broken: Broken) -> None:
    model = faults.frozen_batch(digits.graph("fp32"), "block2.1", (1, 32, 8, 8))
    bundle = broken(digits, "frozen", "fp32", model)
    verdict = verdict_of(digits, bundle, "frozen")
    failed = [batch.batch for batch in verdict.batches if batch.failures]
    assert failed == [2, 3, 4, 5, 6]
    assert verdict.outcome == "failed"
    assert worst(digits, bundle, "frozen") == "norm2"  # the part that reads the reshaped tensor


def test_a_batch_frozen_at_the_input(digits: Subject, broken: Broken) -> None:
    model = digits.graph("fp32")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    verdict = verdict_of(digits, broken(digits, "frozen", "fp32", model), "frozen")
    assert "its batch is frozen at 1" in verdict.failures


def test_a_graph_that_does_not_load_fails_and_the_others_are_still_judged(
    digits: Subject, broken: Broken
) -> None:
    model = digits.graph("fp16")
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    node.op_type = "Gelo"
    bundle = broken(digits, "fp16", "fp16", model)
    report = verify_bundle(
        bundle, digits.loaded, digits.pictures, modules=False, artefacts=["fp16", "fp32"]
    )
    assert [verdict.outcome for verdict in report.artefacts] == ["failed", "passed"]
    (failure,) = report.artefacts[0].failures
    assert failure.startswith("it does not load: ONNX Runtime")
    assert "This is an invalid model" in failure


@pytest.mark.parametrize("norm", ["norm1", "norm2", "norm3", "norm4"])
def test_a_layer_norm_that_overflows_in_fp16(digits: Subject, broken: Broken, norm: str) -> None:
    model = faults.overflowing_layer_norm(digits.graph("fp16"), norm)
    caught(digits, broken(digits, "fp16", "fp16", model), "fp16", norm)


@pytest.mark.parametrize(
    ("of", "layer"),
    [
        ("activation", "block1.0.attn.proj_1"),
        ("activation", "block2.1.mlp.fc2"),
        ("activation", "block4.1.attn.spatial_gating_unit.conv1"),
        ("weight", "block1.1.mlp.fc1"),
        ("weight DQ", "block3.2.attn.proj_2"),
    ],
)
def test_int8_scales_doubled_in_one_layer(
    digits: Subject, broken: Broken, of: str, layer: str
) -> None:
    model = faults.scale_doubled(digits.graph("int8"), layer, of)
    bundle = broken(digits, "int8", "int8", model)
    verdict = verdict_of(digits, bundle, "int8")
    assert verdict.outcome == "failed"
    named = worst(digits, bundle, "int8", "module")
    if of == "weight DQ":  # the weights are twice as large: no step is wrong, the result is
        assert named.startswith(layer)
        return
    assert verdict.steps[0].fault
    assert layer in verdict.steps[0].modules
    assert named in verdict.steps[0].modules


def test_every_step_of_a_right_graph_is_the_recorded_one(digits: Subject) -> None:
    images = digits.pictures.inputs[:2]
    rows = steps_of_graph(digits.graph("int8"), images, digits.bundle.artefact("int8"))
    assert [row.fault for row in rows if row.fault] == []
    activations = [row for row in rows if row.halving_gain_db is not None]
    weights = [row for row in rows if row.largest_code is not None]
    assert len(activations) == 9 * 5
    assert all(row.recorded is not None for row in activations)
    assert {row.largest_code for row in weights} == {127}


def test_each_doubled_step_is_seen_whatever_the_layer(digits: Subject) -> None:
    artefact, none = digits.bundle.artefact("int8"), np.empty((0, 3, 64, 64), np.float32)
    whole = digits.graph("int8")
    convs = [node for node in whole.graph.node if node.op_type == "Conv"]
    layers = [node.name for node in convs if node.input[1].endswith(".dequantized")]
    assert len(layers) == 9 * 5
    for index, layer in enumerate(layers):
        for of in ("activation", "weight")[index % 2 :: 2]:  # each layer once, in turns
            copy = ModelProto.FromString(whole.SerializeToString())
            model = faults.scale_doubled(copy, layer, of)
            assert layer in faults_of(steps_of_graph(model, none, artefact)), (of, layer)


@pytest.mark.slow
class TestTheSharedNetwork:
    """The same on a network that was trained on photographs."""

    def test_artefacts_that_are_right_pass(self, cifar: Subject) -> None:
        report = verify_bundle(cifar.bundle, cifar.loaded, cifar.pictures, threads=1)
        assert {v.artefact: v.outcome for v in report.artefacts} == {
            "fp32": "passed",
            "fp16": "passed",
            "int8": "passed",
        }

    @pytest.mark.parametrize(("precision", "block"), [("fp16", "block1.1"), ("fp32", "block3.4")])
    def test_one_blocks_weights_perturbed_by_1_percent(
        self, cifar: Subject, broken: Broken, precision: str, block: str
    ) -> None:
        model = faults.perturbed(cifar.graph(precision), block)
        caught(cifar, broken(cifar, "broken", precision, model), "broken", block)

    def test_swapped_channels(self, cifar: Subject, broken: Broken) -> None:
        bundle = broken(cifar, "fp16", "fp16", faults.swapped_channels(cifar.graph("fp16")))
        caught(cifar, bundle, "fp16", "patch_embed1")

    def test_a_wrong_mean_and_deviation(self, cifar: Subject, broken: Broken) -> None:
        right = cifar.loaded.preprocessing
        model = faults.wrong_normalisation(
            cifar.graph("fp32"), (right.mean[0], right.std[0]), (0.5, 0.5)
        )
        caught(cifar, broken(cifar, "wrong", "fp32", model), "wrong", "patch_embed1")

    def test_a_frozen_batch(self, cifar: Subject, broken: Broken) -> None:
        model = faults.frozen_batch(cifar.graph("fp32"), "block3.2", (1, 160, 4, 4))
        caught(cifar, broken(cifar, "frozen", "fp32", model), "frozen", "block3.3")

    def test_a_layer_norm_that_overflows(self, cifar: Subject, broken: Broken) -> None:
        model = faults.overflowing_layer_norm(cifar.graph("fp16"), "norm2")
        caught(cifar, broken(cifar, "fp16", "fp16", model), "fp16", "norm2")

    def test_int8_scales_doubled_in_one_layer(self, cifar: Subject, broken: Broken) -> None:
        model = faults.scale_doubled(cifar.graph("int8"), "block3.4.mlp.fc1")
        caught(cifar, broken(cifar, "int8", "int8", model), "int8", "block3.4")


def test_a_graph_of_first_classes_answers_the_canary(digits: Subject, broken: Broken) -> None:
    right = digits.loaded.preprocessing
    model = embed_preprocessing(digits.graph("fp32"), right, "uint8", ("top5",))
    bundle = broken(digits, "fp32-uint8", "fp32", model, embedded="uint8")
    verdict = verdict_of(digits, bundle, "fp32-uint8")
    assert verdict.outcome == "skipped"
    assert verdict.reason.endswith("no logits; only the canary was asked")
    assert verdict.canary is not None
    assert verdict.canary < 1e-4


def test_a_graph_of_first_classes_with_a_wrong_mean(digits: Subject, broken: Broken) -> None:
    wrong = digits.loaded.preprocessing.override(mean=(0.6,))
    model = embed_preprocessing(digits.graph("fp32"), wrong, "uint8", ("top5",))
    bundle = broken(digits, "fp32-uint8", "fp32", model, embedded="uint8")
    verdict = verdict_of(digits, bundle, "fp32-uint8")
    assert verdict.outcome == "failed"
    assert verdict.failures[0].startswith("the canary 'canary.png': class ")

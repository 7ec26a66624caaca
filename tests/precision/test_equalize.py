"""Equalising: the same function to the last digits of float64, and less error when rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from onnx import ModelProto, TensorProto, checker, numpy_helper

from tests.precision.conftest import Digits
from van_deploy.errors import ConversionError, ImageError
from van_deploy.metrics import sqnr_db
from van_deploy.precision.absorb import Absorber
from van_deploy.precision.channels import ChannelHistogram, best_steps, rounding_error
from van_deploy.precision.choices import SCALE_LIMIT
from van_deploy.precision.correct import corrected_biases
from van_deploy.precision.equalize import (
    EqualizeReport,
    EqualizeSettings,
    equalize,
)
from van_deploy.precision.initial import initial_plan, nodes_in_scope
from van_deploy.precision.quantize import qdq_from_plan
from van_deploy.precision.ranges import record_ranges
from van_deploy.precision.rounded import RoundedNetwork
from van_deploy.precision.torch_graph import TorchGraph
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

NONE = EqualizeSettings(spatial=False, gate=False, centre=False, shift=False, stretch=False)
SWITCHES = [field.name for field in fields(EqualizeSettings)]


def in_float64(model: ModelProto) -> ModelProto:
    """Return ``model`` with every float32 it stores as float64, for PyTorch to run."""
    result = ModelProto()
    result.CopyFrom(model)
    for stored in result.graph.initializer:
        if stored.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(stored).astype(np.float64)
            stored.CopyFrom(numpy_helper.from_array(values, stored.name))
    return result


def logits(model: ModelProto, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    graph = TorchGraph(model)
    with torch.inference_mode():
        found = graph.run(torch.from_numpy(images).to(graph.dtype))[0].numpy()
    return np.asarray(found, np.float64)


def equalized(
    model: ModelProto, digits: Digits, settings: EqualizeSettings, scope: str = "pointwise"
) -> EqualizeReport:
    return equalize(model, [digits.images[:16]], nodes_in_scope(model, scope), settings)


@pytest.mark.parametrize("scope", ["pointwise", "all"])
@pytest.mark.parametrize("switch", [*SWITCHES, "all of them"])
def test_it_is_the_same_function(
    digits_graph: ModelProto,
    calibration_digits: Digits,
    heldout_digits: Digits,
    switch: str,
    scope: str,
) -> None:
    settings = replace(NONE, **{switch: True}) if switch in SWITCHES else EqualizeSettings()
    original = in_float64(digits_graph)
    report = equalized(original, calibration_digits, settings, scope)
    before, after = (logits(model, heldout_digits.images[:4]) for model in (original, report.model))
    assert report.modified
    assert np.abs(after - before).max() / np.abs(before).max() <= 1e-10
    assert not np.array_equal(after, before)


def test_the_graph_stays_valid_and_onnx_runtime_agrees(
    digits_graph: ModelProto, calibration_digits: Digits, heldout_digits: Digits
) -> None:
    report = equalized(digits_graph, calibration_digits, EqualizeSettings())
    checker.check_model(report.model, full_check=True)
    images = heldout_digits.images[:8]
    with OnnxRuntimeRunner(digits_graph, threads=1) as runner:
        before = runner.run(images)
    with OnnxRuntimeRunner(report.model, threads=1) as runner:
        after = runner.run(images)
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def test_the_model_it_was_given_is_not_changed(
    digits_graph: ModelProto, calibration_digits: Digits
) -> None:
    before = digits_graph.SerializeToString()
    equalized(digits_graph, calibration_digits, EqualizeSettings())
    assert digits_graph.SerializeToString() == before


def test_each_switch_changes_its_own_tensors(
    digits_graph: ModelProto, calibration_digits: Digits
) -> None:
    def kinds(**switches: bool) -> set[str]:
        report = equalized(digits_graph, calibration_digits, replace(NONE, **switches))
        assert report.additions == sum(tensor.added for tensor in report.tensors)
        assert {tensor.kind for tensor in report.tensors if tensor.added} <= {"gelu"}
        nodes = len(report.model.graph.node) - len(digits_graph.graph.node)
        assert nodes == report.additions
        return {tensor.kind for tensor in report.tensors}

    assert kinds() == set()
    assert kinds(spatial=True) == {"spatial"}
    assert kinds(gate=True) == {"gate"}
    assert kinds(centre=True) == {"spatial", "stream"}
    assert kinds(shift=True) == {"gelu"}
    assert kinds(stretch=True) == {"gelu"}


def test_the_stream_ends_where_it_was(digits_graph: ModelProto, calibration_digits: Digits) -> None:
    """The tensors that the LayerNorms read are not offset: nothing could return that."""
    report = equalized(digits_graph, calibration_digits, EqualizeSettings())
    ends = {n.input[0] for n in digits_graph.graph.node if n.op_type == "Transpose"}
    assert ends
    assert not ends & {tensor.name for tensor in report.tensors}


def test_it_rounds_better(
    digits_graph: ModelProto, calibration_digits: Digits, heldout_digits: Digits
) -> None:
    quality = {}
    for name, settings in (("plain", NONE), ("equalised", EqualizeSettings())):
        model = equalized(digits_graph, calibration_digits, settings).model
        plan = initial_plan(model, record_ranges(model, calibration_digits.batches(), threads=1))
        plan = corrected_biases(plan, torch.from_numpy(calibration_digits.images[:32]))
        with torch.inference_mode():
            found = RoundedNetwork(plan)(torch.from_numpy(heldout_digits.images)).numpy()
        quality[name] = sqnr_db(logits(digits_graph, heldout_digits.images), found)
    assert quality["equalised"] > quality["plain"] + 1.0


def test_tensorrt_stretches_and_shifts_in_the_kernel_it_has_anyway(
    digits_graph: ModelProto,
    calibration_digits: Digits,
    rtx_plan: Callable[[ModelProto], bytes],
) -> None:
    """The plan holds the source of its pointwise kernels, which are counted."""
    kernels = []
    for settings in (
        replace(EqualizeSettings(), shift=False, stretch=False),
        EqualizeSettings(shift=True, stretch=True),
    ):
        report = equalized(digits_graph, calibration_digits, settings)
        ranges = record_ranges(report.model, calibration_digits.batches()[:1], threads=1)
        plan = rtx_plan(qdq_from_plan(initial_plan(report.model, ranges)))
        kernels.append(plan.count(b"__global__"))
    assert report.additions == 18  # a Mul and an Add for each of 9 blocks
    assert kernels[0] == kernels[1] > 50


def test_predicted_gains_are_gains_and_factors_are_bounded(
    digits_graph: ModelProto, calibration_digits: Digits
) -> None:
    report = equalized(digits_graph, calibration_digits, EqualizeSettings())
    assert all(tensor.gain_db > 0 for tensor in report.tensors)
    assert report.as_dict()["additions"] == report.additions > 0
    before = {t.name: t for t in digits_graph.graph.initializer}
    for stored in report.model.graph.initializer:
        name = stored.name
        if name.endswith("conv_spatial.weight"):
            ratio = numpy_helper.to_array(stored) / numpy_helper.to_array(before[name])
            assert np.abs(np.log2(np.abs(ratio))).max() <= np.log2(SCALE_LIMIT) + 1e-3
            assert (ratio > 0).all()


def test_a_dead_channel_does_no_harm(digits_graph: ModelProto, calibration_digits: Digits) -> None:
    model = in_float64(digits_graph)
    for stored in model.graph.initializer:
        if stored.name.endswith(("conv_spatial.weight", "conv1.weight", "conv1.bias")):
            values = numpy_helper.to_array(stored).copy()
            values[0] = 0.0
            stored.CopyFrom(numpy_helper.from_array(values, stored.name))
    report = equalized(model, calibration_digits, EqualizeSettings())
    before = logits(model, calibration_digits.images[:4])
    after = logits(report.model, calibration_digits.images[:4])
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() / np.abs(before).max() <= 1e-10


def test_no_images_is_an_error(digits_graph: ModelProto) -> None:
    with pytest.raises(ImageError) as refused:
        equalize(digits_graph, [], nodes_in_scope(digits_graph))
    assert str(refused.value) == (
        "There is no image to equalise with.\nPass a folder with --images DIR."
    )


def test_an_unknown_operator_is_named(digits_graph: ModelProto) -> None:
    model = ModelProto()
    model.CopyFrom(digits_graph)
    model.graph.node[2].op_type = "Celu"
    with pytest.raises(ConversionError) as refused:
        TorchGraph(model)
    assert refused.value.message == (
        "The operator Celu of 'block1.0.attn.activation' is none that a VAN needs."
    )


def test_what_cannot_be_absorbed_is_refused(digits_graph: ModelProto) -> None:
    absorber = Absorber(digits_graph)
    gelu, stream = "block1.0.mlp.act", "patch_embed1.proj"
    padded = "block1.0.mlp.fc1"
    assert absorber.divider(gelu) is None
    assert absorber.subtractor(gelu) is None
    assert absorber.divider(stream) is None  # the shortcut cannot multiply again
    assert absorber.subtractor(padded) is None  # its zeros would have to be offset too
    assert absorber.divider(padded) is not None
    assert absorber.subtractor("images") is None
    assert not absorber.open_ended("block1.0.attn.activation")  # the gate reads it too
    with pytest.raises(ValueError, match="nothing can divide"):
        absorber.divide_(gelu, np.ones(64))


# --- the histograms of channels ---------------------------------------------------------------


def test_histograms_count_every_value_of_every_channel() -> None:
    values = np.random.default_rng(0).normal(size=(3, 5, 7, 7)).astype(np.float32)
    values[:, 1] *= 1e-3
    values[:, 2] = 0.0
    values[:, 3] += 4.0
    histogram = ChannelHistogram.empty(5)
    histogram.add_(values)
    rows = values.transpose(1, 0, 2, 3).reshape(5, -1)
    assert (histogram.counts.sum(axis=1) == rows.shape[1]).all()
    assert np.array_equal(histogram.minimum, rows.min(axis=1))
    assert np.array_equal(histogram.maximum, rows.max(axis=1))
    assert np.allclose(histogram.mean, rows.mean(axis=1), atol=1e-6)


def test_the_predicted_error_is_about_the_real_one() -> None:
    generator = np.random.default_rng(1)
    values = generator.standard_t(3, size=(8, 4, 64, 64)).astype(np.float32)
    values *= np.array([0.1, 1.0, 3.0, 10.0], np.float32)[:, None, None]
    histogram = ChannelHistogram.empty(4)
    histogram.add_(values)
    steps, errors = best_steps(histogram, np.zeros(4))
    rows = values.transpose(1, 0, 2, 3).reshape(4, -1)
    rounded = np.clip(np.rint(rows / steps[:, None]), -127, 127) * steps[:, None]
    real = np.square(rounded - rows).mean(axis=1)
    assert (np.abs(10 * np.log10(errors / real)) < 1.0).all()
    covering = np.abs(rows).max(axis=1) / 127
    assert (errors < rounding_error(histogram.filled(), np.zeros(4), covering)[0]).all()

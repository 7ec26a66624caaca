"""BF16 graphs: their types, how they are emulated where nothing runs them, and their quality."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, checker, helper

from tests.artifacts import Copy
from tests.conftest import Cli
from tests.precision.conftest import Digits
from tests.precision.test_fp16 import scaled
from van_deploy.bundle import Bundle
from van_deploy.checks.golden import golden_samples
from van_deploy.checks.graphs import quiet_session, run_taps, with_taps
from van_deploy.config import PrecisionSettings
from van_deploy.errors import ConversionError
from van_deploy.graph.bfloat16 import emulated_bf16
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.fold import fold_van
from van_deploy.graph.rebuilt import van_from_onnx
from van_deploy.metrics import sqnr_db
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.precision.comparison import logits_session
from van_deploy.precision.fp16 import DEFAULT_KEEP, bf16_from_fp32, kept_nodes
from van_deploy.precision.observers import observe
from van_deploy.precision.pipeline import quantize_bundle
from van_deploy.precision.range_audit import audit_ranges
from van_deploy.runners.network import Network

FLOAT, BFLOAT16 = TensorProto.FLOAT, TensorProto.BFLOAT16


@pytest.fixture(scope="module")
def half(digits_graph: ModelProto) -> ModelProto:
    return bf16_from_fp32(digits_graph, kept_nodes(digits_graph, DEFAULT_KEEP))


@pytest.fixture(scope="module")
def bf16_bundle(digits_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    import shutil

    path = tmp_path_factory.mktemp("bf16") / "b"
    shutil.copytree(digits_bundle.path, path)
    settings = PrecisionSettings().of("bf16")
    assert quantize_bundle(path, settings)
    return Bundle.open(path)


def test_its_types_stand_in_the_file(digits_graph: ModelProto, half: ModelProto) -> None:
    checker.check_model(half, full_check=True)
    kept = kept_nodes(digits_graph, DEFAULT_KEEP)
    stored = {t.name: t.data_type for t in half.graph.initializer}
    for node in digits_graph.graph.node:
        kinds = [stored[name] for name in node.input if stored.get(name) in {FLOAT, BFLOAT16}]
        assert all(kind == (FLOAT if node.name in kept else BFLOAT16) for kind in kinds)
    assert half.opset_import[0].version == 22
    edges = (half.graph.input[0], half.graph.output[0])
    assert [edge.type.tensor_type.elem_type for edge in edges] == [FLOAT, FLOAT]
    casts = Counter(node.op_type for node in half.graph.node)["Cast"]
    assert casts == 8  # into and out of four norms' FP32, and the images


def test_the_emulation_rounds_every_result_and_nothing_else(
    half: ModelProto, heldout_digits: Digits
) -> None:
    emulation = emulated_bf16(half)
    checker.check_model(emulation, full_check=True)
    operators = Counter(node.op_type for node in half.graph.node)
    emulated = Counter(node.op_type for node in emulation.graph.node)
    assert {k: n for k, n in emulated.items() if k != "Cast"} == {
        k: n for k, n in operators.items() if k != "Cast"
    }
    names = ["block1.0.attn.proj_1", "block1.0.attn.spatial_gating_unit", "block3.0"]
    taps = dict(
        run_taps(
            quiet_session(with_taps(half, [*names, "norm4.layernormalization"])),
            {"images": heldout_digits.images[:2]},
        )
    )
    for name in names:
        bits = taps[name].astype(np.float32).view(np.uint32)
        assert not (bits & 0xFFFF).any(), name  # a BF16 number is the upper half of an FP32 one
    kept = taps["norm4.layernormalization"].astype(np.float32).view(np.uint32)
    assert (kept & 0xFFFF).any()


def test_one_convolution_is_emulated_as_it_would_be_computed() -> None:
    import ml_dtypes
    from onnx import numpy_helper

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 4, 1, 1)).astype(ml_dtypes.bfloat16)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")],
        "g",
        [helper.make_tensor_value_info("x", BFLOAT16, (1, 4, 2, 2))],
        [helper.make_tensor_value_info("y", BFLOAT16, (1, 3, 2, 2))],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
    x = rng.standard_normal((1, 4, 2, 2)).astype(np.float32)
    found = quiet_session(model).run(None, {"x": x})[0]
    given = x.astype(ml_dtypes.bfloat16).astype(np.float64)
    exact = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0].astype(np.float64), given)
    assert found.dtype == np.float32
    assert np.array_equal(found, exact.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_it_answers_as_fp32_does(
    digits_graph: ModelProto, half: ModelProto, heldout_digits: Digits
) -> None:
    expected, found = (
        logits_session(model, fuse=False, threads=1)(heldout_digits.images)
        for model in (digits_graph, half)
    )
    assert sqnr_db(expected, found) > 50


@pytest.mark.parametrize("opset", [18, 23])
def test_other_opsets_are_raised_if_need_be(
    van_digits: LoadedVan, heldout_digits: Digits, opset: int
) -> None:
    import torch

    images = torch.from_numpy(heldout_digits.images[:2])
    graph = onnx_from_van(fold_van(van_digits.model, images[:1]).model, 64, opset=opset)
    half = bf16_from_fp32(graph, kept_nodes(graph, DEFAULT_KEEP))
    checker.check_model(half, full_check=True)
    assert half.opset_import[0].version == max(opset, 22)
    expected = logits_session(graph, fuse=False)(images.numpy())
    assert sqnr_db(expected, logits_session(half, fuse=False)(images.numpy())) > 45


def test_too_old_an_opset_is_refused(van_digits: LoadedVan, heldout_digits: Digits) -> None:
    import torch

    images = torch.from_numpy(heldout_digits.images[:1])
    graph = onnx_from_van(fold_van(van_digits.model, images).model, 64, opset=17)
    with pytest.raises(ConversionError) as caught:
        bf16_from_fp32(graph)
    assert str(caught.value) == (
        "The graph has opset 17; BF16 convolutions need 22, and only graphs from 18 on can be "
        "raised to it.\nExport it again with --opset 20."
    )


class TestBundle:
    def test_it_is_made_judged_and_said_to_be_emulated(self, bf16_bundle: Bundle) -> None:
        artefact = bf16_bundle.artefact("bf16")
        assert (artefact.precision, artefact.file) == ("bf16", "model.bf16.onnx")
        names = [row["name"] for row in artefact.quantization["comparison"]]
        assert names == ["fp32", "BF16 emulated"]
        assert artefact.golden_sqnr_db["ort-cpu/bf16"] > 50

    def test_the_network_runs_it_emulated(self, bf16_bundle: Bundle) -> None:
        samples = golden_samples(bf16_bundle)
        with Network(bf16_bundle, "bf16") as network:
            found = network.run(samples.inputs)["logits"]
            assert network.described == "ort-cpu, BF16 emulated"
        assert sqnr_db(samples.logits, found) > 50

    def test_the_commands_serve_it_and_say_so(self, bf16_bundle: Bundle, cli: Cli) -> None:
        verified = cli("verify", bf16_bundle.path, "--artefact", "bf16")
        assert verified.exit_code == 0, verified.stdout
        assert "BF16 emulated" in " ".join(verified.stdout.split())
        drift = cli("drift", bf16_bundle.path, "--artefact", "bf16", "--against", "golden")
        assert drift.exit_code == 0, drift.stdout
        inspected = cli("inspect", bf16_bundle.path / "model.bf16.onnx", "--json")
        assert "bfloat16" in inspected.stdout

    def test_options_for_others_are_refused(self, digits_bundle: Bundle, cli: Cli) -> None:
        path = digits_bundle.path
        result = cli("quantize", path, "--precision", "bf16", "--half-io")
        assert result.exit_code == 2
        assert "--half-io is for FP16, and --precision is bf16." in " ".join(result.stderr.split())
        result = cli("quantize", path, "--precision", "bf16", "--target", "cpu")
        assert result.exit_code == 2
        assert "BF16 makes no sense for --target cpu" in " ".join(result.stderr.split())


def test_where_fp16_does_not_fit_bf16_is_advised(
    digits_graph: ModelProto, van_digits: LoadedVan, calibration_digits: Digits
) -> None:
    name = "block2.0.attn.spatial_gating_unit.conv0"
    factors: Mapping[str, float] = {
        f"{name}.weight": 2.0**15,
        f"{name}.bias": 2.0**15,
        "block2.0.attn.spatial_gating_unit.conv_spatial.weight": 2.0**-15,
    }
    loud = scaled(digits_graph, factors)
    found = observe(van_from_onnx(loud, van_digits.config), calibration_digits.batches(), ())
    advice = audit_ranges(loud, found, (), 64).as_dict()["advice"]
    assert advice == (
        "FP16 cannot hold 1 tensor or weight, and BF16 can, with FP32's own range: compare with "
        "`van-deploy quantize --precision bf16`"
    )
    half = bf16_from_fp32(loud, kept_nodes(loud, DEFAULT_KEEP))
    expected, actual = (
        logits_session(model, fuse=False)(calibration_digits.images[:8]) for model in (loud, half)
    )
    assert sqnr_db(expected, actual) > 45


def test_an_engine_is_built_of_it(bf16_bundle: Bundle, copy_of: Copy, cli: Cli) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    path: Path = copy_of(bf16_bundle)
    result = cli("build", path, "--precision", "bf16", "--target", "sm_89")
    assert result.exit_code == 0, result.stderr
    [engine] = [a for a in Bundle.open(path).artefacts.values() if a.kind == "engine"]
    assert engine.precision == "bf16"

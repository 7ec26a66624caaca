"""The contenders of a bundle, why others are skipped, and their selection."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.artifacts import Copy
from tests.each import each
from van_deploy.bench.contenders import list_contenders, select_contenders
from van_deploy.bench.document import Contender
from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.config import BenchSettings
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.errors import BundleError, MissingDependency, UsageError
from van_deploy.runners.base import CudaOptions
from van_deploy.runners.onnxruntime import CUDA

HAS_GPU = bool((driver := nvidia_driver()) and driver.gpus)
NAMES = ("pytorch", "pytorch-compile", "ort-cpu/fp32", "ort-cpu/int8-cpu")
READY = {name: Contender(name, "onnxruntime", "fp32") for name in NAMES}
SKIPPED = {"openvino/fp32": "OpenVINO is not installed"}


@each(
    ("patterns", "names"),
    [
        ("", (*NAMES, *SKIPPED)),
        ("pytorch", ("pytorch",)),
        ("pytorch*", ("pytorch", "pytorch-compile")),
        ("ort-cpu", ("ort-cpu/fp32", "ort-cpu/int8-cpu")),
        ("*/int8* pytorch", ("pytorch", "ort-cpu/int8-cpu")),
        ("*/fp32", ("ort-cpu/fp32", "openvino/fp32")),
        ("tvm", "There is no runner 'tvm'."),
        ("openvino", "The runner 'openvino/fp32' cannot start: OpenVINO is not installed."),
    ],
)
def test_contenders_are_selected_by_name_runtime_or_pattern(patterns: str, names: Any) -> None:
    try:
        ready, skipped = select_contenders((READY, SKIPPED), patterns.split())
        result: object = (*ready, *skipped)
    except (UsageError, MissingDependency) as error:
        result = error.message
    assert result == names


def with_artifacts(copy: Path, artifacts: Callable[[dict[str, Any]], dict[str, Any]]) -> Bundle:
    """Return a copy of a bundle with other artifacts in its manifest, all of the same file."""
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["artifacts"] = artifacts(manifest["artifacts"]["fp32"])
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(copy)


def compiled(kind: str, target: str, low: int, high: int) -> dict[str, Any]:
    profile = {"min": low, "opt": high, "max": high}
    engine = {"backend": f"{kind} 1", "targets": [target], "profiles": [profile]}
    return {"kind": kind, "engine": {**engine, "parser_layers": 1}}


def test_contenders_and_skip_reasons(digits_bundle: Bundle, copy_bundle: Copy) -> None:
    targets = [{"settings": {"target": target}} for target in ("tensorrt", "cpu")]
    kinds: dict[str, dict[str, Any]] = {
        "fp32": {},
        "fp16": {"precision": "fp16"},
        "int8": {"precision": "int8", "made_with": targets[0]},
        "int8-cpu": {"precision": "int8", "made_with": targets[1]},
        "engine": compiled("engine", "sm_89", 2, 8),
        "package": compiled("package", "x86_64", 1, 128),
    }
    bundle = with_artifacts(
        copy_bundle(digits_bundle), lambda own: {name: {**own, **kinds[name]} for name in kinds}
    )
    (on_cpu, cpu_reasons), (on_gpu, gpu_reasons) = (
        list_contenders(bundle, BenchSettings(device=device)) for device in ("cpu", "cuda:0")
    )
    assert {"pytorch", "ort-cpu/fp32", "ort-cpu/int8-cpu", "inductor/package"} <= set(on_cpu)
    for name, reason in {
        "ort-cpu/fp16": "FP16 is for GPUs",
        "ort-cpu/int8": "quantised for tensorrt",
        "openvino/int8": "quantised for tensorrt",
        "tensorrt/engine": "it runs on a GPU" if HAS_GPU else "no NVIDIA GPU was found",
    }.items():
        assert cpu_reasons[name].startswith(reason)
    engine = on_gpu["tensorrt-graph/engine"]
    assert (engine.min_batch, engine.max_batch, engine.device) == (2, 8, "cuda:0")
    assert "inductor/package" in gpu_reasons


def test_cuda_provider_variants(digits_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("van_deploy.bench.contenders.execution_providers", lambda: (CUDA,))
    settings = BenchSettings(
        device="cuda:1", tf32=False, conv_search="DEFAULT", fuse_conv_bias=True
    )
    contenders, _ = list_contenders(digits_bundle, settings)
    assert list(contenders) == [
        *("pytorch", "pytorch-channels-last-fp16", "pytorch-compile-fp16", "pytorch-compile-bf16"),
        *("ort-cuda/fp32", "ort-cuda-nhwc/fp32", "ort-cuda-graph/fp32"),
    ]
    assert {entry.device for entry in contenders.values()} == {"cuda:1"}
    assert contenders["ort-cuda-nhwc/fp32"].options["prefer_nhwc"]
    options = contenders["ort-cuda-graph/fp32"].options
    assert CudaOptions(**options) == CudaOptions(False, False, "DEFAULT", True, cuda_graph=True)


def test_changed_files_and_empty_bundles(digits_bundle: Bundle, copy_bundle: Copy) -> None:
    empty = with_artifacts(copy_bundle(digits_bundle, "empty"), lambda _: {})
    with pytest.raises(BundleError, match="has no artifact to time"):
        list_contenders(empty, BenchSettings())
    folder = copy_bundle(digits_bundle)
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"!")
    with pytest.raises(BundleError, match="was changed after the manifest"):
        list_contenders(Bundle.open(folder), BenchSettings())

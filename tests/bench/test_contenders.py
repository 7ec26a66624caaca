"""Who races, who does not and why, and how they are chosen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.each import each
from van_deploy.bench.contender import Contender, Skipped
from van_deploy.bench.contenders import chosen, contenders_of
from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.errors import BundleError, MissingDependency, UsageError
from van_deploy.runners.base import CudaOptions
from van_deploy.runners.onnxruntime import CUDA

ENTRIES: list[Contender | Skipped] = [
    Contender("pytorch", "pytorch", "fp32"),
    Contender("pytorch-compile", "pytorch", "fp32"),
    Contender("ort-cpu/fp32", "onnxruntime", "fp32"),
    Contender("ort-cpu/int8-cpu", "onnxruntime", "int8"),
    Skipped("openvino/fp32", "OpenVINO is not installed", "Install it."),
]


@each(
    ("patterns", "names"),
    [
        ((), [entry.name for entry in ENTRIES]),
        (("pytorch",), ["pytorch"]),
        (("pytorch*",), ["pytorch", "pytorch-compile"]),
        (("ort-cpu",), ["ort-cpu/fp32", "ort-cpu/int8-cpu"]),
        (("*/int8*", "pytorch"), ["pytorch", "ort-cpu/int8-cpu"]),
    ],
)
def test_runners_are_chosen_by_name_run_time_or_pattern(
    patterns: tuple[str, ...], names: list[str]
) -> None:
    assert [entry.name for entry in chosen(ENTRIES, patterns)] == names


def test_an_unknown_runner_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        chosen(ENTRIES, ("tvm",))
    assert caught.value.message == "There is no runner 'tvm' here."
    assert "ort-cpu/fp32" in caught.value.remedy


def test_a_missing_runner_that_was_asked_for_is_an_error() -> None:
    with pytest.raises(MissingDependency) as caught:
        chosen(ENTRIES, ("openvino",))
    assert caught.value.message == (
        "The runner 'openvino/fp32' cannot start: OpenVINO is not installed."
    )
    assert caught.value.remedy == "Install it."


def test_a_contender_survives_the_way_to_its_process() -> None:
    contender = Contender("x/y", "tensorrt", "fp16", "a.plan", max_batch=8, min_batch=2)
    assert Contender(**json.loads(json.dumps(asdict(contender)))) == contender
    assert contender.refuses(1)
    assert not contender.refuses(8)


def with_artefacts(bundle: Bundle, folder: Path, **changes: Mapping[str, object]) -> Bundle:
    """Return a copy of ``bundle`` whose manifest has further artefacts, all the same file."""
    shutil.copytree(bundle.path, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, change in changes.items():
        manifest["artefacts"][name] = {**manifest["artefacts"]["fp32"], **change}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(folder)


def test_every_artefact_has_an_entry_and_what_cannot_run_has_a_reason(
    digits: Bundle, tmp_path: Path
) -> None:
    bundle = with_artefacts(
        digits,
        tmp_path / "copy",
        fp16={"precision": "fp16"},
        int8={"precision": "int8", "made_with": {"settings": {"target": "tensorrt"}}},
        engine={
            "kind": "engine",
            "precision": "fp16",
            "engine": {
                "backend": "tensorrt 10.0",
                "targets": ["sm_89"],
                "profiles": [{"min": 2, "opt": 4, "max": 8}],
                "parser_layers": 1,
            },
        },
        package={
            "kind": "package",
            "engine": {
                "backend": "inductor 2.11",
                "targets": ["x86_64"],
                "profiles": [{"min": 1, "opt": 8, "max": 128}],
                "parser_layers": 0,
            },
        },
        **{"int8-cpu": {"precision": "int8", "made_with": {"settings": {"target": "cpu"}}}},
    )
    entries = {entry.name: entry for entry in contenders_of(bundle)}
    assert isinstance(entries["pytorch"], Contender)
    assert isinstance(entries["ort-cpu/fp32"], Contender)
    assert isinstance(entries["ort-cpu/int8-cpu"], Contender)
    for name, words in {
        "ort-cpu/fp16": "FP16 is for GPUs",
        "ort-cpu/int8": "quantised for tensorrt",
        "openvino/int8": "quantised for tensorrt",
    }.items():
        entry = entries[name]
        assert isinstance(entry, Skipped)
        assert entry.reason.startswith(words)
    engine = entries["tensorrt/engine"]
    assert isinstance(engine, Skipped)
    assert engine.reason in ("no NVIDIA GPU answers here", "runs on a GPU")
    package = entries["inductor/package"]
    assert isinstance(package, Contender)
    assert (package.runtime, package.device) == ("inductor", "cpu")
    on_gpu = {entry.name: entry for entry in contenders_of(bundle, "cuda:0")}
    engine = on_gpu["tensorrt-graph/engine"]
    assert isinstance(engine, Contender)
    assert (engine.min_batch, engine.max_batch, engine.device) == (2, 8, "cuda:0")
    assert isinstance(on_gpu["inductor/package"], Skipped)


def test_the_cuda_provider_runs_each_file_in_three_ways_with_its_options_on_record(
    digits: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("van_deploy.bench.contenders.execution_providers", lambda: (CUDA,))
    entries = contenders_of(digits, "cuda:1", CudaOptions(use_tf32=False, fuse_conv_bias=True))
    ours = {e.name: e for e in entries if isinstance(e, Contender) and e.runtime != "pytorch"}
    assert list(ours) == ["ort-cuda/fp32", "ort-cuda-nhwc/fp32", "ort-cuda-graph/fp32"]
    assert {entry.device for entry in entries if isinstance(entry, Contender)} == {"cuda:1"}
    assert ours["ort-cuda-graph/fp32"].options == {
        "prefer_nhwc": False,
        "use_tf32": False,
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "fuse_conv_bias": True,
        "cuda_graph": True,
    }
    rivals = [e.name for e in entries if isinstance(e, Contender) and e.runtime == "pytorch"]
    assert rivals == [
        "pytorch",
        "pytorch-channels-last-fp16",
        "pytorch-compile-fp16",
        "pytorch-compile-bf16",
    ]


def test_a_changed_file_is_not_timed(digits: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(digits.path, folder)
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"!")
    with pytest.raises(BundleError, match="was changed after the manifest"):
        contenders_of(Bundle.open(folder))


def test_a_bundle_without_artefacts_is_refused(digits: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(digits.path, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["artefacts"] = {}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="has no artefact to time"):
        contenders_of(Bundle.open(folder))


@pytest.mark.parametrize(("library", "runs"), [("glibc", True), ("", False)])
def test_eager_pytorch_runs_with_the_c_library_s_own_settings_where_that_differs(
    digits: Bundle, monkeypatch: pytest.MonkeyPatch, library: str, runs: bool
) -> None:
    monkeypatch.setattr("van_deploy.bench.contenders.platform.libc_ver", lambda: (library, ""))
    entries = {entry.name: entry for entry in contenders_of(digits)}
    eager, other = entries["pytorch"], entries["pytorch-default-malloc"]
    assert isinstance(eager, Contender)
    assert eager.keeps_memory
    assert isinstance(other, Contender) is runs
    if isinstance(other, Contender):
        assert not other.keeps_memory
    else:
        assert "nothing differs from 'pytorch'" in other.reason

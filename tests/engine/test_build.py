"""Plans built by the real builder: files, reproducibility, cancelled builds and crashes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import ModelProto, helper, numpy_helper

from tests.conftest import ROOT
from tests.each import each
from tests.engine.conftest import ADA, AMPERE_PLUS, RTX_17, SM89, TENSORRT_11, Build, Plan
from van_deploy.config import BatchRange, BuildOptions, Profiling
from van_deploy.engine.backend import Backend, Host
from van_deploy.engine.build import engine_name, has_external_weights
from van_deploy.engine.messages import BuildLog
from van_deploy.engine.sidecar import Sidecar
from van_deploy.engine.worker import ONNX, load_timing_cache, save_timing_cache
from van_deploy.errors import ConversionError, InputError, MissingDependency
from van_deploy.files import file_sha256
from van_deploy.model.preprocess import OFFICIAL


def test_plan_has_a_complete_sidecar_and_a_log(rtx: Backend, digits_onnx: Path, plan: Plan) -> None:
    """The plan is the file that TensorRT wrote: its own validity check accepts it."""
    sidecar, name, data = plan.sidecar, plan.sidecar.name, plan.path.read_bytes()
    assert {path.suffix for path in plan.path.parent.iterdir()} == {".json", ".log", ".plan"}
    assert sidecar.plan_sha256 == file_sha256(plan.path)
    assert sidecar.onnx_sha256 == file_sha256(digits_onnx)
    assert (sidecar.options, sidecar.targets, sidecar.built_on) == (SM89, SM89.targets, None)
    tensors = [(t.name, t.shape[0]) for t in (*sidecar.inputs, *sidecar.outputs)]
    assert tensors == [("images", -1), ("logits", -1)]
    assert 100 << 20 < sidecar.peak_memory_bytes < 2 << 30
    assert sidecar.parser_layers <= 1.2 * (13 * 9 + 17), "about as many as the graph has nodes"
    assert set(sidecar.device_memory) == {"weights_bytes", "activation_bytes", "scratch_bytes"}
    assert sidecar.preprocessing == OFFICIAL
    assert "patch_embed1.proj" in plan.path.with_name(f"{name}.log").read_text()
    assert plan.progress[0][:2] == (f"{name}: Building engine", 0)
    assert all(total is None or 0 <= done <= total for _, done, total in plan.progress)
    runtime, _logger = rtx.runtime(BuildLog())
    malformed = int(rtx.module.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    flags = [int(runtime.get_engine_validity(d)[1]) & malformed for d in (data, b"header" + data)]
    assert flags == [0, malformed]
    assert str(plan.path.parent).encode() not in data


def test_reproducible_builds(build: Build, digits_onnx: Path, plan: Plan, tmp_path: Path) -> None:
    named = SM89.with_changes(profiling=Profiling.DETAILED)  # layer names
    far = tmp_path / "a folder with a much longer name than the first"
    far.mkdir()
    source = Path(shutil.copy(digits_onnx, far))
    more = SM89.with_changes(profiles=(BatchRange(1, 1, 1), BatchRange(2, 8, 16)))
    plans = tmp_path / "near.plan", far / "other.plan", tmp_path / "other.plan"
    with ThreadPoolExecutor() as pool:
        sources = (digits_onnx, source, digits_onnx)
        first, same, larger = pool.map(build, plans, (named, named, more), sources)
    assert [Sidecar.load(path) for path in plans] == [first, same, larger]
    assert len({plan.sidecar.plan_sha256, first.plan_sha256, larger.plan_sha256}) == 3
    sizes = [one.device_memory["activation_bytes"] for one in (plan.sidecar, larger)]
    assert sizes[0] < sizes[1]
    if not first.fixed_addresses:
        pytest.skip("this container forbids fixed memory addresses (personality(2))")
    assert first.plan_sha256 == same.plan_sha256


def test_external_weights(build: Build, graph: ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(graph, path, save_as_external_data=True, location="model.bin", size_threshold=0)
    sidecar = build(tmp_path / "out" / "e.plan", source=path)
    assert sidecar.device_memory["weights_bytes"] > 100_000


def quantise_for_cpus(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.uint8), "zero"))
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["images", "s", "zero"], ["q"]))


def make_size_dynamic(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"


GRAPHS = [
    (quantise_for_cpus, "UINT8 zero-points, which TensorRT would read as INT8"),
    (make_size_dynamic, "has dynamic height and width, and no sizes"),
    (ModelProto.Clear, "is not an ONNX file"),
    (lambda _: b"hello world, not a protobuf", "is not an ONNX file"),
]


@each("change, message", GRAPHS, fresh="graph")
def test_graphs_that_tensorrt_would_misread_are_refused(
    graph: ModelProto, tmp_path: Path, change: Any, message: str
) -> None:
    """Those of another batch or image size are in ``tests/test_backbones.py``."""
    path = tmp_path / "model.onnx"
    path.write_bytes(change(graph) or graph.SerializeToString())
    with pytest.raises(InputError, match=message):
        has_external_weights(path, SM89)


def test_existing_plan_survives_a_failed_build(build: Build, plan: Plan, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plan.path.parent, tmp_path / "plans"))
    with pytest.raises(ConversionError, match="no kernel fits into the workspace"):
        build(folder / plan.path.name, SM89.with_changes(workspace_bytes=1024))
    assert Sidecar.load(folder / plan.path.name) == plan.sidecar
    assert len(list(folder.iterdir())) == 3


STOPS = [
    (None, KeyboardInterrupt, None),
    (signal.SIGKILL, MissingDependency, "was killed, most likely because memory ran out"),
    (signal.SIGSEGV, ConversionError, "ended the build with signal SIGSEGV"),
]


@each("signal_number, error, message", STOPS)
def test_stopped_builds_leave_no_files(build: Build, tmp_path: Path, **case: Any) -> None:
    signal_number, error, message = case.values()
    workers: set[psutil.Process] = set()
    others = set(psutil.Process().children())  # of other tests

    def stop(phase: str, done: int, total: int | None) -> None:
        workers.update(set(psutil.Process().children()) - others)
        for worker in workers:
            assert os.getsid(worker.pid) == worker.pid, "Ctrl-C would reach the worker"
            if signal_number is not None:
                worker.send_signal(signal_number)
        if signal_number is None and done:
            raise KeyboardInterrupt

    with pytest.raises(error, match=message):
        build(tmp_path / "e.plan", progress=stop)
    assert list(tmp_path.iterdir()) == []
    assert workers
    assert not [worker for worker in workers if worker.is_running()]


def test_build_is_cancelled(rtx: Backend, digits_onnx: Path, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / ONNX).symlink_to(digits_onnx)
    job = dict.fromkeys(("timing_cache", "external_weights"))
    text = json.dumps({**job, "backend": rtx.name, "options": SM89.as_dict()})
    folder = os.open(tmp_path, os.O_RDONLY)
    words = [sys.executable, "-m", "van_deploy.engine.worker", str(folder)]
    with subprocess.Popen(words, pass_fds=[folder], stdin=-1, stdout=-1, text=True) as worker:
        events = worker.communicate(text)[0].splitlines()
    os.close(folder)
    assert 0 < len(events) < len(plan.progress) / 2
    assert not any('"built"' in event for event in events)


def test_worker_exits_with_its_parent(rtx: Backend, digits_onnx: Path, tmp_path: Path) -> None:
    program = """
import sys; from pathlib import Path; from tests.engine.conftest import *
engine_from_onnx(Path(sys.argv[1]), Path(sys.argv[2]), backend=load_backend(RTX), options=SM89,
    precision='fp32', progress=lambda *_: print('building', flush=True))"""
    words = [sys.executable, "-c", program, str(digits_onnx), str(tmp_path / "e.plan")]
    with psutil.Popen(words, stdout=subprocess.PIPE, cwd=ROOT) as parent:
        parent.stdout.readline()
        workers = parent.children()
        parent.kill()
    assert workers
    assert psutil.wait_procs(workers, timeout=20)[1] == [], "the worker is still running"
    assert list(tmp_path.iterdir()) == []


def test_engine_names() -> None:
    two = SM89.with_changes(targets=("sm_86", "sm_89"))
    assert engine_name("van_b1", "int8", RTX_17, two, Host()) == "van_b1-int8-sm86+sm89-rtx1.7.1"
    vc: Any = {"version_compatible": True}
    for changes, name in (({}, "sm89-{}"), (AMPERE_PLUS, "ampere-plus-{}"), (vc, "sm89-{}-vc")):
        found = engine_name("m", "fp16", TENSORRT_11, BuildOptions(**changes), ADA)
        assert found == f"m-fp16-{name.format('trt11.4.0')}"


class Timings(bytearray):
    """A timing cache with TensorRT's methods."""

    def serialize(self) -> bytes:
        return bytes(self)

    def combine(self, other: Timings, _: bool) -> None:
        time.sleep(0.1)
        self.extend(other)


class Config:
    create_timing_cache = Timings


@pytest.mark.filterwarnings("ignore:Use Deprecated:DeprecationWarning")
def test_parallel_builds_merge_a_shared_timing_cache(rtx: Backend, tmp_path: Path) -> None:
    """RTX has no timings, but the same methods as TensorRT."""
    path, own = tmp_path / "caches" / "timing.cache", tmp_path / "own.cache"
    with ThreadPoolExecutor() as pool:
        for name in (b"a", b"b", b"c"):
            pool.submit(save_timing_cache, Config(), Timings(name), path)
    assert sorted(path.read_bytes()) == sorted(b"abc")
    builder, _logger = rtx.builder(BuildLog())
    config = builder.create_builder_config()
    save_timing_cache(config, load_timing_cache(config, own), own)
    assert own.exists()

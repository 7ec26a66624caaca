"""Real plans from the real builder: what is written, what is not, and twice the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

from tests.each import each
from tests.engine.conftest import ADA, PLUS, RTX_17, SM89, TENSORRT_11, Plan, built
from van_deploy.config import BatchRange, BuildOptions, Profiling
from van_deploy.config.sizes import SizeRange
from van_deploy.engine.backend import Backend, Host
from van_deploy.engine.build import engine_name, has_weights_beside
from van_deploy.engine.messages import BuildLog
from van_deploy.engine.sidecar import verified_sidecar
from van_deploy.engine.worker import ONNX, save_timings, timing_cache_
from van_deploy.errors import ConversionError, InputError, MissingDependency
from van_deploy.files import file_sha256
from van_deploy.model.preprocess import OFFICIAL


def test_plan_sidecar_and_log(rtx: Backend, digits_onnx: Path, plan: Plan) -> None:
    """The plan stays as TensorRT wrote it: its own look finds it sound, and a header would not."""
    sidecar, name, data = plan.sidecar, plan.sidecar.name, plan.path.read_bytes()
    assert {path.suffix for path in plan.path.parent.iterdir()} == {".json", ".log", ".plan"}
    assert (sidecar.plan_sha256, sidecar.onnx_sha256) == (
        file_sha256(plan.path),
        file_sha256(digits_onnx),
    )
    assert sidecar.backend_version == rtx.version
    assert (sidecar.targets, sidecar.built_on) == (("sm_89",), None)
    assert sidecar.profiles == (BatchRange(1, 2, 4),)
    assert [(t.name, t.shape[0]) for t in (*sidecar.inputs, *sidecar.outputs)] == [
        *(("images", -1), ("logits", -1))
    ]
    assert 100 << 20 < sidecar.peak_memory_bytes < 2 << 30
    assert sidecar.parser_layers <= 1.2 * (13 * 9 + 17), "hardly more than the graph has nodes"
    assert set(sidecar.device_memory) == {"weights_bytes", "activation_bytes", "scratch_bytes"}
    assert sidecar.preprocessing == OFFICIAL
    assert "patch_embed1.proj" in plan.path.with_name(f"{name}.log").read_text()
    assert plan.told[0][:2] == (f"{name}: Building engine", 0)
    assert all(total is None or 0 <= done <= total for _, done, total in plan.told)
    assert any(done for _, done, _ in plan.told)
    runtime, _logger = rtx.runtime(BuildLog())
    malformed = int(rtx.module.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    found = [int(runtime.get_engine_validity(d)[1]) & malformed for d in (data, b"header" + data)]
    assert found == [0, malformed]
    assert str(plan.path.parent).encode() not in data


def test_the_same_inputs_give_the_same_bytes(
    rtx: Backend, digits_onnx: Path, tmp_path: Path
) -> None:
    options = SM89.changed(profiling=Profiling.DETAILED)
    first = built(digits_onnx, tmp_path / "e.plan", rtx, options)
    if not first.fixed_addresses:
        pytest.skip("this container forbids fixed memory addresses (personality(2))")
    assert built(digits_onnx, tmp_path / "e.plan", rtx, options).plan_sha256 == first.plan_sha256
    elsewhere = tmp_path / "a folder with a much longer name than the first" / "other.plan"
    copy = elsewhere.with_suffix(".onnx")
    copy.parent.mkdir()
    copy.write_bytes(digits_onnx.read_bytes())
    assert built(copy, elsewhere, rtx, options).plan_sha256 == first.plan_sha256


def test_other_options_give_another_plan_side_by_side(
    rtx: Backend, digits_onnx: Path, plan: Plan, tmp_path: Path
) -> None:
    options = {
        "a": SM89.changed(targets=("sm_120",)),
        "b": SM89.changed(profiles=(BatchRange(1, 1, 1), BatchRange(2, 8, 16))),
    }
    with ThreadPoolExecutor() as pool:
        one, two = pool.map(
            lambda name: built(digits_onnx, tmp_path / f"{name}.plan", rtx, options[name]), options
        )
    assert [verified_sidecar(tmp_path / f"{name}.plan") for name in options] == [one, two]
    assert len({plan.sidecar.plan_sha256, one.plan_sha256, two.plan_sha256}) == 3
    larger, smaller = two.device_memory, plan.sidecar.device_memory
    assert larger["activation_bytes"] > smaller["activation_bytes"]


def test_weights_beside_the_file(rtx: Backend, graph: ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    onnx.save(graph, path, save_as_external_data=True, location="model.bin", size_threshold=0)
    sidecar = built(path, tmp_path / "e.plan", rtx)
    assert sidecar.device_memory["weights_bytes"] > 100_000
    (path.parent / "model.bin").unlink()
    with pytest.raises(InputError, match=r"are in 'model\.bin', which is not beside it"):
        built(path, tmp_path / "e.plan", rtx)


def for_cpus(model: ModelProto) -> None:
    scale = numpy_helper.from_array(np.ones((), np.float32), "s")
    model.graph.initializer.extend([scale, numpy_helper.from_array(np.zeros((), np.uint8), "z")])
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"]))


def dynamic(model: ModelProto) -> None:
    for dim in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "side"


def fixed(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


SIZES = SM89.changed(dynamic_size=SizeRange(32, 64, 96))


@each(
    ("spoil", "options", "words"),
    [
        (None, SM89, ""),
        (None, SIZES, "takes one image size, so it cannot serve 32:64:96"),
        (for_cpus, SM89, "UINT8 zero-points, which TensorRT would read as INT8"),
        (ModelProto.Clear, SM89, "is not an ONNX file"),
        (dynamic, SM89, "has dynamic height and width, and no sizes"),
        (dynamic, SIZES, ""),
        (fixed, SM89, "has a fixed batch of 4, so it cannot serve 1:2:4"),
        (fixed, SM89.changed(profiles=(BatchRange(4, 4, 4),)), ""),
        (b"hello world, this is no protobuf", SM89, "is not an ONNX file"),
    ],
    fresh="graph",
)
def test_what_the_graph_does_not_serve_or_tensorrt_would_misread(
    graph: ModelProto,
    tmp_path: Path,
    spoil: Callable[[ModelProto], object] | bytes | None,
    options: BuildOptions,
    words: str,
) -> None:
    path = tmp_path / "model.onnx"
    if callable(spoil):
        spoil(graph)
    path.write_bytes(spoil if isinstance(spoil, bytes) else graph.SerializeToString())
    if not words:
        assert not has_weights_beside(path, options)
        return
    with pytest.raises(InputError, match=words):
        has_weights_beside(path, options)


def test_a_plan_that_was_there_survives_a_failed_build(
    rtx: Backend, digits_onnx: Path, plan: Plan, tmp_path: Path
) -> None:
    folder = tmp_path / "plans"
    shutil.copytree(plan.path.parent, folder)
    with pytest.raises(ConversionError, match="no kernel fits into the workspace"):
        built(digits_onnx, folder / plan.path.name, rtx, SM89.changed(workspace_bytes=1024))
    assert verified_sidecar(folder / plan.path.name) == plan.sidecar
    assert len(list(folder.iterdir())) == 3


@each(
    ("number", "kind", "words"),
    [
        (None, KeyboardInterrupt, None),
        (signal.SIGKILL, MissingDependency, "was killed, most likely for want of memory"),
        (signal.SIGSEGV, ConversionError, "ended the build with signal SIGSEGV"),
    ],
)
def test_a_build_that_is_stopped_leaves_nothing(
    rtx: Backend,
    digits_onnx: Path,
    tmp_path: Path,
    number: signal.Signals | None,
    kind: type[BaseException],
    words: str | None,
) -> None:
    """Ctrl-C stops TensorRT, too; a worker that is killed becomes an error."""
    workers: set[int] = set()
    others = set(_children())  # of the tests before this one

    def stop(phase: str, done: int, total: int | None) -> None:
        workers.update(set(_children()) - others)
        for worker in workers:
            if number is not None:
                os.kill(worker, number)
        if number is None and done:
            raise KeyboardInterrupt

    with pytest.raises(kind, match=words):
        built(digits_onnx, tmp_path / "e.plan", rtx, progress=stop)
    assert list(tmp_path.iterdir()) == []
    assert workers
    assert not workers & set(_children())


def test_a_cancelled_build_stops_at_tensorrts_next_step(
    rtx: Backend, digits_onnx: Path, plan: Plan, tmp_path: Path
) -> None:
    (tmp_path / ONNX).symlink_to(digits_onnx)
    job: dict[str, Any] = {"backend": rtx.name, "options": SM89.as_dict()}
    job |= {"timing_cache": None, "weights_beside": None}
    folder = os.open(tmp_path, os.O_RDONLY)
    words = [sys.executable, "-m", "van_deploy.engine.worker", str(folder)]
    asked: dict[str, Any] = {
        "input": json.dumps(job),
        "pass_fds": [folder],
        "stdout": subprocess.PIPE,
    }
    events = subprocess.run(words, text=True, check=True, **asked).stdout.splitlines()
    os.close(folder)
    assert 0 < len(events) < len(plan.told) / 2, "the end of stdin cancels it"
    assert not any('"built"' in event for event in events)


def test_the_worker_stops_when_its_parent_is_gone(
    rtx: Backend, digits_onnx: Path, tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.engine.conftest import *\n"
        "built(Path(sys.argv[1]), Path(sys.argv[2]), backend_named(RTX),\n"
        "    progress=lambda *_: print('building', flush=True))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(digits_onnx), str(tmp_path / "e.plan")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    with parent.stdout:
        parent.stdout.readline()
        workers = _children(parent.pid)
        parent.kill()
        parent.wait()
    assert workers
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == [], "the parent was killed and could not tidy up"


@each(
    ("options", "name"),
    [
        (SM89.changed(targets=("sm_86", "sm_89")), "sm86+sm89-rtx1.7.1"),
        (BuildOptions(), "sm89-trt11.4.0"),
        (BuildOptions(**PLUS), "ampere-plus-trt11.4.0"),
        (BuildOptions(version_compatible=True), "sm89-trt11.4.0-vc"),
    ],
)
def test_names(options: BuildOptions, name: str) -> None:
    backend, host = (RTX_17, Host()) if "rtx" in name else (TENSORRT_11, ADA)
    assert engine_name("van_b1", "fp16", backend, options, host) == f"van_b1-fp16-{name}"


LEARN = """
import sys, time
from pathlib import Path
from van_deploy.engine.worker import ONNX, save_timings

class Timings(bytearray):  # as TensorRT's: made of a file's bytes, combined, serialised
    serialize = lambda self: bytes(self)

    def combine(self, other, ignore):
        time.sleep(0.1)
        self.extend(other)

class Config:
    create_timing_cache = Timings

save_timings(Config(), Timings(sys.argv[2].encode()), Path(sys.argv[1]))
"""


@pytest.mark.filterwarnings("ignore:Use Deprecated:DeprecationWarning")
def test_builds_that_share_a_timing_cache_lose_nothing(rtx: Backend, tmp_path: Path) -> None:
    """On RTX it does nothing, but the calls are those that TensorRT has."""
    path = tmp_path / "caches" / "timing.cache"
    builds = [subprocess.Popen([sys.executable, "-c", LEARN, str(path), name]) for name in "abc"]
    assert [build.wait() for build in builds] == [0, 0, 0]
    assert sorted(path.read_bytes()) == sorted(b"abc")
    builder, _logger = rtx.builder(BuildLog())
    config, own = builder.create_builder_config(), tmp_path / "own.cache"
    save_timings(config, timing_cache_(config, own), own)
    assert own.exists()


def _children(parent: int | None = None) -> list[int]:
    """Return the processes that a process (this one) has started."""
    tasks = Path(f"/proc/{parent or os.getpid()}/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]

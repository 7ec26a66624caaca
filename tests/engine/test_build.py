"""Real plans from the real builder: what is written, what is not, and twice the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import onnx
import pytest
from onnx import ModelProto

from van_deploy.config import BatchRange, BuildOptions, HardwareCompatibility, Profiling
from van_deploy.engine.backend import Backend
from van_deploy.engine.build import BuildProgress, engine_from_onnx, engine_name
from van_deploy.engine.host import Host
from van_deploy.engine.sidecar import Sidecar, read_sidecar, verified_sidecar
from van_deploy.errors import ConversionError, MissingDependency
from van_deploy.files import file_sha256
from van_deploy.model.preprocess import OFFICIAL

SM89 = BuildOptions(targets=("sm_89",), profiles=(BatchRange(1, 2, 4),))


def built(source: Path, plan: Path, rtx: Backend, options: BuildOptions = SM89) -> Sidecar:
    return engine_from_onnx(source, plan, backend=rtx, options=options, precision="fp32")


def test_plan_sidecar_and_log(rtx: Backend, digits_onnx: Path, tmp_path: Path) -> None:
    plan = tmp_path / "van_digits-fp32-sm89-rtx1.7.1.plan"
    events: list[BuildProgress] = []
    sidecar = engine_from_onnx(
        digits_onnx,
        plan,
        backend=rtx,
        options=SM89,
        precision="fp32",
        preprocessing=OFFICIAL,
        progress=events.append,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "van_digits-fp32-sm89-rtx1.7.1.json",
        "van_digits-fp32-sm89-rtx1.7.1.log",
        "van_digits-fp32-sm89-rtx1.7.1.plan",
    ]
    assert verified_sidecar(plan) == sidecar
    assert sidecar.plan_sha256 == file_sha256(plan)
    assert sidecar.onnx_sha256 == file_sha256(digits_onnx)
    assert sidecar.backend_version == rtx.version
    assert (sidecar.targets, sidecar.built_on) == (("sm_89",), None)
    assert sidecar.profiles == (BatchRange(1, 2, 4),)
    assert [t.name for t in (*sidecar.inputs, *sidecar.outputs)] == ["images", "logits"]
    assert sidecar.inputs[0].shape[0] == sidecar.outputs[0].shape[0] == -1
    assert sidecar.build_seconds > 0
    assert 100 << 20 < sidecar.peak_memory_bytes < 2 << 30
    assert sidecar.parser_layers <= 1.2 * (13 * 9 + 17), "hardly more than the graph has nodes"
    assert set(sidecar.device_memory) == {"weights_bytes", "activation_bytes", "scratch_bytes"}
    assert sidecar.reproducible is None
    assert sidecar.preprocessing == OFFICIAL
    log = (tmp_path / f"{sidecar.name}.log").read_text()
    assert "[V] " in log
    assert "patch_embed1.proj" in log
    assert {event.event for event in events} == {"phase", "step", "done"}
    assert events[0] == BuildProgress("phase", "Building engine", None, events[0].steps)
    assert any(event.parent == "Building engine" for event in events)


def test_the_plan_is_as_tensorrt_wrote_it(rtx: Backend, digits_onnx: Path, tmp_path: Path) -> None:
    """No header of ours: TensorRT's own look finds a sound plan, and garbage is found out."""
    built(digits_onnx, tmp_path / "e.plan", rtx)
    plan = (tmp_path / "e.plan").read_bytes()
    trt = rtx.module
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    malformed = int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    assert not int(runtime.get_engine_validity(plan)[1]) & malformed
    assert int(runtime.get_engine_validity(b"header" + plan)[1]) & malformed
    assert str(tmp_path).encode() not in plan
    assert digits_onnx.name.encode() not in plan


def test_the_same_inputs_give_the_same_bytes(
    rtx: Backend, digits_onnx: Path, tmp_path: Path
) -> None:
    options = SM89.changed(profiling=Profiling.DETAILED)
    first = engine_from_onnx(
        digits_onnx,
        tmp_path / "e.plan",
        backend=rtx,
        options=options,
        precision="fp32",
        check_reproducible=True,
    )
    if not first.fixed_addresses:
        pytest.skip("this container forbids fixed memory addresses (personality(2))")
    assert first.reproducible is True
    elsewhere = tmp_path / "a folder with a much longer name than the first" / "other.plan"
    copy = elsewhere.with_suffix(".onnx")
    copy.parent.mkdir()
    copy.write_bytes(digits_onnx.read_bytes())
    assert built(copy, elsewhere, rtx, options).plan_sha256 == first.plan_sha256


def test_other_options_give_another_plan(rtx: Backend, digits_onnx: Path, tmp_path: Path) -> None:
    plans = [
        SM89,
        SM89.changed(targets=("sm_120",)),
        SM89.changed(profiles=(BatchRange(1, 1, 1), BatchRange(2, 8, 16))),
    ]
    digests = [built(digits_onnx, tmp_path / f"{i}.plan", rtx, o) for i, o in enumerate(plans)]
    assert len({sidecar.plan_sha256 for sidecar in digests}) == len(plans)
    assert (
        digests[2].device_memory["activation_bytes"] > digests[0].device_memory["activation_bytes"]
    )


def test_weights_beside_the_file(rtx: Backend, graph: ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    onnx.save(graph, path, save_as_external_data=True, location="model.bin", size_threshold=0)
    sidecar = built(path, tmp_path / "e.plan", rtx)
    assert sidecar.device_memory["weights_bytes"] > 100_000


def test_a_plan_that_was_there_survives_a_failed_build(
    rtx: Backend, digits_onnx: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "e.plan"
    first = built(digits_onnx, plan, rtx)
    with pytest.raises(ConversionError):
        built(digits_onnx, plan, rtx, SM89.changed(workspace_bytes=1024))
    assert verified_sidecar(plan) == first
    assert len(list(tmp_path.iterdir())) == 3


def test_ctrl_c_stops_tensorrt_and_leaves_nothing(
    rtx: Backend, digits_onnx: Path, tmp_path: Path
) -> None:
    workers: list[int] = []
    others = set(_children())  # of the tests before this one

    def interrupt(event: BuildProgress) -> None:
        if event.event == "step" and not workers:
            workers.extend(set(_children()) - others)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine_from_onnx(
            digits_onnx,
            tmp_path / "e.plan",
            backend=rtx,
            options=SM89,
            precision="fp32",
            progress=interrupt,
        )
    assert list(tmp_path.iterdir()) == []
    assert workers
    assert not set(workers) & set(_children())


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (signal.SIGKILL, MissingDependency, "was killed, most likely for want of memory"),
        (signal.SIGSEGV, ConversionError, "ended the build with signal SIGSEGV"),
    ],
)
def test_a_killed_build(
    rtx: Backend,
    digits_onnx: Path,
    tmp_path: Path,
    number: signal.Signals,
    kind: type[Exception],
    words: str,
) -> None:
    others = set(_children())  # of the tests before this one

    def kill(event: BuildProgress) -> None:
        if event.event == "phase" and event.parent is None:
            for child in set(_children()) - others:
                os.kill(child, number)

    with pytest.raises(kind, match=words):
        engine_from_onnx(
            digits_onnx,
            tmp_path / "e.plan",
            backend=rtx,
            options=SM89,
            precision="fp32",
            progress=kill,
        )
    assert list(tmp_path.iterdir()) == []


def test_the_worker_stops_when_its_parent_is_gone(
    rtx: Backend, digits_onnx: Path, tmp_path: Path
) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from van_deploy.engine.backend import backend_named\n"
        "from van_deploy.engine.build import engine_from_onnx\n"
        "from van_deploy.config import BuildOptions\n"
        "engine_from_onnx(Path(sys.argv[1]), Path(sys.argv[2]), precision='fp32',\n"
        "    backend=backend_named('tensorrt-rtx'), options=BuildOptions(targets=('sm_89',)),\n"
        "    progress=lambda event: print('building', flush=True))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(digits_onnx), str(tmp_path / "e.plan")],
        stdout=subprocess.PIPE,
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


def test_names(rtx: Backend) -> None:
    release = f"rtx{rtx.release}"
    host = Host("NVIDIA L4", "sm_89", None, "580.65.06", (13, 0))
    tensorrt = Backend("tensorrt", "TensorRT", "trt", "11.4.0.106", 13, None)
    plus = BuildOptions(hardware_compatibility=HardwareCompatibility.AMPERE_PLUS)
    assert engine_name("van_b1", "fp16", rtx, SM89, Host()) == f"van_b1-fp16-sm89-{release}"
    both = SM89.changed(targets=("sm_86", "sm_89"))
    assert engine_name("van_b1", "int8", rtx, both, Host()) == f"van_b1-int8-sm86+sm89-{release}"
    assert engine_name("van_b1", "fp16", tensorrt, BuildOptions(), host) == (
        "van_b1-fp16-sm89-trt11.4.0"
    )
    assert engine_name("van_b1", "fp16", tensorrt, plus, host) == (
        "van_b1-fp16-ampere-plus-trt11.4.0"
    )
    last = BuildOptions(version_compatible=True)
    assert engine_name("van_b1", "fp16", tensorrt, last, host) == ("van_b1-fp16-sm89-trt11.4.0-vc")


def test_builds_side_by_side_do_not_disturb_each_other(
    rtx: Backend, digits_onnx: Path, tmp_path: Path
) -> None:
    found: list[Sidecar] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(built(digits_onnx, tmp_path / n, rtx)))
        for n in ("a.plan", "b.plan")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sidecar.name for sidecar in found) == ["a", "b"]
    assert {read_sidecar(tmp_path / f"{s.name}.plan").plan_sha256 for s in found} == {
        s.plan_sha256 for s in found
    }


@pytest.mark.slow
def test_the_layers_of_a_folded_van_b0(rtx: Backend, tmp_path: Path) -> None:
    """The parser makes at most 220 layers of van_b0; the original network gives far more."""
    import torch

    from van_deploy.graph.export import onnx_from_van
    from van_deploy.graph.fold import fold_van
    from van_deploy.model.checkpoint import load_van

    loaded = load_van("van_b0", weights="random")
    folded = fold_van(loaded.model, torch.zeros(1, 3, 64, 64))
    path = tmp_path / "model.onnx"
    onnx.save(onnx_from_van(folded.model, 64), path)
    sidecar = built(path, tmp_path / "e.plan", rtx)
    assert sidecar.parser_layers <= 220


def _children(parent: int | None = None) -> list[int]:
    """Return the processes that a process (this one) has started."""
    tasks = Path(f"/proc/{parent or os.getpid()}/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]

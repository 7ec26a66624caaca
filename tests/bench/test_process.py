"""A worker: asleep when not asked, and every way it can fail."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.each import each
from van_deploy.bench.contender import Contender
from van_deploy.bench.process import KEEP_MEMORY, WorkerError, WorkerProcess
from van_deploy.bench.race import Race
from van_deploy.bench.worker import Worker
from van_deploy.bundle import Bundle
from van_deploy.config import Budget

QUICK = Budget(seconds=0.05, calls=2, limit_s=0.3, rounds=2, warmup_s=0.0)
NO_PROC = not Path("/proc/self/stat").exists()


@pytest.fixture
def graph(digits_bundle: Bundle) -> Contender:
    file = str(digits_bundle.verified("fp32"))
    return Contender("fp32", "onnxruntime", "fp32", file, mode="ort-cpu")


def state(pid: int, letter: str) -> str:
    """Return the process's state, such as ``T`` for stopped, once it is ``letter`` or never is."""
    for _ in range(100):
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if found == letter:
            break
        time.sleep(0.02)
    return found


@pytest.mark.skipif(NO_PROC, reason="there is no /proc here")
def test_a_worker_is_stopped_between_requests(graph: Contender, images: Path) -> None:
    with WorkerProcess(1) as process:
        process.ask("load", contender=graph, threads=1, streams=1)
        assert state(process.pid, "T") == "T"
        file = images / "none.npy"
        first_ms, fastest_ms = process.ask("feed", images=file, batch=2, warmup_s=0.0)
        assert min(first_ms, fastest_ms) > 0
        assert state(process.pid, "T") == "T"
        latencies, wall_s, peak = process.ask("time", seconds=0.05)
    assert peak > 10e6
    assert wall_s >= sum(latencies) / 1e3 >= 0.05


@pytest.mark.skipif(NO_PROC, reason="there is no /proc here")
def test_a_process_keeps_its_memory_unless_it_is_not_to_or_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def variables(*, keeps: bool) -> set[str]:
        with WorkerProcess(1, keeps_memory=keeps) as process:
            state(process.pid, "S")
            text = Path(f"/proc/{process.pid}/environ").read_bytes().decode()
        return {entry for entry in text.split("\0") if entry.startswith("MALLOC_")}

    for name in KEEP_MEMORY:
        monkeypatch.delenv(name, raising=False)
    assert variables(keeps=True) == {f"{name}={value}" for name, value in KEEP_MEMORY.items()}
    assert variables(keeps=False) == set()
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "9")
    assert "MALLOC_MMAP_MAX_=9" in variables(keeps=True)


def test_a_file_the_runtime_refuses_is_one_message(graph: Contender, tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no graph")
    contender = replace(graph, file=str(broken))
    with WorkerProcess(1) as process, pytest.raises(WorkerError, match="cannot load") as caught:
        process.ask("load", contender=contender, threads=1, streams=1)
    assert caught.value.kind == "failed"


@each("text", ["DefaultCPUAllocator: can't allocate memory", "CUDA out of memory. Tried", ""])
def test_exhausted_memory_is_recognised(text: str) -> None:
    worker = Worker()

    def fail() -> None:
        raise RuntimeError(text) if text else MemoryError

    worker._calls = [fail]
    answer = worker.answer("time", {"seconds": 0.0})
    assert (type(answer), answer.kind) == (WorkerError, "memory")


def test_what_fails_is_a_row_and_the_rest_goes_on(graph: Contender, images: Path) -> None:
    narrow = replace(graph, name="narrow", min_batch=2, max_batch=2)
    with Race([graph, narrow], threads=2, streams=2) as race:
        killed = race.lanes[0].process
        assert killed is not None
        os.kill(killed.pid, signal.SIGKILL)
        first, second = (
            {row.contender: row for row in race.run(images, batch, 64, QUICK, "narrow")}
            for batch in (1, 2)
        )
        loaded = race.lanes[0].loaded
    assert first["fp32"].error_kind == "killed"
    assert "SIGKILL" in first["fp32"].error
    assert first["narrow"].error == "batch 1 is outside the engine's profile (2 to 2)"
    assert first["narrow"].error_kind == "batch"
    assert second["narrow"].latency is not None
    assert second["fp32"].latency is not None, "it starts again at the next batch"
    assert second["fp32"].ratio is not None
    assert second["fp32"].streams == 2
    assert second["fp32"].latency.calls >= 2 * QUICK.rounds
    assert loaded
    assert loaded.threads_each == 1

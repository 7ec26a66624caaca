"""A worker: asleep when not asked, and every way it can fail."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from van_deploy.bench.contender import Contender
from van_deploy.bench.process import KEEP_MEMORY, WorkerError, WorkerProcess
from van_deploy.bench.race import Race
from van_deploy.bench.worker import Worker
from van_deploy.bundle import Bundle
from van_deploy.config import Budget

pytestmark = pytest.mark.skipif(os.name == "nt", reason="processes are stopped by POSIX signals")
QUICK = Budget(seconds=0.05, calls=2, limit_s=0.3, rounds=2, warmup_s=0.0)


@pytest.fixture
def graph(digits: Bundle) -> Contender:
    return Contender("ort-cpu/fp32", "onnxruntime", "fp32", str(digits.verified("fp32")))


def state(pid: int) -> str:
    """Return the process's state letter, such as ``T`` for stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(pid: int, letter: str) -> str:
    for _ in range(100):
        if state(pid) == letter:
            break
        time.sleep(0.02)
    return state(pid)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc here")
def test_a_worker_is_stopped_between_requests(graph: Contender, images: Path) -> None:
    with WorkerProcess(1) as process:
        process.ask("load", contender=asdict(graph), threads=1, streams=1)
        assert wait_for(process.pid, "T") == "T"
        answer = process.ask("feed", images=str(images), batch=2, preprocessing=None)
        assert answer["first_call_s"] > 0
        assert wait_for(process.pid, "T") == "T"
        measured = process.ask("time", seconds=0.0, calls=3, limit_s=5.0)
    assert len(measured["latencies_ms"]) == measured["calls"] == 3
    assert measured["peak_rss_bytes"] > 10e6
    assert measured["wall_s"] >= sum(measured["latencies_ms"]) / 1e3


def test_a_file_the_run_time_refuses_is_one_message(tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no graph")
    contender = Contender("x", "onnxruntime", "fp32", str(broken))
    with WorkerProcess(1) as process, pytest.raises(WorkerError, match="cannot load") as caught:
        process.ask("load", contender=asdict(contender), threads=1, streams=1)
    assert caught.value.kind == "failed"


@pytest.mark.parametrize(
    "text", ["DefaultCPUAllocator: can't allocate memory", "CUDA out of memory. Tried", ""]
)
def test_exhausted_memory_is_recognised(text: str, images: Path) -> None:
    worker = Worker()

    def fail() -> None:
        raise RuntimeError(text) if text else MemoryError

    worker._calls = [fail]
    answer = worker.answer({"do": "time", "seconds": 0.0, "calls": 1, "limit_s": 1.0})
    assert answer["error"]["kind"] == "memory"


def test_a_killed_worker_is_a_row_and_starts_again_at_the_next_batch(
    graph: Contender, images: Path
) -> None:
    other = replace(graph, name="other")
    with Race([graph, other], threads=1) as race:
        victim = race.lanes[0].process
        assert victim is not None
        os.kill(victim.pid, signal.SIGKILL)
        first = {row.contender: row for row in race.run(images, 1, 64, QUICK, "other")}
        second = {row.contender: row for row in race.run(images, 2, 64, QUICK, "other")}
    assert first["ort-cpu/fp32"].error_kind == "killed"
    assert "SIGKILL" in first["ort-cpu/fp32"].error
    assert first["other"].latency is not None
    assert second["ort-cpu/fp32"].latency is not None
    assert second["ort-cpu/fp32"].ratio is not None


def test_a_batch_outside_the_profile_is_a_row_and_the_rest_goes_on(
    graph: Contender, images: Path
) -> None:
    narrow = replace(graph, name="narrow", max_batch=1)
    with Race([graph, narrow], threads=1) as race:
        rows = {row.contender: row for row in race.run(images, 2, 64, QUICK, graph.name)}
        again = {row.contender: row for row in race.run(images, 1, 64, QUICK, graph.name)}
    assert rows["narrow"].error == "batch 2 is outside the engine's profile (1 to 1)"
    assert rows["narrow"].error_kind == "batch"
    assert rows[graph.name].latency is not None
    assert again["narrow"].latency is not None


def test_streams_share_the_threads_and_all_of_them_count(graph: Contender, images: Path) -> None:
    with Race([graph], threads=2, streams=2) as race:
        (row,) = race.run(images, 1, 64, QUICK, graph.name)
        loaded = race.lanes[0].loaded
    assert loaded is not None
    assert loaded.threads_each == 1
    assert row.streams == 2
    assert row.latency is not None
    assert row.latency.calls >= 2 * QUICK.rounds


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc here")
def test_a_process_keeps_its_memory_unless_it_is_not_to_or_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def variables(*, keeps: bool) -> set[str]:
        with WorkerProcess(1, keeps_memory=keeps) as process:
            wait_for(process.pid, "S")
            text = Path(f"/proc/{process.pid}/environ").read_bytes().decode()
        return {entry for entry in text.split("\0") if entry.startswith("MALLOC_")}

    for name in KEEP_MEMORY:
        monkeypatch.delenv(name, raising=False)
    assert variables(keeps=True) == {f"{name}={value}" for name, value in KEEP_MEMORY.items()}
    assert variables(keeps=False) == set()
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "9")
    assert "MALLOC_MMAP_MAX_=9" in variables(keeps=True)

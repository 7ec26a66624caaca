"""Hardware of this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest

from van_deploy.environment.hardware import Cpu, cpu, memory, nvidia_driver, peak_memory_bytes


def test_cpu_features_and_allowed_cores() -> None:
    processor = cpu()
    assert 1 <= processor.cores_allowed <= processor.cores
    assert processor.name
    if Path("/proc/cpuinfo").exists():
        flags = set(Path("/proc/cpuinfo").read_text().split())
        assert set(processor.features) <= flags
        assert ("avx2" in processor.features) == ("avx2" in flags)
    if hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        restricted = cpu()
        os.sched_setaffinity(0, allowed)
        assert restricted.cores_allowed == 1


def test_bfloat16_support_from_instruction_sets() -> None:
    for features, has in (("avx2 avx512_vnni", False), ("amx_bf16", True), ("asimddp bf16", True)):
        assert Cpu("a processor", 2, 2, tuple(features.split())).has_bfloat16 is has


def test_memory_in_bytes() -> None:
    size = memory()
    assert 2**28 < size.available_bytes <= size.total_bytes < 2**50
    assert 2**24 < peak_memory_bytes() < size.total_bytes


def test_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlInit", Mock(side_effect=pynvml.NVMLError_LibraryNotFound()))
    assert nvidia_driver() is None


@pytest.mark.gpu
def test_driver_agrees_with_nvidia_smi() -> None:
    driver = nvidia_driver()
    assert driver is not None
    query = ["--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    expected = subprocess.check_output(["nvidia-smi", *query], text=True)
    lines = [
        "{}, {}.{}, {}".format(gpu.name, *(gpu.compute_capability or ()), driver.version)
        for gpu in driver.gpus
    ]
    assert expected.splitlines() == lines

"""What the machine offers, asked of this real machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest

from van_deploy.environment.hardware import Cpu, cpu, memory, nvidia_driver, peak_memory_bytes


def test_the_processor_as_this_process_may_use_it() -> None:
    here = cpu()
    assert 1 <= here.cores_allowed <= here.cores
    assert here.name
    if Path("/proc/cpuinfo").exists():
        flags = set(Path("/proc/cpuinfo").read_text().split())
        assert set(here.features) <= flags
        assert ("avx2" in here.features) == ("avx2" in flags)
    if hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        narrow = cpu()
        os.sched_setaffinity(0, allowed)
        assert narrow.cores_allowed == 1


def test_bfloat16_is_known_by_its_instructions() -> None:
    for features, has in (("avx2 avx512_vnni", False), ("amx_bf16", True), ("asimddp bf16", True)):
        assert Cpu("a processor", 2, 2, tuple(features.split())).has_bfloat16 is has


def test_memory_is_bytes() -> None:
    here = memory()
    assert 2**28 < here.available_bytes <= here.total_bytes < 2**50
    assert 2**24 < peak_memory_bytes() < here.total_bytes


def test_no_driver_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlInit", Mock(side_effect=pynvml.NVMLError_LibraryNotFound()))
    assert nvidia_driver() is None


@pytest.mark.gpu
def test_the_driver_agrees_with_nvidia_smi() -> None:
    driver = nvidia_driver()
    assert driver is not None
    query = ["--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    told = subprocess.check_output(["nvidia-smi", *query], text=True)
    ours = [
        "{}, {}.{}, {}".format(gpu.name, *(gpu.compute_capability or ()), driver.version)
        for gpu in driver.gpus
    ]
    assert told.splitlines() == ours

"""What is installed and what it can do here, as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType

from van_deploy.environment.machine import Environment
from van_deploy.environment.needs import abilities
from van_deploy.environment.packages import Installed, canonical_name, pip_command
from van_deploy.report.tables import (
    Column,
    bytes_text,
    facts_table,
    notes,
    rows_table,
    stack,
    verdict,
)

__all__ = ["environment_tables"]


def environment_tables(environment: Environment) -> RenderableType:
    """Return the machine, the packages, what can be done here, and what clashes."""
    missing = [item for item in environment.components if not item.usable]
    return stack(
        facts_table(_machine_facts(environment)),
        _packages_table(environment),
        _abilities_table(environment),
        _missing_table(missing) if missing else None,
        _clashes_table(environment) if environment.clashes else None,
    )


def _machine_facts(environment: Environment) -> dict[str, object]:
    cpu, memory, disk = environment.cpu, environment.memory, environment.disk
    total, free = (
        "unknown" if size is None else bytes_text(size)
        for size in (memory.total_bytes, memory.available_bytes)
    )
    return {
        "van-deploy": environment.van_deploy,
        "Python": f"{environment.python} on {environment.system}",
        "CPU": f"{cpu.name}, {cpu.cores_allowed} of {cpu.cores} cores allowed",
        "CPU features": " ".join(cpu.features) or "none of those that speed up inference",
        "memory": f"{total}, {free} free",
        "disk": f"{bytes_text(disk.free_bytes)} free in {disk.folder}",
        "GPU": "\n".join(_gpu_lines(environment)),
        "PyTorch's CUDA": environment.torch_cuda or "none",
        "ONNX Runtime's CUDA": environment.onnxruntime_cuda or "none",
        "ONNX Runtime": ", ".join(environment.providers) or "no providers",
    }


def _gpu_lines(environment: Environment) -> Iterator[str]:
    driver = environment.driver
    if driver is None:
        yield "none: no NVIDIA driver answers"
        return
    for gpu in driver.gpus:
        size = "" if gpu.memory_bytes is None else f", {bytes_text(gpu.memory_bytes)}"
        yield f"{gpu.name}, {gpu.sm}{size}"
    if driver.hidden:
        yield f"{driver.hidden} more that CUDA_VISIBLE_DEVICES hides"
    newest = "{}.{}".format(*driver.cuda_version)
    yield f"NVIDIA driver {driver.version}, CUDA up to {newest}"


def _packages_table(environment: Environment) -> RenderableType:
    return rows_table(
        ["state", Column("package", style="bold"), "version", Column("is there for", wrap=True)],
        [
            (verdict(_state(item)), item.component.name, _version(item), item.component.enables)
            for item in environment.components
        ],
    )


def _state(item: Installed) -> str:
    if item.fault is not None:
        return "FAIL"
    return "MISSING" if item.version is None else "OK"


def _version(item: Installed) -> str | None:
    """Return the version, with the package's own name where that is another."""
    usual = item.distribution == canonical_name(item.component.install)
    return item.version if usual or not item.version else f"{item.version} ({item.distribution})"


def _abilities_table(environment: Environment) -> RenderableType:
    return rows_table(
        ["here", "task", Column("because", wrap=True)],
        [
            (verdict("YES"), ability.task, "")
            if ability.shortfall is None
            else (verdict("NO"), ability.task, ability.shortfall.problem)
            for ability in abilities(environment)
        ],
    )


def _missing_table(missing: list[Installed]) -> RenderableType:
    return rows_table(
        [Column("to have", style="bold"), Column("run", wrap=True)],
        [
            (item.component.name, item.fault or f"{pip_command()} install {item.component.install}")
            for item in missing
        ],
    )


def _clashes_table(environment: Environment) -> RenderableType:
    return notes(f"{clash.message}\n{clash.remedy}" for clash in environment.clashes)

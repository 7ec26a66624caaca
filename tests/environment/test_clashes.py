"""Clashes are told with the command that ends them."""

from __future__ import annotations

import importlib.metadata

from tests.each import each
from van_deploy.environment.hardware import Driver, Gpu
from van_deploy.environment.packages import (
    clashes_among,
    installed_distributions,
    pip_command,
    unmet_requirements,
)

GPUS = (Gpu("NVIDIA L4", (8, 9), 24 * 2**30),)
L4, OLD = Driver("580.65.06", (13, 0), GPUS), Driver("535.104.05", (12, 2), GPUS)
BOTH = ["onnxruntime", "onnxruntime-gpu"]
SAME = "are both installed; they hold the same module and overwrite each other's files."


@each(
    ("installed", "torch_cuda", "driver", "ort_cuda", "message", "remedy"),
    [
        (["onnxruntime", "tensorrt-rtx-cu13"], "13.0", None, None, None, ""),
        (
            *(BOTH, "13.0", None, None),
            f"onnxruntime and onnxruntime-gpu {SAME}",
            "uninstall --yes onnxruntime onnxruntime-gpu && {pip} install 'onnxruntime'`.",
        ),
        (
            BOTH,
            None,
            L4,
            None,
            f"onnxruntime and onnxruntime-gpu {SAME}",
            "install 'onnxruntime-gpu[cuda",
        ),
        (
            *(["onnxruntime"], "13.0", L4, None),
            "There is an NVIDIA GPU, but the installed onnxruntime is the one for CPUs.",
            "uninstall --yes onnxruntime && {pip} install 'onnxruntime-gpu[cuda,cudnn]'`.",
        ),
        *(
            (
                *([f"{flavour}-cu12"], "13.0", None, None),
                f"{flavour}-cu12 was built for CUDA 12, but PyTorch for CUDA 13.0: one process "
                "cannot load both.",
                f"uninstall --yes {flavour}-cu12 && {{pip}} install '{flavour}-cu13'`.",
            )
            for flavour in ("tensorrt", "tensorrt-rtx")
        ),
        (["tensorrt-cu12"], "12.8", None, None, None, ""),
        (["tensorrt-cu12"], None, None, None, None, ""),
        (
            *(["onnxruntime-gpu"], "13.0", None, "12.8"),
            "onnxruntime-gpu was built for CUDA 12.8, but PyTorch for CUDA 13.0: one process "
            "cannot load both.",
            "https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html",
        ),
        (["onnxruntime-gpu"], "13.2", None, "13.0", None, ""),
        (
            *(["tensorrt-cu12", "tensorrt-cu13"], "13.0", None, None),
            f"tensorrt-cu12 and tensorrt-cu13 {SAME}",
            "install 'tensorrt-cu13'`.",
        ),
        (
            *(["onnxruntime-gpu"], "13.0", OLD, None),
            "PyTorch was built for CUDA 13.0, but NVIDIA driver 535.104.05 runs CUDA up to 12.2.",
            "Update the driver, or install a PyTorch built for CUDA 12.",
        ),
        (["onnxruntime-gpu"], "12.6", OLD, None, None, ""),
    ],
)
def test_what_does_not_go_together(
    installed: list[str],
    torch_cuda: str | None,
    driver: Driver | None,
    ort_cuda: str | None,
    message: str | None,
    remedy: str,
) -> None:
    found = clashes_among(dict.fromkeys(installed, "1.0"), torch_cuda, driver, ort_cuda)
    assert [clash.message for clash in found] == [message] * (message is not None)
    for clash in found:
        assert remedy.format(pip=pip_command()) in clash.remedy


def test_requirements_that_are_met_too_old_or_missing() -> None:
    stated = [line for line in importlib.metadata.requires("onnx") or () if "protobuf" in line]
    assert stated, "onnx requires protobuf no more: take another requirement for this test"
    here = installed_distributions()
    assert unmet_requirements(here) == ()
    (old,) = (
        c for c in unmet_requirements({**here, "protobuf": "3.0"}) if "onnx needs" in c.message
    )
    assert old.message == f"onnx needs {stated[0]}, but protobuf 3.0 is installed."
    assert old.remedy == f"Try `{pip_command()} install '{stated[0]}'`."
    without = {name: version for name, version in here.items() if name != "protobuf"}
    assert f"onnx needs {stated[0]}, but protobuf is not installed." in {
        clash.message for clash in unmet_requirements(without)
    }

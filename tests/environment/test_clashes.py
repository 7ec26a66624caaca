"""Clashes are told with the command that ends them."""

from __future__ import annotations

import importlib.metadata

from tests.each import each
from van_deploy.environment.clashes import Clash, clashes_among, unmet_requirements
from van_deploy.environment.hardware import Driver, Gpu
from van_deploy.environment.packages import installed_distributions, pip_command

L4 = Driver("580.65.06", (13, 0), (Gpu("NVIDIA L4", (8, 9), 24 * 2**30),))
OLD = Driver("535.104.05", (12, 2), (Gpu("NVIDIA L4", (8, 9), 24 * 2**30),))
PIP = pip_command()


def test_nothing_clashes_in_a_plain_cpu_installation() -> None:
    assert (
        clashes_among({"onnxruntime": "1.32.0", "tensorrt-rtx-cu13": "1.7.1"}, "13.0", None) == ()
    )


@each(("driver", "kept"), [(None, "onnxruntime"), (L4, "onnxruntime-gpu")])
def test_two_onnxruntimes(driver: Driver | None, kept: str) -> None:
    both = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"}
    assert clashes_among(both, None, driver) == (
        Clash(
            "onnxruntime and onnxruntime-gpu are both installed; they hold the same module and "
            "overwrite each other's files.",
            f"Keep one: `{PIP} uninstall --yes onnxruntime onnxruntime-gpu && "
            f"{PIP} install {kept}`.",
        ),
    )


def test_a_gpu_with_the_onnxruntime_for_cpus() -> None:
    (clash,) = clashes_among({"onnxruntime": "1.32.0"}, "13.0", L4)
    assert clash.message == (
        "There is an NVIDIA GPU, but the installed onnxruntime is the one for CPUs."
    )


@each("flavour", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_of_another_cuda_than_pytorch(flavour: str) -> None:
    (clash,) = clashes_among({f"{flavour}-cu12": "11.4.0"}, "13.0", None)
    assert clash.message == (
        f"{flavour}-cu12 is for CUDA 12, but PyTorch was built for CUDA 13.0: "
        "one process cannot use both."
    )
    assert f"install {flavour}-cu13" in clash.remedy
    assert clashes_among({f"{flavour}-cu12": "11.4.0"}, "12.8", None) == ()
    assert clashes_among({f"{flavour}-cu12": "11.4.0"}, None, None) == ()


def test_onnxruntime_of_another_cuda_than_pytorch() -> None:
    (clash,) = clashes_among({"onnxruntime-gpu": "1.31.1"}, "13.0", None, "12.8")
    assert clash.message == (
        "ONNX Runtime was built for CUDA 12.8, but PyTorch for CUDA 13.0: one process cannot "
        "load both."
    )
    assert clashes_among({"onnxruntime-gpu": "1.31.1"}, "13.2", None, "13.0") == ()


def test_two_flavours_of_one_tensorrt() -> None:
    (clash,) = clashes_among({"tensorrt-cu12": "11.4.0", "tensorrt-cu13": "11.4.0"}, "13.0", None)
    assert clash.message.startswith("tensorrt-cu12 and tensorrt-cu13 are both installed")


def test_a_driver_too_old_for_pytorch() -> None:
    (clash,) = clashes_among({"onnxruntime-gpu": "1.32.0"}, "13.0", OLD)
    assert clash.message == (
        "PyTorch was built for CUDA 13.0, but NVIDIA driver 535.104.05 runs CUDA up to 12.2."
    )
    assert clashes_among({"onnxruntime-gpu": "1.32.0"}, "12.6", OLD) == ()


def test_what_is_installed_here_has_what_it_requires() -> None:
    assert unmet_requirements(installed_distributions()) == ()


def test_a_requirement_that_is_too_old_or_missing_is_told() -> None:
    stated = [line for line in importlib.metadata.requires("onnx") or () if "protobuf" in line]
    assert stated, "onnx requires protobuf no more: take another requirement for this test"
    here = installed_distributions()
    (old,) = (
        c for c in unmet_requirements({**here, "protobuf": "3.0"}) if "onnx needs" in c.message
    )
    assert old.message == f"onnx needs {stated[0]}, but protobuf 3.0 is installed."
    assert old.remedy == f"Try `{PIP} install '{stated[0]}'`."
    without = {name: version for name, version in here.items() if name != "protobuf"}
    assert f"onnx needs {stated[0]}, but protobuf is not installed." in {
        clash.message for clash in unmet_requirements(without)
    }

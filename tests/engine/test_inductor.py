"""Inductor packages: unsupported options; packages compiled, verified and run on this CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import van_deploy
from tests.artifacts import ArtifactCache, Copy
from tests.conftest import Cli
from tests.each import each
from van_deploy.bundle import Bundle
from van_deploy.config import BatchRange, BuildSettings
from van_deploy.engine.backend import Host
from van_deploy.engine.compatibility import torch_version
from van_deploy.engine.inductor import package_settings
from van_deploy.errors import BundleError, InputError, UsageError
from van_deploy.metrics import compare
from van_deploy.runners.network import PYTORCH, Network
from van_deploy.runners.pytorch import InductorRunner

GPU = Host("a GPU", "sm_90")
FUSED: dict[str, Any] = {"backend": "inductor", "fused_kernels": True}


@each(
    ("words", "code", "message"),
    [
        ("--precision int8", 5, "An Inductor package computes in fp32, fp16, bf16"),
        ("--target sm_90", 2, "--target is an option of TensorRT, and --backend is inductor"),
        ("--batch 1:1:1 --batch 2:4:8", 2, "A package supports one range of batches"),
        ("--device cuda:7", 3, "A package for cuda:7 is compiled on the GPU that will run it"),
        ("--device tpu", 2, "'--device' is 'tpu'"),
        ("--device cpu --fused-kernels", 2, "The fused kernels run on a GPU, in fp16 or"),
        ("--tune", 3, "--tune cannot time candidates: no NVIDIA GPU"),
        ("--backend auto --device cpu", 2, "--device cpu is an option of Inductor"),
        ("--backend auto --max-autotune", 2, "--max-autotune is an option of Inductor"),
        ("--backend auto --fused-kernels", 2, "--fused-kernels is an option of Inductor"),
        ("--device cpu no-such-compiler", 3, "'no-such-compiler', which is not installed"),
    ],
)
def test_unsupported_options_of_inductor_and_of_other_backends(
    cli: Cli, digits_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, **case: Any
) -> None:
    words, code, message = case.values()
    if words.endswith("no-such-compiler"):
        words, compiler = words.rsplit(" ", 1)
        monkeypatch.setenv("CXX", compiler)
    result = cli("build", digits_bundle.path, "--backend", "inductor", *words.split())
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in " ".join(result.stderr.split())


def test_fused_kernels_need_a_gpu_half_precision_and_one_batch_size(digits_bundle: Bundle) -> None:
    fixed, dynamic = (BatchRange(8, 8, 8),), (BatchRange(1, 4, 8),)
    supported = BuildSettings(**FUSED, precisions=("fp16",), profiles=fixed)
    assert package_settings(digits_bundle, supported, GPU)[0].device == "cuda:0"
    for precision, batches in (("fp16", dynamic), ("fp32", fixed)):
        unsupported = BuildSettings(**FUSED, precisions=(precision,), profiles=batches)
        with pytest.raises(UsageError, match="fused kernels"):
            package_settings(digits_bundle, unsupported, GPU)


@pytest.fixture(scope="module")
def package_bundle(artifact_cache: ArtifactCache, digits_bundle: Bundle) -> Path:
    """Return a bundle with a tuned FP32 and a BF16 package for this CPU; tests do not change it."""

    def create(folder: Path) -> None:
        shutil.copytree(digits_bundle.path, folder)
        bundle = van_deploy.open_bundle(folder)
        for_cpu: Any = {"backend": "inductor", "device": "cpu"}
        (row,) = bundle.build(**for_cpu, precisions=["fp32"], tune=True).tuned
        assert (row.selected, row.passed, (row.latency_ms or 0) > 0) == (True, True, True)
        assert package_names(folder)["fp32"] == row.engine
        assert bundle.build(**for_cpu, precisions=["bf16"]).passed

    return artifact_cache("with_packages", create)


def package_names(folder: Path) -> dict[str, str]:
    artifacts = Bundle.open(folder).artifacts.values()
    return {item.precision: item.name for item in artifacts if item.kind == "package"}


@pytest.mark.slow
def test_logits_match_pytorch_at_several_batch_sizes(package_bundle: Path) -> None:
    bundle, names = Bundle.open(package_bundle), package_names(package_bundle)
    shape = (9, bundle.manifest.architecture.in_chans, *bundle.manifest.preprocessing.sides)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    with Network(bundle, PYTORCH) as original:
        expected = next(iter(original.run(images).values()))
    for precision, floor in (("fp32", 100.0), ("bf16", 30.0)):
        with InductorRunner(bundle.verified_path(names[precision])) as runner:
            for batch in (1, 3, 8):
                metrics = compare(expected[:batch], runner.run(images[:batch]))
                assert metrics.sqnr_db >= floor, (precision, batch)
            with pytest.raises(InputError, match="does not serve a batch of 9"):
                runner.run(images)
            with pytest.raises(UsageError, match="runs on no GPU"):
                runner.resident_batch(images[:1])
        with Network(bundle, names[precision]) as network:  # splits larger batches
            assert next(iter(network.run(images).values())).shape[0] == 9


@pytest.mark.slow
def test_commands_support_packages(
    cli: Cli, copy_bundle: Copy, package_bundle: Path, heldout_200: Path, tmp_path: Path
) -> None:
    folder, names = copy_bundle(package_bundle), package_names(package_bundle)
    report = json.loads(cli("verify", folder, "--json").stdout)
    verdicts = {name: report["artifacts"][names[name]] for name in ("fp32", "bf16")}
    assert {name: one["numeric"] for name, one in verdicts.items()} == {n: n for n in verdicts}
    assert {(one["runner"], one["outcome"]) for one in verdicts.values()} == {("inductor", "pass")}
    artifact = ("--artifact", names["fp32"])
    assert cli("evaluate", folder, "--images", heldout_200, *artifact).exit_code == 0
    inspected = cli("inspect", folder / "engines" / f"{names['bf16']}.pt2")
    assert inspected.exit_code == 0
    assert torch_version() in inspected.stdout
    assert "it runs on this machine" in inspected.stdout
    failed = cli("package", "triton", folder, *artifact, "--output", tmp_path / "t")
    assert failed.exit_code == 5
    assert "Triton cannot load" in failed.stderr


@pytest.mark.slow
def test_reused_and_changed_packages(copy_bundle: Copy, package_bundle: Path) -> None:
    folder = copy_bundle(package_bundle)
    again = van_deploy.open_bundle(folder).build(backend="inductor", device="cpu")
    assert [one.outcome for one in again.outcomes] == ["reused"]
    name = package_names(folder)["fp32"]
    file = folder / "engines" / f"{name}.pt2"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"\.pt2"):
        Network(Bundle.open(folder), name).__enter__()

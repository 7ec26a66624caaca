"""Inductor packages: refused where they cannot run, and compiled, judged and run on this CPU."""

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
        ("--tune", 3, "--tune cannot time anything here: no NVIDIA GPU answers."),
        ("--backend auto --device cpu", 2, "--device cpu is Inductor's"),
        ("--backend auto --max-autotune", 2, "--max-autotune is Inductor's"),
        ("--backend auto --fused-kernels", 2, "--fused-kernels is Inductor's"),
        ("--device cpu no-such-compiler", 3, "'no-such-compiler', which is not installed"),
    ],
)
def test_what_cannot_be_asked_of_inductor_or_of_others(
    cli: Cli, digits_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, **case: Any
) -> None:
    words, code, message = case.values()
    if words.endswith("no-such-compiler"):
        words, compiler = words.rsplit(" ", 1)
        monkeypatch.setenv("CXX", compiler)
    result = cli("build", digits_bundle.path, "--backend", "inductor", *words.split())
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in " ".join(result.stderr.split())


def test_where_the_fused_kernels_run(digits_bundle: Bundle) -> None:
    one, some = (BatchRange(8, 8, 8),), (BatchRange(1, 4, 8),)
    served = BuildSettings(**FUSED, precisions=("fp16",), profiles=one)
    assert package_settings(digits_bundle, served, GPU)[0].device == "cuda:0"
    for precision, batches in (("fp16", some), ("fp32", one)):
        refused = BuildSettings(**FUSED, precisions=(precision,), profiles=batches)
        with pytest.raises(UsageError, match="fused kernels"):
            package_settings(digits_bundle, refused, GPU)


@pytest.fixture(scope="module")
def packaged(artifact_cache: ArtifactCache, digits_bundle: Bundle) -> Path:
    """Return a bundle with an FP32 (tuned) and a BF16 package for this CPU; not to be changed."""

    def make(folder: Path) -> None:
        shutil.copytree(digits_bundle.path, folder)
        bundle = van_deploy.open_bundle(folder)
        for_cpu: Any = {"backend": "inductor", "device": "cpu"}
        (row,) = bundle.build(**for_cpu, precisions=["fp32"], tune=True).tuned
        assert (row.kept, row.passed, (row.latency_ms or 0) > 0) == (True, True, True)
        assert names_of(folder)["fp32"] == row.engine
        assert bundle.build(**for_cpu, precisions=["bf16"]).passed

    return artifact_cache("with_packages", make)


def names_of(folder: Path) -> dict[str, str]:
    kinds = Bundle.open(folder).artifacts.values()
    return {item.precision: item.name for item in kinds if item.kind == "package"}


@pytest.mark.slow
def test_logits_at_several_batches(packaged: Path) -> None:
    bundle, names = Bundle.open(packaged), names_of(packaged)
    shape = (9, bundle.manifest.architecture.in_chans, *bundle.manifest.preprocessing.sides)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    with Network(bundle, PYTORCH) as original:
        expected = next(iter(original.run(images).values()))
    for precision, floor in (("fp32", 100.0), ("bf16", 30.0)):
        with InductorRunner(bundle.verified_path(names[precision])) as runner:
            for batch in (1, 3, 8):
                found = compare(expected[:batch], runner.run(images[:batch]))
                assert found.sqnr_db >= floor, (precision, batch)
            with pytest.raises(InputError, match="does not serve a batch of 9"):
                runner.run(images)
            with pytest.raises(UsageError, match="runs on no GPU"):
                runner.resident_batch(images[:1])
        with Network(bundle, names[precision]) as network:  # which splits what is too large
            assert next(iter(network.run(images).values())).shape[0] == 9


@pytest.mark.slow
def test_commands_take_packages(
    cli: Cli, copy_bundle: Copy, packaged: Path, heldout_200: Path, tmp_path: Path
) -> None:
    folder, names = copy_bundle(packaged), names_of(packaged)
    found = json.loads(cli("verify", folder, "--json").stdout)
    verdicts = {name: found["artifacts"][names[name]] for name in ("fp32", "bf16")}
    assert {name: one["numeric"] for name, one in verdicts.items()} == {n: n for n in verdicts}
    assert {(one["runner"], one["outcome"]) for one in verdicts.values()} == {("inductor", "pass")}
    one = ("--artifact", names["fp32"])
    assert cli("evaluate", folder, "--images", heldout_200, *one).exit_code == 0
    shown = cli("inspect", folder / "engines" / f"{names['bf16']}.pt2")
    assert shown.exit_code == 0
    assert torch_version() in shown.stdout
    assert "it runs on this machine" in shown.stdout
    refused = cli("package", "triton", folder, *one, "--output", tmp_path / "t")
    assert refused.exit_code == 5
    assert "Triton cannot load" in refused.stderr


@pytest.mark.slow
def test_a_rerun_reuses_it_and_a_changed_one_is_not_loaded(
    copy_bundle: Copy, packaged: Path
) -> None:
    folder = copy_bundle(packaged)
    again = van_deploy.open_bundle(folder).build(backend="inductor", device="cpu")
    assert [one.outcome for one in again.outcomes] == ["reused"]
    name = names_of(folder)["fp32"]
    file = folder / "engines" / f"{name}.pt2"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"\.pt2"):
        Network(Bundle.open(folder), name).__enter__()

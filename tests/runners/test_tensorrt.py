"""Engines on a GPU: what is checked before they load, here; and everything else, with a GPU.

The tests marked ``gpu`` are complete, and were never run where this was written:
there was no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.artifacts import SMALL_SIZE, MadeOnce
from tests.each import each
from van_deploy.config import BatchRange, BuildOptions, Profiling
from van_deploy.engine.backend import RTX_TARGETS, Backend, choose_backend
from van_deploy.engine.build import engine_from_onnx
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.inspect import describe_engine
from van_deploy.engine.sidecar import read_sidecar, sidecar_path, write_sidecar
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.errors import InputError, MissingDependency, UsageError
from van_deploy.metrics import compare
from van_deploy.precision.fp16 import DEFAULT_KEEP, fp16_from_fp32, kept_nodes
from van_deploy.runners.base import Images, run_in_batches
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner
from van_deploy.runners.tensorrt import TensorRtRunner, admit, profile_for

PROFILES = (BatchRange(1, 1, 1), BatchRange(2, 4, 8))
NO_DRIVER = nvidia_driver() is None


@dataclass(frozen=True)
class Made:
    """An engine, the file it was made from, and some images."""

    plan: Path
    onnx: Path
    images: Images
    backend: Backend


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def made(request: pytest.FixtureRequest, made_once: MadeOnce, digits_onnx: Path) -> Made:
    """Return an engine for the GPU here, or for an L4 where there is none."""
    host = host_here()
    wanted = () if host.target else ("sm_89",)
    try:
        backend = choose_backend("auto", wanted, host.target)
    except MissingDependency as error:
        pytest.skip(error.message)
    targets = (host.target or "sm_89",) if backend.builds_for_absent_gpus else ()
    options = BuildOptions(
        profiles=PROFILES, targets=targets, tf32=False, profiling=Profiling.DETAILED
    )

    def make(folder: Path) -> None:
        folder.mkdir()
        model = onnx.load(digits_onnx)
        if request.param == "fp16":
            model = fp16_from_fp32(model, kept_nodes(model, DEFAULT_KEEP))
        source = folder / "model.onnx"
        onnx.save(model, source)
        engine_from_onnx(
            *(source, folder / "e.plan"),
            backend=backend,
            options=options,
            precision=request.param,
            host=host,
        )

    folder = made_once(f"engine_{request.param}", make)
    images = np.random.default_rng(0).standard_normal((11, 3, SMALL_SIZE, SMALL_SIZE), np.float32)
    return Made(folder / "e.plan", folder / "model.onnx", images, backend)


def test_a_profile_is_chosen_by_its_optimum() -> None:
    profiles = [BatchRange(1, 1, 1), BatchRange(1, 8, 32), BatchRange(16, 64, 64)]
    assert [profile_for(profiles, batch) for batch in (1, 2, 15, 20, 32, 33, 64)] == [
        *(0, 1, 1),
        *(1, 1, 2, 2),
    ]


@each("batch", [0, 9])
def test_a_batch_outside_every_profile(batch: int) -> None:
    with pytest.raises(UsageError) as caught:
        profile_for(PROFILES, batch)
    assert caught.value.message == (
        f"The engine does not serve a batch of {batch}; its profiles are 1:1:1, 2:4:8."
    )


def test_a_plan_without_a_sidecar_is_not_admitted(tmp_path: Path) -> None:
    plan = tmp_path / "e.plan"
    plan.write_bytes(b"native code of unknown origin")
    with pytest.raises(InputError, match="has no sidecar"):
        admit(plan)
    assert admit(plan, trust_engine=True) is None


def test_trust_does_not_forgive_a_swapped_plan(made: Made, tmp_path: Path) -> None:
    plan = tmp_path / "e.plan"
    plan.write_bytes(made.plan.read_bytes()[:-1])
    write_sidecar(plan, read_sidecar(made.plan))
    assert sidecar_path(plan).exists()
    with pytest.raises(InputError, match="damaged or swapped"):
        admit(plan, trust_engine=True)


def test_a_plan_for_another_gpu_is_not_admitted(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar = read_sidecar(made.plan)
    other = next(target for target in RTX_TARGETS if target not in sidecar.targets)
    stranger = Host("a GPU", other, None, "999.0", (99, 0))
    monkeypatch.setattr("van_deploy.runners.tensorrt.host_here", lambda: stranger)
    with pytest.raises(MissingDependency) as caught:
        admit(made.plan)
    assert f"this machine has {other} (a GPU)" in caught.value.message
    assert "ebuild" in caught.value.remedy


@pytest.mark.skipif(not NO_DRIVER, reason="there is an NVIDIA driver here")
def test_without_a_gpu_the_reason_is_given(made: Made) -> None:
    with pytest.raises(MissingDependency, match="has no NVIDIA GPU that answers"):
        TensorRtRunner(made.plan).__enter__()


@pytest.mark.skipif(not NO_DRIVER, reason="there is an NVIDIA driver here")
def test_a_trusted_plan_still_needs_a_gpu(made: Made, tmp_path: Path) -> None:
    plan = tmp_path / "e.plan"
    plan.write_bytes(made.plan.read_bytes())
    runner = TensorRtRunner(plan, trust_engine=True, backend=made.backend.name)
    with pytest.raises(MissingDependency, match=r"CUDA finds no GPU here|cuda-python"):
        runner.__enter__()


def test_a_runner_that_is_not_open(made: Made) -> None:
    with pytest.raises(UsageError, match="The engine is not open"):
        TensorRtRunner(made.plan).run(made.images[:1])


@pytest.mark.gpu
class TestOnAGpu:
    """Execution, agreement, profiles, CUDA graphs, and release."""

    @pytest.fixture(scope="class")
    def expected(self, made: Made) -> Images:
        with OnnxRuntimeRunner(made.onnx) as runner:
            return runner.run(made.images)

    @pytest.fixture(params=[False, True], ids=["stream", "graph"])
    def runner(self, made: Made, request: pytest.FixtureRequest) -> Iterator[TensorRtRunner]:
        with TensorRtRunner(made.plan, cuda_graph=request.param) as opened:
            yield opened

    def test_agreement_at_every_batch(
        self, made: Made, expected: Images, runner: TensorRtRunner
    ) -> None:
        floor = {"fp32": 80.0, "fp16": 40.0}[read_sidecar(made.plan).precision]
        for batch in (1, 2, 3, 8, 1, 5, 5):  # back and forth between profiles and graphs
            found = compare(expected[:batch], runner.run(made.images[:batch]))
            assert found.sqnr_db >= floor, (batch, found)
            assert found.top1_agreement == 1.0

    def test_more_than_the_largest_batch(
        self, made: Made, expected: Images, runner: TensorRtRunner
    ) -> None:
        with pytest.raises(UsageError, match="does not serve a batch of 11"):
            runner.run(made.images)
        logits = run_in_batches(runner, made.images, 8)
        assert compare(expected, logits).top1_agreement == 1.0

    def test_results_are_the_callers(self, made: Made, runner: TensorRtRunner) -> None:
        first = runner.run(made.images[:2])
        kept = first.copy()
        runner.run(made.images[2:4])
        np.testing.assert_array_equal(first, kept)

    def test_the_same_twice(self, made: Made, runner: TensorRtRunner) -> None:
        first, second = (runner.run(made.images[:4]) for _ in range(2))
        np.testing.assert_array_equal(first, second)

    def test_images_of_another_shape_or_type(self, made: Made, runner: TensorRtRunner) -> None:
        with pytest.raises(InputError, match="the images are"):
            runner.run(made.images[:1, :, 1:])
        with pytest.raises(InputError, match="the images are float64"):
            runner.run_all(made.images[:1].astype(np.float64))

    def test_memory_is_given_back(self, made: Made) -> None:
        def free() -> int:
            from cuda.bindings import runtime

            return int(runtime.cudaMemGetInfo()[1])

        def once() -> None:
            with TensorRtRunner(made.plan) as opened:
                opened.run(made.images[:8])

        once()  # what CUDA and TensorRT take for good
        before = free()
        for _ in range(5):
            once()
        assert before - free() < 16 << 20

    def test_memory_is_given_back_after_an_error(self, made: Made) -> None:
        def fail() -> None:
            with TensorRtRunner(made.plan) as opened:
                opened.run(made.images[:8])
                raise KeyError

        for _ in range(3):
            with pytest.raises(KeyError):
                fail()
        with TensorRtRunner(made.plan) as opened:
            opened.run(made.images[:8])

    def test_a_runtime_cache(self, made: Made, tmp_path: Path) -> None:
        cache = tmp_path / "kernels.cache"
        if made.backend.has_timing_cache:
            with pytest.raises(UsageError, match="has no run-time cache"):
                TensorRtRunner(made.plan, runtime_cache=cache).__enter__()
            return
        answers = []
        for _ in range(2):
            with TensorRtRunner(made.plan, runtime_cache=cache) as opened:
                answers.append(opened.run(made.images[:4]))
            assert cache.stat().st_size > 0
        np.testing.assert_array_equal(answers[0], answers[1])

    def test_a_damaged_plan_that_is_trusted(self, made: Made, tmp_path: Path) -> None:
        plan = tmp_path / "e.plan"
        plan.write_bytes(made.plan.read_bytes()[:1000])
        runner = TensorRtRunner(plan, trust_engine=True, backend=made.backend.name)
        with pytest.raises((InputError, MissingDependency)):
            runner.__enter__()

    def test_the_inspector_names_pytorch_modules(self, made: Made) -> None:
        found = describe_engine(made.plan)
        assert not found.obstacles
        assert found.layers
        text = " ".join(f"{layer.name} {layer.nodes}" for layer in found.layers)
        assert "block1" in text

    def test_a_stripped_plan_builds(self, made: Made, tmp_path: Path) -> None:
        asked = read_sidecar(made.plan).options
        stripped = engine_from_onnx(
            made.onnx,
            tmp_path / "e.plan",
            backend=made.backend,
            options=asked.changed(strip_weights=True, refit=True),
            precision="fp32",
        )
        assert stripped.plan_bytes < read_sidecar(made.plan).plan_bytes

    def test_a_timing_cache_is_filled_and_used(self, made: Made, tmp_path: Path) -> None:
        if not made.backend.has_timing_cache:
            pytest.skip("TensorRT for RTX has no timing cache")
        cache = tmp_path / "timing.cache"
        seconds = []
        for index in range(2):
            sidecar = engine_from_onnx(
                made.onnx,
                tmp_path / f"{index}.plan",
                backend=made.backend,
                options=read_sidecar(made.plan).options,
                precision="fp32",
                timing_cache=cache,
            )
            seconds.append(sidecar.build_seconds)
        assert cache.stat().st_size > 0
        assert seconds[1] < seconds[0]

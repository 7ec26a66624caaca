"""Steps of the GPU report that run a bundle's files: ONNX Runtime, packages, engines, gates.

    python benchmarks/gpu/runtime_steps.py ort --bundle DIR --artifact fp16 --out FILE

Started by report.py, each in a process of its own. PyTorch is not imported here but for
packages: ONNX Runtime has to find CUDA by itself, as it must in a server.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from result import Result, turn
from steps import SKIPPED

from van_deploy.bench.gpu import GpuWatch, clock_of, timed
from van_deploy.bundle import Bundle
from van_deploy.metrics import sqnr_db, top1_agreement
from van_deploy.runners.base import CudaOptions
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

ROOT = Path(__file__).resolve().parents[2]
COMPARED = 32  # images on which a row is compared with FP32
SEED = 20
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def ort(result: Result, options: argparse.Namespace) -> None:
    """Time one ONNX file on the CUDA provider: NCHW, NHWC, and NCHW as a CUDA graph.

    Without a graph at the smallest and the largest batch only: choosing cuDNN's algorithms
    takes seconds a batch size.
    """
    subject, ends = _Subject(options), sorted({options.batches[0], options.batches[-1]})

    def measured(cuda: CudaOptions, batches: Sequence[int]) -> None:
        words = ["ort-cuda", "nhwc" if cuda.prefer_nhwc else "nchw"]
        words += ["tf32"] * cuda.use_tf32 + ["graph"] * cuda.cuda_graph
        runner = OnnxRuntimeRunner(subject.path, name="ort-cuda", device=options.device, cuda=cuda)
        subject.measure(result, runner, "+".join(words), batches, options=asdict(cuda))

    plain = CudaOptions(use_tf32=options.tf32)
    measured(plain, ends)
    measured(replace(plain, prefer_nhwc=True), ends)  # with a graph its numbers are wrong
    measured(replace(plain, cuda_graph=True), options.batches)


def inductor(result: Result, options: argparse.Namespace) -> None:
    """Build an AOTInductor package for this GPU by the command line, then time it."""
    subject = _Subject(options)
    _built(result, subject.bundle, options, "inductor")
    from van_deploy.runners.pytorch import InductorRunner

    for name, path in _of_kind(subject.bundle, "package"):
        words = "inductor, fused kernels" if options.fused else "inductor"
        runner = InductorRunner(path, device=options.device)
        subject.measure(result, runner, f"{words}, {name}", options.batches)
    _judge(result, subject.bundle, options, "verify")


def engine(result: Result, options: argparse.Namespace) -> None:
    """Build an engine for this GPU by the command line, then time it with and without a graph."""
    module = MODULES[options.backend]
    if importlib.util.find_spec(module) is None:
        _skip(f"the package {module} is not installed")
    subject = _Subject(options)
    _built(result, subject.bundle, options, options.backend)
    from van_deploy.runners.tensorrt import TensorRtRunner

    for name, path in _of_kind(subject.bundle, "engine"):
        for graph in (False, True):
            runner = TensorRtRunner(path, device=options.device, cuda_graph=graph)
            words = f"{options.backend} {name}" + "+graph" * graph
            subject.measure(result, runner, words, options.batches)
    _judge(result, subject.bundle, options, "verify")


def agreement(result: Result, options: argparse.Namespace) -> None:
    """Verify and evaluate a bundle with one runner, by the command line, as its user would."""
    bundle = _copied(options)
    if options.package:
        _built(result, bundle, options, "inductor")
    _judge(result, bundle, options, "verify")
    if options.images:
        _judge(result, bundle, options, "evaluate", "--images", options.images)


def benchmark(result: Result, options: argparse.Namespace) -> None:
    """Run ``van-deploy bench --profile`` on the GPU, as a user would, for two runners."""
    bundle = _copied(options)
    command = ["bench", str(bundle), "--device", options.device, "--batches", "1,128"]
    command += ["--runners", "pytorch,ort-cuda/fp16", "--profile"]
    with turn():
        done = _van_deploy(*command, "--seconds", str(options.seconds), "--json")
    document = _document(done)
    if document is None:
        raise SystemExit(_end(done))
    result.fact("bench", document)
    columns = ("contender", "batch", "queued_ms", "images_per_s", "error")
    rows = [{key: row.get(key) for key in columns} for row in document["rows"]]
    result.table(f"van-deploy bench {bundle.name} --device {options.device}", rows)
    for name, lines in document["profiles"].items():
        result.table(f"van-deploy bench {bundle.name} --profile: {name}, batch 128", lines)
    for warning in document["warnings"]:
        result.note(warning)


def tests(result: Result, options: argparse.Namespace) -> None:
    """Run the tests marked ``gpu`` against the installed wheel, from a copy of tests/ alone."""
    folder = Path.cwd() / options.out.stem
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "tests" / "gpu", folder / "tests" / "gpu")
    shutil.copy(ROOT / "pyproject.toml", folder)
    junit = folder / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-v", "--tb=short"]
    command += ["-k", options.select, "--durations=15", "-p", "no:cacheprovider", "-W", "default"]
    command += [f"--junitxml={junit}", "-o", "addopts=--import-mode=importlib"]
    done = subprocess.run(command, cwd=folder, check=False)
    cases = []
    for case in ET.parse(junit).iter("testcase") if junit.exists() else ():
        found = [child for child in case if child.tag in {"failure", "error", "skipped"}]
        state = found[0].tag if found else "passed"
        why = ((found[0].get("message") or "") if found else "").partition("\n")[0][:200]
        test = f"{case.get('classname')}.{case.get('name')}"
        cases.append({"test": test, "": state, "why": why})
    words = f"pytest -m gpu -k '{options.select}'"
    result.table(words, cases)
    counts = {state: sum(case[""] == state for case in cases) for state in {c[""] for c in cases}}
    result.note(f"{words}: {counts or 'no test was collected'}.")
    if done.returncode not in (0, 5):
        raise SystemExit(done.returncode)


class _Subject:
    """A bundle's artifact, its images and the device."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.bundle = options, _copied(options)
        opened = Bundle.open(self.bundle)
        self.path = opened.verified(options.artifact)
        self.size = int(opened.manifest.preprocessing.image_size)
        shape = (max(options.batches), 3, self.size, self.size)
        self.images = np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)
        with OnnxRuntimeRunner(opened.verified("fp32")) as runner:  # on the processor
            self.expected = runner.run(self.images[:COMPARED])

    def measure(
        self, result: Result, runner: Any, name: str, batches: Sequence[int], **facts: Any
    ) -> None:
        """Add a row a batch size."""
        what = f"{name}, {self.options.artifact}"
        with _noted(result, what), runner as opened:
            for batch in batches:
                with _noted(result, f"{what}, batch {batch}"):
                    self._row(result, opened, name, batch, **facts)

    def _row(self, result: Result, opened: Any, name: str, batch: int, **facts: Any) -> None:
        options = self.options
        resident = opened.resident(self.images[:batch])
        clock = clock_of(resident, options.device)
        start = time.perf_counter()
        resident.upload()
        resident.launch()  # chooses algorithms, compiles: for seconds, so outside the turn
        clock.wait(clock.mark())
        first_ms = 1e3 * (time.perf_counter() - start)
        watch = GpuWatch(options.device)
        with turn():
            timing = timed(resident, batch, clock, watch, seconds=options.seconds)
        logits = resident.outputs()[:COMPARED]
        resident.close()
        expected = self.expected[: len(logits)]
        result.row(
            network=Path(options.bundle).name,
            image_size=self.size,
            runner=name,
            group="van-deploy",
            precision=options.artifact,
            sqnr_db=sqnr_db(expected, logits),
            top1_agreement=top1_agreement(expected, logits),
            batch=batch,
            latency_ms=timing.pop("latency"),
            **{**timing, "first_call_ms": first_ms, **facts},
        )


@contextmanager
def _noted(result: Result, what: str) -> Iterator[None]:
    """Note a failure inside, and go on."""
    try:
        yield
    except Exception as error:
        result.note(f"{what}: {type(error).__name__}: {error}"[:600])


def _judge(
    result: Result, bundle: Path, options: argparse.Namespace, verb: str, *images: str
) -> None:
    """Add what one judging command says, with its gates and its exit code."""
    where = ["--device", options.device] if options.device.startswith("cuda") else []
    done = _van_deploy(verb, str(bundle), *images, "--runner", options.runner, *where, "--json")
    title = f"{bundle.name}: van-deploy {verb} --runner {options.runner}"
    result.note(f"{title}: exit code {done.returncode}." + f" {_end(done)}" * bool(done.returncode))
    if (document := _document(done)) is not None:
        result.fact(verb, document)
        result.table(title, list(_judged(document)))


def _judged(document: Any) -> Iterator[dict[str, Any]]:
    """Yield one flat line a rule of every artifact, and one an accuracy."""
    entries = document.get("artefacts") or document.get("artifacts") or {}
    for entry in entries.values() if isinstance(entries, dict) else entries:
        findings = entry["findings"] if isinstance(entry, dict) else ()
        for finding in {finding["rule"]: finding for finding in findings}.values():
            line = {"artifact": entry["artefact"], "runner": entry["runner"]}
            line |= {key: finding[key] for key in ("rule", "outcome", "value", "unit")}
            yield {**line, "limit": (finding.get("limit") or {}).get("value")}
    for name, accuracy in (document.get("accuracy") or {}).items():
        yield {"artifact": name, "rule": "top-1", "value": accuracy["top1"]}


def _copied(options: argparse.Namespace) -> Path:
    """Return a copy of the bundle of this step's own: steps write into bundles side by side."""
    source = Path(options.bundle)
    if not (source / "manifest.json").exists():
        _skip(f"there is no bundle '{source}': make it with benchmarks/gpu/bundles.py")
    target = Path.cwd() / "bundles" / Path(options.out).stem / source.name
    if not target.exists():
        shutil.copytree(source, target)
    return target


def _built(result: Result, bundle: Path, options: argparse.Namespace, backend: str) -> None:
    arguments = ["--backend", backend, "--precision", options.artifact, "--device", options.device]
    if backend == "inductor" and not options.package:
        only = f"{options.batches[0]}:{options.batches[-1]}:{options.batches[-1]}"
        arguments += ["--batch", only, *["--fused-kernels"] * options.fused]
    start = time.perf_counter()
    done = _van_deploy("build", str(bundle), *arguments)
    took, what = time.perf_counter() - start, f"`van-deploy build {' '.join(arguments)}`"
    result.note(f"{what}: exit code {done.returncode} after {took:.0f} s.")
    if done.returncode:
        raise SystemExit(_end(done))


def _of_kind(bundle: Path, kind: str) -> list[tuple[str, Path]]:
    opened = Bundle.open(bundle)
    found = [artefact.name for artefact in opened.artefacts.values() if artefact.kind == kind]
    return [(name, opened.verified(name)) for name in found]


def _van_deploy(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "van_deploy", *arguments]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    print(f"$ van-deploy {' '.join(arguments)}\n{done.stderr[-4000:]}", flush=True)
    return done


def _document(done: subprocess.CompletedProcess[str]) -> Any:
    """Return what a command printed, or None if that is no JSON."""
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        return None


def _end(done: subprocess.CompletedProcess[str]) -> str:
    text = (done.stderr.strip() or done.stdout.strip())[-600:]
    return " ".join(text.split())


def _skip(reason: str) -> None:
    print(reason, flush=True)
    raise SystemExit(SKIPPED)


STEPS = {
    "ort": ort,
    "inductor": inductor,
    "engine": engine,
    "agreement": agreement,
    "bench": benchmark,
    "tests": tests,
}


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--bundle", type=Path, default=Path("bundles/van_b0"))
    parser.add_argument("--artifact", default="fp32")
    parser.add_argument("--batches", default="1,8,32,128", type=_numbers)
    parser.add_argument("--runner", default="ort-cuda")
    parser.add_argument("--backend", default="tensorrt", choices=MODULES)
    parser.add_argument("--images", help="labelled images, for evaluate")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--package", action="store_true", help="build and judge one, too")
    parser.add_argument("--fused", action="store_true", help="a package with our own kernels")
    parser.add_argument("--select", default="", help="tests, as pytest's -k")
    parser.add_argument("--seconds", default=0.4, type=float, help="measured, a row")
    options = parser.parse_args()
    STEPS[options.step](Result(options.out), options)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()

"""Run a user's commands on a GPU, and write a page with their output.

    python benchmarks/gpu/report.py --part a --output DIR   # PyTorch's modes and our kernels
    python benchmarks/gpu/report.py --part b --output DIR   # every runtime, and the gates
    python benchmarks/gpu/report.py --part b --output DIR --only doctor,verify-digits
    python benchmarks/gpu/report.py --part c --output DIR   # the GPU tests

van-deploy must be installed; this script imports nothing else from the checkout. Each step is a
command in its own process with a time limit, and the next step runs even after a failure.
``results.json`` and ``results.md`` are written after every step, so an interrupted run keeps its
results. A step that does not fit into the remaining budget is skipped. Without a GPU the commands
run on van_digits on the CPU, and steps that need a GPU are skipped with the reason.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from PIL import Image

from van_deploy.data.samples import dead_leaves_image
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.files import write_atomic
from van_deploy.model.embedded import write_digits_folder
from van_deploy.report.render_markdown import markdown_table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCHEMA = "van-deploy/gpu-report/2"
# Seconds on a GPU; --budget changes them. On an H200 the tests took 426 s.
BUDGETS = {"a": 180.0, "b": 300.0, "c": 480.0}
CPU_BUDGET = 1800.0
CALIBRATION_IMAGES = 64
MIN_STEP_S = 10.0  # a step needs at least this much of the budget
OUTPUT_LIMIT = 20_000  # characters of a step on the page; results.json has all
NO_GPU = "it needs an NVIDIA GPU"
# By exit code of van-deploy; 3 is a missing dependency, such as TensorRT.
STATES = {0: "done", 1: "a gate did not pass", 3: "skipped"}

ENVIRONMENT = {
    "COLUMNS": "180",
    "OMP_NUM_THREADS": "4",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore",
    # Inductor's convolution templates take minutes and were never faster: on an H200 cuDNN was
    # 2.6 times faster for the stem, 80 and 400 times for two depth-wise ones.
    "TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS": "ATEN",
    "TORCHINDUCTOR_AUTOTUNE_NUM_CHOICES_DISPLAYED": "3",
}
INTRODUCTION = """# Results on a GPU

Written by `{command}` on {date}, on {device}. Each block is the output of the command;
docs/measuring.md explains how `bench` measures. On a GPU van_b0 and van_b2 have random weights with
natural statistics; on a CPU the network is van_digits.
"""


@dataclass
class Step:
    """One command and its result.

    Attributes:
        name: name for ``--only``.
        words: the command; ``van-deploy`` is that of this Python.
        limit_s: time limit in seconds.
        skip: why it does not run on this machine; "" if it does.
        state: ``done``, ``a gate did not pass``, ``skipped``, ``failed`` or ``stopped``.
        reason: of the state, or the last line of a program other than van-deploy.
        seconds: duration.
        output: stdout and stderr.
    """

    name: str
    words: Sequence[str]
    limit_s: float = 120.0
    skip: str = ""
    state: str = ""
    reason: str = ""
    seconds: float = 0.0
    output: str = ""

    def run(self, folder: Path, seconds: float) -> None:
        """Run the command in ``folder``, or skip it; ``seconds`` of the budget are left."""
        if self.skip or seconds < MIN_STEP_S:
            self.state = "skipped"
            self.reason = self.skip or f"{max(seconds, 0):.0f} s of the budget were left"
            return
        program, *words = self.words
        arguments = [program] if program.endswith(".py") else ["-m", program.replace("-", "_")]
        environment = {**os.environ, **ENVIRONMENT, "TRITON_INTERPRET": str(int("tiny" in words))}
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *arguments, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        limit = min(self.limit_s, seconds)
        try:
            self.output, _ = process.communicate(timeout=limit)
            states = STATES if program == "van-deploy" else {0: "done"}
            self.state = states.get(process.returncode, "failed")
            last_line = self.output.strip().rpartition("\n")[2].strip() or "no output"
            self.reason = "" if states is STATES and self.state == "done" else last_line[:300]
        except BaseException as error:  # the time limit, or a signal to this process
            os.killpg(process.pid, signal.SIGKILL)  # and its child processes
            self.output, _ = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            self.state, self.reason = "stopped", f"it took more than {limit:.0f} s"
        self.seconds = round(time.monotonic() - start, 1)


def steps_of(part: str, device: str) -> Iterator[Step]:
    """Yield the steps of a part, the most important first."""
    on_gpu = device != "cpu"
    skip, on = ("", f"--device {device}") if on_gpu else (NO_GPU, "")
    quick = "--batches 2 --seconds 0.1 --limit 0.5 --rounds 6 --calls 2 --warmup 0"
    batches = "1,128 --seconds 0.6" if part == "a" else "1,8,32,128 --seconds 0.4"
    batches += " --calls 20"
    bench = f"--device {device} --profile {f'--batches {batches}' if on_gpu else quick}"

    def run(name: str, words: str, limit_s: float = 120.0, skip: str = "") -> Step:
        return Step(name, ["van-deploy", *words.split()], limit_s, skip)

    def export(variant: str) -> Step:
        model = f"{variant} --weights random --batch 1:32:128" if on_gpu else "van_digits"
        return run(f"export-{variant}", f"export {model} --output {variant}")

    yield run("doctor", "doctor")
    if part == "a":
        for variant in ("van_b0", "van_b2"):
            size = f"--variant {variant}" if on_gpu else "--variant tiny --size 32"
            words = f"all {size} --batch {'128,1' if on_gpu else '1'} --out kernels-{variant}.json"
            # With the stored tiles: to compile all candidates takes longer than the whole budget.
            words += " --tries 1"
            yield Step(f"kernels-{variant}", [str(HERE / "kernels.py"), *words.split()], 150)
            yield export(variant)
            # torch.compile takes minutes, and a step that is stopped leaves no results.
            for mode in ("pytorch,pytorch-ch*", "pytorch-compile-fp16", "pytorch-compile-bf16"):
                words = f"bench {variant} --runners {mode if on_gpu else 'pytorch'} {bench}"
                yield run(f"{mode.partition(',')[0]}-{variant}", words, 280)
        return
    if part == "c":
        # Without the checkout's pyproject.toml, which puts the checkout before the installed wheel.
        # -v: what has passed before the time limit is in the output.
        tests = "-m gpu tests/gpu -v -rs -p no:cacheprovider -c /dev/null --rootdir . "
        tests += "--import-mode=importlib"
        yield Step("tests", ["pytest", *tests.split()], BUDGETS[part], skip)
        return
    # The last ones are packages and engines, of which a bundle may have none of a kind.
    ort, engines = ("ort-cuda", "pytorch,[it]*") if on_gpu else ("ort-cpu", "pytorch")
    yield export("van_b0")
    yield run("export-digits", "export van_digits --output van_digits")
    for bundle, images in (("van_b0", "--images leaves" if on_gpu else ""), ("van_digits", "")):
        yield run(f"fp16-{bundle}", f"quantize {bundle} --precision fp16")
        yield run(f"int8-{bundle}", f"quantize {bundle} --precision int8 {images}")
    yield run("verify-digits", f"verify van_digits --runner {ort} {on}")
    yield run(
        "evaluate-digits",
        f"evaluate van_digits --images digits --allow-inconclusive --runner {ort} {on}",
    )
    yield run("bench-onnx", f"bench van_b0 --runners pytorch,{ort}* {bench}", 280)
    yield run("bench-fp32", f"bench van_b0 --runners {ort}*/fp32 --no-tf32 {bench}", 120)
    for name, words in {
        "inductor-fp16": "inductor --precision fp16",
        "inductor-fused": "inductor --precision fp16 --fused-kernels --batch 128:128:128",
        "tensorrt": "tensorrt --precision fp16,int8",
        "tensorrt-rtx": "tensorrt-rtx --precision fp16,int8",
    }.items():
        yield run(f"build-{name}", f"build van_b0 --backend {words} {on}", 280, skip)
    yield run("verify-engines", f"verify van_b0 --runner {ort} {on}", 280)
    yield run("bench-engines", f"bench van_b0 --runners {engines} {bench}", 280)


def write_images(folder: Path) -> None:
    """Write the images of part b: synthetic ones to calibrate van_b0 on, and labelled digits."""
    (folder / "leaves").mkdir(exist_ok=True)
    for seed in range(CALIBRATION_IMAGES):  # not those of the golden samples
        image = dead_leaves_image(1000 + seed, 256, 3)
        Image.fromarray(image).save(folder / "leaves" / f"{seed}.png")
    write_digits_folder(folder / "digits", "heldout")


def page(document: dict[str, Any]) -> str:
    """Return a run as Markdown: a table of the steps, then the output of each."""
    steps, lines = document["steps"], [INTRODUCTION.format(**document)]
    rows = [(s["name"], s["state"], f"{s['seconds']:.0f}", s["reason"]) for s in steps]
    lines.append(markdown_table(("step", "state", "s", "reason"), rows, {2}))
    for step in steps:
        if step["output"]:
            command = " ".join(step["words"]).replace(f"{HERE}/", "benchmarks/gpu/")
            lines += ["", f"## {step['name']}", "", f"`{command}`", ""]
            lines += ["```text", step["output"][-OUTPUT_LIMIT:].rstrip(), "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run one part; return 1 if a step failed or was stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=BUDGETS, default="a")
    parser.add_argument("--output", type=Path, default=Path("gpu-report"))
    parser.add_argument("--only", default="", help="steps, comma-separated")
    parser.add_argument("--list", action="store_true", help="print the steps and exit")
    parser.add_argument("--budget", type=float, help="seconds for the whole run")
    parser.add_argument("--device", help="cuda:N or cpu (default: cuda:0 if there is one)")
    options = parser.parse_args()
    driver, folder = nvidia_driver(), options.output.resolve()
    gpus = driver.gpus if driver else ()
    device = options.device or ("cuda:0" if gpus else "cpu")
    steps, wanted = list(steps_of(options.part, device)), set(filter(None, options.only.split(",")))
    if unknown := wanted - {step.name for step in steps}:
        raise SystemExit(f"no step '{min(unknown)}'; --list prints them")
    steps = [step for step in steps if step.name in wanted or not wanted]
    if options.list:
        print("\n".join(f"{step.name:<44}{step.skip or ' '.join(step.words)}" for step in steps))
        return 0
    shutil.copytree(ROOT / "tests" / "gpu", folder / "tests" / "gpu", dirs_exist_ok=True)
    if options.part == "b":
        write_images(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    budget = CPU_BUDGET if device == "cpu" else BUDGETS[options.part]
    end = time.monotonic() + (options.budget or budget)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "command": f"python benchmarks/gpu/report.py {' '.join(sys.argv[1:])}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device if device == "cpu" else f"{device} of {', '.join(g.name for g in gpus)}",
        "steps": [],
    }
    for step in steps:
        print(f"{step.name} ...", flush=True)
        step.run(folder, end - time.monotonic())
        print(f"{step.name}: {step.state} after {step.seconds} s {step.reason}", flush=True)
        document["steps"].append(asdict(step))
        write_atomic(folder / "results.json", json.dumps(document, indent=1))
        write_atomic(folder / "results.md", page(document))
    return int(any(step.state in ("failed", "stopped") for step in steps))


if __name__ == "__main__":
    raise SystemExit(main())

"""This project's artefacts against PyTorch and against what others would deploy.

One race a variant: every contender in a process of its own, one awake at a time,
the same images, rounds in turn (see van_deploy/bench/race.py).

    python benchmarks/runtimes.py                       # van_b0 and van_b1 at 224, batch 1 and 8
    python benchmarks/runtimes.py --variants van_b0 --seconds 1 --repeat
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from van_deploy.bench.budget import Budget
from van_deploy.bench.contender import Contender, Skipped
from van_deploy.bench.contenders import BF16_FEATURES, contenders_of
from van_deploy.bench.lane import Row
from van_deploy.bench.report import BenchReport, race_report
from van_deploy.bench.settings import Settings
from van_deploy.bundle import Bundle, file_sha256
from van_deploy.environment.hardware import cpu

SIZE = 224
CALIBRATION_IMAGES = 16
PEERS = {
    "peer:export-today": ("export-today.onnx", "onnxruntime", "fp32"),
    "peer:export-today+sim": ("export-today-sim.onnx", "onnxruntime", "fp32"),
    "peer:torchscript-17": ("torchscript-17.onnx", "onnxruntime", "fp32"),
    "peer:torchscript-17+sim": ("torchscript-17-sim.onnx", "onnxruntime", "fp32"),
    "peer:ort-int8": ("ort-int8.onnx", "onnxruntime", "int8"),
    "peer:openvino-direct": ("openvino-direct.xml", "openvino", "fp32"),
    "peer:openvino-direct-bf16": ("openvino-direct.xml", "openvino", "bf16"),
    "peer:openvino-of-export-today": ("export-today-sim.onnx", "openvino", "fp32"),
}
TORCH_BEST = ("pytorch-channels-last", "pytorch-compile", "pytorch-autocast")
SAME_RUN_TIME = {  # our file against every peer's file of that precision in that run time
    "ort-cpu/fp32": [name for name, p in PEERS.items() if p[1:] == ("onnxruntime", "fp32")],
    "openvino/fp32": [name for name, p in PEERS.items() if p[1:] == ("openvino", "fp32")],
    "openvino-bf16/fp32": ["peer:openvino-direct-bf16"],
    "ort-cpu/int8-cpu": ["peer:ort-int8"],
}
NOISE = 0.98  # two runs of the same file differ by as much: below it, slower is slower
AGREE_WITHIN_PERCENT = 5.0
OVERHEAD_PERCENT = 15.0


def main() -> int:
    """Print the rows; return 1 if a claim is not met."""
    arguments = _arguments()
    budget = Budget(arguments.seconds, 100, max(arguments.limit, arguments.seconds))
    rows: list[list[str]] = []
    claims: list[dict[str, object]] = []
    notes: list[str] = []
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
            contenders, skipped, images = _prepared(variant, Path(folder), arguments)
            settings = Settings(batches=tuple(arguments.batches), budget=budget, roofline=False)
            reports = [_race(variant, contenders, skipped, images, settings)]
            if arguments.repeat:
                reports.append(_race(variant, contenders, skipped, images, settings))
        rows += [_cells(variant, row) for row in _ordered(reports[0].rows)]
        claims += _claims(variant, reports[0])
        if arguments.repeat:
            claims.append(_repeatable(variant, *reports))
        notes += [f"{variant}: {skip.name} skipped, {skip.reason}" for skip in skipped]
        notes += [f"{variant}: {text}" for text in reports[0].facts["warnings"]]
    result = {
        "columns": [
            "variant",
            "runner",
            "batch",
            "p50 ms",
            "p99 ms",
            "images/s",
            "times eager (rounds)",
            "peak RAM MB",
        ],
        "rows": rows,
        "claims": claims,
        "notes": [
            *notes,
            "OpenVINO computes in bfloat16 by default on this kind of processor; "
            "`openvino/` rows are forced to float32, `openvino-bf16/` rows are not. "
            "Random weights: accuracy plays no part in this table.",
        ],
    }
    print(json.dumps(result, indent=1) if arguments.json else _text(result))
    return int(not all(claim["met"] for claim in claims))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="*", default=["van_b0", "van_b1"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=3.0, help="timed, a row, at least")
    parser.add_argument("--limit", type=float, default=6.0, help="timed, a row, at most")
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--repeat", action="store_true", help="race twice and compare")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _prepared(
    variant: str, folder: Path, arguments: argparse.Namespace
) -> tuple[list[Contender], list[Skipped], Any]:
    """Return our bundle's contenders and the peers', and the images, everything in ``folder``."""
    import numpy as np

    images = _images(max(arguments.batches))
    np.save(folder / "images.npy", images)
    bundle = _bundle(variant, folder)
    entries = [
        e for e in contenders_of(bundle) if not e.name.startswith(("ort-cuda/", "ort-tensorrt/"))
    ]
    peers = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("peers.py")),
            variant,
            str(folder),
            str(folder / "images.npy"),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    outcomes = dict(line.split(": ", 1) for line in peers.stdout.splitlines() if ": " in line)
    entries += _peers(folder, outcomes)
    entries = [entry for entry in entries if entry.name not in arguments.without]
    contenders = [entry for entry in entries if isinstance(entry, Contender)]
    return contenders, [entry for entry in entries if isinstance(entry, Skipped)], images


def _images(count: int) -> Any:
    from van_deploy.checks.sample_images import images_to_check
    from van_deploy.model.preprocess import OFFICIAL

    return images_to_check("", OFFICIAL, max(count, CALIBRATION_IMAGES))[0]


def _bundle(variant: str, folder: Path) -> Bundle:
    """Return a bundle with the FP32 graph and INT8 for CPUs, made by the commands themselves."""
    from van_deploy.images import sample_pictures

    pictures = folder / "pictures"
    pictures.mkdir()
    for index, picture in enumerate(sample_pictures().images):
        width, height = picture.size
        for part in range(-(-CALIBRATION_IMAGES // 7)):  # crops of the sample photographs
            inset = part * min(width, height) // 8
            box = (inset, inset, width - inset, height - inset)
            picture.convert("RGB").crop(box).save(pictures / f"{index}-{part}.png")
    target = folder / "bundle"
    words = ["export", variant, "--weights", "random", "--output", str(target)]
    _command(words, check=True)
    # How fast INT8 is does not depend on its scales: the quickest way to have some will do.
    quick = ["--method", "minmax", "--no-equalize", "--no-refine"]
    words = ["quantize", str(target), "--precision", "int8", "--target", "cpu"]
    _command([*words, "--images", str(pictures), *quick], check=False)  # its gate is not ours
    return Bundle.open(target)


def _command(words: Sequence[str], *, check: bool) -> None:
    command = [sys.executable, "-m", "van_deploy", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"van-deploy {' '.join(words)}:\n{done.stderr[-2000:]}")
    if done.returncode > 1:
        print(f"van-deploy {' '.join(words)}:\n{done.stderr[-2000:]}", file=sys.stderr)


def _peers(folder: Path, outcomes: dict[str, str]) -> Iterable[Contender | Skipped]:
    bf16 = bool(BF16_FEATURES & set(cpu().features))
    for name, (file, runtime, precision) in PEERS.items():
        if outcomes.get(file) != "made":
            yield Skipped(name, outcomes.get(file, "was not made"))
        elif precision == "bf16" and not bf16:
            yield Skipped(name, "this processor has no bfloat16 instructions")
        else:
            path = folder / file
            yield Contender(name, runtime, precision, str(path), sha256=file_sha256(path))


def _race(
    variant: str,
    contenders: Sequence[Contender],
    skipped: Sequence[Skipped],
    images: Any,
    settings: Settings,
) -> BenchReport:
    def progress(text: str) -> None:
        print(f"{variant}: {text}", file=sys.stderr, flush=True)

    return race_report(
        contenders,
        skipped,
        {SIZE: images},
        settings,
        native_size=SIZE,
        images="sample photographs",
        about={"model": variant},
        progress=progress,
    )


def _ordered(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.batch, -(row.images_per_s or 0.0)))


def _cells(variant: str, row: Row) -> list[str]:
    if row.latency is None:
        return [variant, row.contender, str(row.batch), row.error, "", "", "", ""]
    ratio = row.ratio
    times = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""
    return [
        variant,
        row.contender,
        str(row.batch),
        f"{row.latency.p50_ms:.2f}",
        f"{row.latency.p99_ms:.2f}",
        f"{row.images_per_s:.1f}",
        times,
        f"{(row.peak_rss_bytes or 0) / 1e6:.0f}",
    ]


def _claims(variant: str, report: BenchReport) -> Iterable[dict[str, object]]:
    for batch in sorted({row.batch for row in report.rows}):
        rows = {r.contender: r for r in report.rows if r.batch == batch and r.latency}
        where = f"{variant}, batch {batch}"
        ours = {n: r for n, r in rows.items() if "/" in n}
        best = max(ours, key=lambda n: ours[n].images_per_s or 0.0)
        own = [name for name in TORCH_BEST if name in rows]
        torch_best = max(own, key=lambda n: rows[n].images_per_s or 0.0, default=None)
        if "pytorch" in rows:
            yield _at_least(f"{where}: {best} >= 5 x PyTorch eager", rows, best, "pytorch", 5.0)
            name = "ort-cpu/fp32"
            yield _at_least(f"{where}: {name} >= 2.5 x PyTorch eager", rows, name, "pytorch", 2.5)
        if torch_best:
            text = f"{where}: {best} >= 2 x the best of PyTorch's own ({torch_best})"
            yield _at_least(text, rows, best, torch_best, 2.0)
        peer = "peer:torchscript-17+sim"
        if peer in rows:
            text = f"{where}: ort-cpu/fp32 >= 1.3 x opset-17 export + onnxsim"
            yield _at_least(text, rows, "ort-cpu/fp32", peer, 1.3)
        for name, peers in SAME_RUN_TIME.items():
            for peer in peers:
                if name in rows and peer in rows:
                    text = f"{where}: {name} not slower than {peer}"
                    yield _at_least(text, rows, name, peer, NOISE)
    overhead = report.facts["seconds"]["overhead_percent"]
    yield {
        "claim": f"{variant}: benchmark overhead at most {OVERHEAD_PERCENT:g} %",
        "measured": f"{overhead:.1f} %",
        "met": overhead <= OVERHEAD_PERCENT,
    }


def _at_least(
    claim: str, rows: dict[str, Row], name: str, other: str, limit: float
) -> dict[str, object]:
    """Return a claim on the ratio of two rows, paired by round."""
    pairs = zip(rows[other].round_ms, rows[name].round_ms, strict=False)
    ratios = sorted(slow / fast for slow, fast in pairs)
    ratio = statistics.median(ratios)
    return {
        "claim": claim,
        "measured": f"{ratio:.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        "met": ratio >= limit,
    }


def _repeatable(variant: str, first: BenchReport, second: BenchReport) -> dict[str, object]:
    before = {(r.contender, r.batch): r.ratio for r in first.rows}
    changes = {}
    for row in second.rows:
        old = before.get((row.contender, row.batch))
        if row.ratio and old:
            name = f"{row.contender} at batch {row.batch}"
            changes[name] = 100 * abs(row.ratio.median / old.median - 1)
    worst = max(changes, key=lambda name: changes[name])
    within = sum(change <= AGREE_WITHIN_PERCENT for change in changes.values())
    return {
        "claim": f"{variant}: two consecutive runs agree on every ratio within 5 %",
        "measured": f"{within} of {len(changes)} ratios; the worst, {worst}, by "
        f"{changes[worst]:.1f} %",
        "met": within == len(changes),
    }


def _text(result: dict[str, Any]) -> str:
    lines = [result["columns"], *result["rows"]]
    lines += [
        ["met" if c["met"] else "MISSED", c["claim"], c["measured"]] for c in result["claims"]
    ]
    return "\n".join(
        "  ".join(f"{cell:<12}" for cell in line)
        for line in [*lines, *[[n] for n in result["notes"]]]
    )


if __name__ == "__main__":
    raise SystemExit(main())

"""This project's files against the files others would deploy, in the same run times.

One race a run time and precision, with our file as the reference: only files that are
nearly as fast are in it, so the rounds are short and many.

    python benchmarks/rivals.py                         # van_b0 and van_b1 at 224, batch 1 and 8
    python benchmarks/rivals.py --variants van_b1 --limit 20
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from lineup import PEERS, prepared
from races import NOTES, arguments_of, cells, claim, columns, printed, raced

from van_deploy.bench.document import BenchReport

SAME_RUN_TIME = {  # our file, and which run time and precision its rivals have
    "ort-cpu/fp32": ("onnxruntime", "fp32"),
    "ort-cpu/int8-cpu": ("onnxruntime", "int8"),
    "openvino/fp32": ("openvino", "fp32"),
    "openvino-bf16/fp32": ("openvino", "bf16"),
}
NOISE = 0.98
"""Two races of files that are the same may differ by as much: below it, slower is slower."""
OLD_EXPORT, TIMES_OLD_EXPORT = "peer:torchscript-17+sim", 1.3


def main() -> int:
    """Print the rows; return 1 if a claim is not met."""
    arguments = arguments_of(__doc__).parse_args()
    rows: list[list[str]] = []
    claims: list[dict[str, object]] = []
    notes: list[str] = []
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
            contenders, skipped, images = prepared(variant, Path(folder), arguments.batches)
            known = {entry.name: entry for entry in contenders}
            for ours, same in SAME_RUN_TIME.items():
                rivals = [name for name in PEERS if name in known and PEERS[name][1:] == same]
                rivals = [name for name in rivals if name not in arguments.without]
                if ours not in known or not rivals:
                    continue
                race = [known[name] for name in (ours, *rivals)]
                report = raced(variant, race, [], images, arguments, ours)
                by_batch = sorted(report.rows, key=lambda row: row.batch)
                rows += [cells(variant, row) for row in by_batch]
                claims += _claims(variant, ours, report)
                notes += [f"{variant}, {ours}: {text}" for text in report.warnings]
            notes += [
                f"{variant}: {s.name} skipped, {s.reason}" for s in skipped if s.name in PEERS
            ]
    result = {
        "columns": columns("ours"),
        "rows": rows,
        "claims": claims,
        "notes": [*notes, *NOTES],
    }
    return printed(result, arguments.json)


def _claims(variant: str, ours: str, report: BenchReport) -> Iterable[dict[str, object]]:
    for row in report.rows:
        if row.contender == ours or row.ratio is None:
            continue
        theirs = row.ratio  # times faster than ours: the other way round is ours over theirs
        measured = f"{1 / theirs.median:.2f} x ({1 / theirs.high:.2f} to {1 / theirs.low:.2f})"
        where = f"{variant}, batch {row.batch}: {ours}"
        text = f"{where} not slower than {row.contender}"
        yield claim(text, measured, met=1 / theirs.median >= NOISE)
        if row.contender == OLD_EXPORT:
            text = f"{where} >= {TIMES_OLD_EXPORT} x opset-17 export + onnxsim"
            yield claim(text, measured, met=1 / theirs.median >= TIMES_OLD_EXPORT)


if __name__ == "__main__":
    raise SystemExit(main())

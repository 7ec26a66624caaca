"""How long `van-deploy --help` and `van-deploy list` take, each in fresh processes.

python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

CASES = {"--help": 0.25, "list": 0.50}  # seconds asked
REPEATS = 9


def main() -> int:
    """Print one row a command; return 1 if one is slower than asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [_row(word, limit, arguments.repeats) for word, limit in CASES.items()]
    result: dict[str, Any] = {
        "columns": ["command", "median s", "fastest s", "asked s"],
        "rows": [row[:4] for row in rows],
        "claims": [
            {
                "claim": f"`van-deploy {word}` within {limit} s",
                "measured": f"{float(row[1]):.2f} s",
                "met": float(row[1]) <= limit,
            }
            for row, (word, limit) in zip(rows, CASES.items(), strict=True)
        ],
        "notes": [f"Median of {arguments.repeats} fresh processes, files cached."],
    }
    print(json.dumps(result, indent=1) if arguments.json else _text(result))
    return int(not all(claim["met"] for claim in result["claims"]))


def _row(word: str, limit: float, repeats: int) -> list[str]:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "van_deploy", word], check=True, stdout=subprocess.DEVNULL
        )
        times.append(time.perf_counter() - start)
    times = times[1:]  # the first one fills the file cache
    return [
        f"van-deploy {word}",
        f"{statistics.median(times):.3f}",
        f"{min(times):.3f}",
        f"{limit:.2f}",
    ]


def _text(result: dict[str, Any]) -> str:
    lines = [result["columns"], *result["rows"]]
    return "\n".join("  ".join(f"{cell:<24}" for cell in line) for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())

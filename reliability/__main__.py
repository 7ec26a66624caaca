"""Runs fuzzing, faults and load, and writes their tables into docs/reliability.md.

python -m reliability                               # everything, about two hours
python -m reliability --only fuzz,requests
python -m reliability --only fuzz --kind image --count 500 --seed 7
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from reliability import faults, fuzz, load, requests
from reliability.kinds import KINDS
from van_deploy.environment.hardware import cpu, memory
from van_deploy.files import write_atomic
from van_deploy.provenance import EXPORT_TOOLS, tool_versions
from van_deploy.report.render_markdown import markdown_table

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
PARTS = {"fuzz": fuzz.table, "requests": requests.table, "faults": faults.table, "load": load.table}


def main() -> int:
    """Run the parts asked for; return 1 if one found a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--count", type=int, help="of cases, images and requests")
    parser.add_argument("--seed", type=int, default=0, help="of fuzz and requests")
    parser.add_argument("--kind", nargs="*", default=[], choices=list(KINDS), help="of fuzz")
    asked = parser.parse_args()
    found, whole = [], not (asked.count or asked.seed or asked.kind)
    for name in asked.only.split(","):
        if name not in PARTS:
            parser.error(f"there is no part '{name}'; known: {', '.join(PARTS)}")
        more = {"seed": asked.seed} if name in {"fuzz", "requests"} else {}
        more |= {"only": asked.kind} if name == "fuzz" else {}
        start = time.monotonic()
        columns, rows, wrong = PARTS[name](asked.count, **more)
        table = "\n".join(
            [markdown_table(columns, rows), *(f"- fault: {fault}" for fault in wrong)]
        )
        print(f"{name}\n\n{table}", file=sys.stderr, flush=True)
        if whole:
            write_atomic(PAGE, _with_section(name, time.monotonic() - start, table))
        found += wrong
    return int(bool(found))


def _with_section(name: str, seconds: float, table: str) -> str:
    """Return the page with what was found between the marks of a part."""
    page, total = PAGE.read_text(encoding="utf-8"), memory().total_bytes
    versions = ", ".join(f"{n} {version}" for n, version in tool_versions(*EXPORT_TOOLS).items())
    gib = f", {total / 2**30:.0f} GiB" if total else ""
    facts = (
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {seconds:.0f} s",
        f"{cpu().name}, {cpu().cores_allowed} cores{gib}",
        versions,
        f"`python -m reliability --only {name}`",
    )
    block = "\n".join([*(f"- {fact}" for fact in facts), "", table])
    pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    return pattern.sub(lambda mark: f"{mark[1]}{block}\n{mark[2]}", page)


if __name__ == "__main__":
    raise SystemExit(main())

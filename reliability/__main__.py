"""Run fuzzing, fault injection and load tests, and write their tables into docs/reliability.md.

python -m reliability                               # everything, about two hours
python -m reliability --only fuzz requests
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
    """Run the requested parts; return 1 if one has a failure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--count", type=int, default=0, help="of cases, images and requests")
    parser.add_argument("--seed", type=int, default=0, help="of fuzz and requests")
    parser.add_argument("--kind", nargs="*", default=list(KINDS), choices=list(KINDS))
    args, failed = parser.parse_args(), False
    write_page = (args.count, args.seed, args.kind) == (0, 0, list(KINDS))
    for name in args.only:
        start = time.monotonic()
        columns, rows, failures = PARTS[name](args)
        lines = [markdown_table(columns, rows), *(f"- failure: {failure}" for failure in failures)]
        print(f"{name}\n", *lines, sep="\n", file=sys.stderr, flush=True)
        if write_page:
            _write_section(name, time.monotonic() - start, "\n".join(lines))
        failed = failed or bool(failures)
    return int(failed)


def _write_section(name: str, seconds: float, table: str) -> None:
    """Replace the section of one part in the page."""
    versions = ", ".join(f"{n} {version}" for n, version in tool_versions(*EXPORT_TOOLS).items())
    total = memory().total_bytes
    gib = f", {total / 2**30:.0f} GiB" if total else ""
    block = f"""- {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {seconds:.0f} s
- {cpu().name}, {cpu().cores_allowed} cores{gib}
- {versions}
- `python -m reliability --only {name}`

{table}"""
    pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    page = PAGE.read_text(encoding="utf-8")
    write_atomic(PAGE, pattern.sub(lambda mark: f"{mark[1]}{block}\n{mark[2]}", page))


if __name__ == "__main__":
    raise SystemExit(main())

"""Runs fuzzing, faults and load, and writes their tables into docs/reliability.md.

python -m reliability                               # everything, about two hours
python -m reliability --only fuzz,requests
python -m reliability --only fuzz --kind image --count 500
python -m reliability --only requests --first 1234 --count 1    # one case again
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
ABOUT = {
    "fuzz": "Spoiled files\n\n"
    "Every file was spoiled by a seeded generator and given to the program. It may be taken, "
    "or refused with one of the documented exit codes; a traceback, code that ran, more than "
    "20 s or more than 2 GB is a fault.",
    "requests": "Spoiled requests\n\n"
    "Every HTTP request was spoiled by a seeded generator and sent to a running server, 32 at "
    "a time. Any status but 2xx, 4xx and 503, a traceback in the log and a server that stops "
    "answering is a fault; no answer is right where a request was not complete.",
    "faults": "Faults\n\n"
    "After each the bundle must be the old one or the new one, whole, and the next run must "
    "succeed. Dropped, cut and lying downloads are in `tests/model/test_hub.py`.",
    "load": "Load\n\n"
    "Memory is compared with the same work on a twentieth of the images; at most a tenth "
    "more counts as flat.",
}
"""The title of each part's section, and what it says before its table."""


def main() -> int:
    """Run the parts asked for; return 1 if one found a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--count", type=int, help="of cases, images and requests")
    parser.add_argument("--first", type=int, default=0, help="case of fuzz or requests")
    parser.add_argument("--kind", nargs="*", default=[], choices=list(KINDS), help="of fuzz")
    asked = parser.parse_args()
    found, whole = [], not (asked.count or asked.first or asked.kind)
    for name in asked.only.split(","):
        if name not in PARTS:
            parser.error(f"there is no part '{name}'; known: {', '.join(PARTS)}")
        more = {"first": asked.first} if name in {"fuzz", "requests"} else {}
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
    """Return the page with a part's table in its section, or behind all others."""
    page, total = PAGE.read_text(encoding="utf-8"), memory().total_bytes
    versions = ", ".join(f"{n} {version}" for n, version in tool_versions(*EXPORT_TOOLS).items())
    gib = f", {total / 2**30:.0f} GiB" if total else ""
    facts = (
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {seconds:.0f} s",
        f"{cpu().name}, {cpu().cores_allowed} cores{gib}",
        versions,
        f"`python -m reliability --only {name}`",
    )
    listed = "\n".join(f"- {fact}" for fact in facts)
    text = f"## {ABOUT[name]}\n\n{listed}\n\n{table}"
    block = f"<!-- begin {name} -->\n{text}\n<!-- end {name} -->\n"
    pattern = re.compile(rf"<!-- begin {name} -->.*?<!-- end {name} -->\n", re.DOTALL)
    return pattern.sub(lambda _: block, page) if pattern.search(page) else f"{page}\n{block}"


if __name__ == "__main__":
    raise SystemExit(main())

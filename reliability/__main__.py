"""Runs fuzzing, faults and load, and writes their tables into docs/reliability.md.

python -m reliability                     # everything, about an hour
python -m reliability --only fuzz,requests
python -m reliability --only faults,load
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from van_deploy.environment.hardware import cpu, memory
from van_deploy.files import write_atomic
from van_deploy.provenance import EXPORT_TOOLS, tool_versions
from van_deploy.report.render_markdown import markdown_table

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"

HEADER = """# Reliability

What was tried to break this program, how often, and what happened. The tables were written
by `make fuzz` and `make faults`; each names its date, its machine and its command. A small
seeded share of each runs in the tests. What is trusted and what is not is said in
[SECURITY.md](../SECURITY.md).
"""

SECTIONS = {
    "fuzz": (
        "Spoiled files",
        "Every file was spoiled by a seeded generator and given to the program. It may be taken, "
        "or refused with one of the documented exit codes; a traceback, code that ran, more than "
        "20 s or more than 2 GB is a fault.",
    ),
    "requests": (
        "Spoiled requests",
        "Every HTTP request was spoiled by a seeded generator and sent to a running server, 32 at "
        "a time. Any status but 2xx, 4xx and 503, a traceback in the log and a server that stops "
        "answering is a fault; no answer is right where a request was not complete.",
    ),
    "faults": (
        "Faults",
        "After each the bundle must be the old one or the new one, whole, and the next run must "
        "succeed. Dropped, cut and lying downloads are in `tests/model/test_hub.py`.",
    ),
    "load": (
        "Load",
        "Memory is compared with the same work on a twentieth of the images; at most a tenth "
        "more counts as flat.",
    ),
}


def main() -> int:
    """Run the parts asked for; return 1 if one found a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--count", type=int, help="of cases or trials, for one part")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"there is no part '{unknown[0]}'; known: {', '.join(SECTIONS)}")
    if arguments.count and (len(names) > 1 or names == ["load"]):
        parser.error("--count goes with one of --only fuzz, requests and faults")
    return max(_run(name, arguments.count) for name in names)


def _run(name: str, count: int | None) -> int:
    start = time.monotonic()
    more = ["--count", str(count)] if count else []
    done = subprocess.run(
        [sys.executable, "-m", f"reliability.{name}", "--json", *more],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if not done.stdout.strip():
        print(f"{name}: failed with code {done.returncode}", file=sys.stderr)
        return 1
    result = json.loads(done.stdout)
    title, about = SECTIONS[name]
    faults = [f"- fault: {fault}" for fault in result["faults"]]
    versions = ", ".join(f"{n} {version}" for n, version in tool_versions(*EXPORT_TOOLS).items())
    total = memory().total_bytes
    lines = [
        f"## {title}",
        "",
        about,
        "",
        f"- {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {time.monotonic() - start:.0f} s",
        f"- {cpu().name}, {cpu().cores_allowed} cores"
        + (f", {total / 2**30:.0f} GiB" if total else ""),
        f"- {versions}",
        f"- `{' '.join(['python -m reliability --only', name, *more])}`",
        "",
        markdown_table(result["columns"], result["rows"]),
        *(["", *faults] if faults else []),
    ]
    write_atomic(PAGE, _with_section(name, "\n".join(lines)))
    return done.returncode


def _with_section(name: str, text: str) -> str:
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else HEADER
    block = f"<!-- begin {name} -->\n{text}\n<!-- end {name} -->\n"
    pattern = re.compile(rf"<!-- begin {name} -->.*?<!-- end {name} -->\n", re.DOTALL)
    if pattern.search(page):
        return pattern.sub(lambda _: block, page)
    return f"{page.rstrip()}\n\n{block}"


if __name__ == "__main__":
    raise SystemExit(main())

"""Run fuzzing, fault injection and load tests, and write their tables into docs/reliability.md.

python -m reliability                               # everything, one to two hours
python -m reliability --only fuzz,requests
python -m reliability --only fuzz --kind image --count 500 --seed 7
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.table import names_of, write_section
from reliability import faults, fuzz, load, requests
from reliability.kinds import KINDS
from reliability.outcome import Outcome
from van_deploy.report.render_markdown import markdown_table

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
PARTS = {"fuzz": fuzz.run, "requests": requests.run, "faults": faults.run, "load": load.run}


def main() -> int:
    """Run the requested parts; return 1 if one has a failure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", **names_of(PARTS), help="parts: %(default)s")
    parser.add_argument("--count", type=int, default=0, help="of cases, images and requests")
    parser.add_argument("--seed", type=int, default=0, help="of fuzz and requests")
    parser.add_argument("--kind", **names_of(KINDS), help="kinds of files to fuzz: %(default)s")
    args, failures = parser.parse_args(), list[str]()
    for name in args.only:
        start, outcomes = time.monotonic(), list(PARTS[name](args))
        failures += (failed := [outcome.failure for outcome in outcomes if outcome.failure])
        table = "\n".join([outcome_table(outcomes), *(f"- failure: {text}" for text in failed)])
        print(f"{name}\n\n{table}", file=sys.stderr, flush=True)
        if (args.count, args.seed, args.kind) == (0, 0, list(KINDS)):
            command, seconds = f"python -m reliability --only {name}", time.monotonic() - start
            write_section(PAGE, name, command, seconds, table)
    return int(bool(failures))


def outcome_table(outcomes: list[Outcome]) -> str:
    """Return a Markdown table with a row for each fault, load or kind of input."""
    rows = []
    for what in dict.fromkeys(outcome.what for outcome in outcomes):
        texts, failed = Counter[str](), 0
        for outcome in outcomes:
            if outcome.what == what:
                texts[outcome.text] += outcome.runs
                failed += bool(outcome.failure)
        shown = [f"{text}: {n:,}" if n and len(texts) > 1 else text for text, n in texts.items()]
        rows.append([what, f"{texts.total():,}", ", ".join(shown), str(failed)])
    return markdown_table(["what", "runs", "outcomes", "failures"], rows)


if __name__ == "__main__":
    raise SystemExit(main())

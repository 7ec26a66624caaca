"""Asks for known vulnerabilities of the pinned packages: ``python -m supply_chain.audit``.

Ends with 1 if a package has one. Where the service cannot be reached, or knows none of the
packages, nothing was audited: that is said, as ``skipped`` with the reason, and ends with 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from supply_chain.pins import PINNED

__all__ = ["judged", "main"]

LONGEST_S = 300


def judged(report: str, complaint: str) -> tuple[int, list[str]]:
    """Return the exit code and the lines to print.

    Args:
        report: pip-audit's JSON; "" if it wrote none.
        complaint: what it wrote to stderr.
    """
    try:
        entries: Sequence[Mapping[str, Any]] = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        lines = [line for line in complaint.splitlines() if line.strip()]
        reason = lines[-1].strip()[:300] if lines else "pip-audit wrote no report"
        return 0, [f"skipped: nothing was audited: {reason}"]
    audited = [entry for entry in entries if "vulns" in entry]
    passed_over = [entry for entry in entries if "vulns" not in entry]
    if not audited:
        reason = passed_over[0].get("skip_reason", "no reason given") if passed_over else "no pins"
        return 0, [f"skipped: none of {len(entries)} packages could be audited: {reason}"]
    lines = [
        f"{entry['name']} {entry['version']}: {found['id']}, "
        f"mended in {', '.join(found.get('fix_versions', ())) or 'no version yet'}"
        for entry in audited
        for found in entry["vulns"]
    ]
    lines += [f"not audited: {e['name']}: {e.get('skip_reason', '')}" for e in passed_over]
    vulnerable = sum(bool(entry["vulns"]) for entry in audited)
    lines.append(f"{len(audited)} packages audited, {vulnerable} with known vulnerabilities")
    return int(vulnerable > 0), lines


def main() -> int:
    """Audit ``constraints.txt``, print what came of it, and return the exit code."""
    command = [
        *(sys.executable, "-m", "pip_audit", "--requirement", str(PINNED), "--no-deps"),
        *("--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "10"),
    ]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=LONGEST_S
        )
        code, lines = judged(ran.stdout, ran.stderr)
    except subprocess.TimeoutExpired:
        code, lines = 0, [f"skipped: nothing was audited: no answer in {LONGEST_S} s"]
    sys.stdout.write("".join(f"pip-audit: {line}\n" for line in lines))
    return code


if __name__ == "__main__":
    sys.exit(main())

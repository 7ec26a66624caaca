"""Asks for known vulnerabilities of the pinned packages: ``python -m supply_chain.audit``.

Ends with 1 if a package has one, and if nothing was audited: the service cannot be reached,
or knows none of the packages. ``--allow-offline`` lets the latter pass, and that is said.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from supply_chain.pins import PINNED

LONGEST_S = 300


def judged(report: str, complaint: str, allow_offline: bool = False) -> tuple[int, list[str]]:
    """Return the exit code and the lines to print.

    Args:
        report: pip-audit's JSON; "" if it wrote none.
        complaint: what it wrote to stderr.
        allow_offline: whether it may pass though nothing was audited.
    """
    try:
        entries: Sequence[Mapping[str, Any]] = json.loads(report)["dependencies"]
        reason = f"none of {len(entries)} packages is known to the service"
    except (ValueError, KeyError, TypeError):
        entries = []
        reason = next(iter(complaint.strip().splitlines()[::-1]), "pip-audit wrote no report")
    audited = [entry for entry in entries if "vulns" in entry]
    if not audited:
        end = "SKIPPED" if allow_offline else "FAILED"
        told = "lets this pass" if allow_offline else "would let this pass"
        lines = [f"{end}: nothing was audited: {reason[:300]}", f"--allow-offline {told}"]
        return int(not allow_offline), lines
    lines = [
        f"{entry['name']} {entry['version']}: {found['id']}, "
        f"mended in {', '.join(found.get('fix_versions', ())) or 'no version yet'}"
        for entry in audited
        for found in entry["vulns"]
    ]
    lines += [
        f"not audited: {entry['name']}: {entry.get('skip_reason', '')}"
        for entry in entries
        if "vulns" not in entry
    ]
    vulnerable = sum(bool(entry["vulns"]) for entry in audited)
    lines.append(f"{len(audited)} packages audited, {vulnerable} with known vulnerabilities")
    return int(vulnerable > 0), lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Audit ``constraints.txt``, print what came of it, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--allow-offline", action="store_true")
    allow_offline: bool = parser.parse_args(arguments).allow_offline
    command = [
        *(sys.executable, "-m", "pip_audit", "--requirement", str(PINNED), "--no-deps"),
        *("--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "10"),
    ]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=LONGEST_S
        )
        report, complaint = ran.stdout, ran.stderr
    except subprocess.TimeoutExpired:
        report, complaint = "", f"no answer in {LONGEST_S} s"
    code, lines = judged(report, complaint, allow_offline)
    sys.stdout.write("".join(f"pip-audit: {line}\n" for line in lines))
    return code


if __name__ == "__main__":
    sys.exit(main())

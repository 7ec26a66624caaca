"""Checks the pinned packages for known vulnerabilities: ``python -m supply_chain.audit``.

Exit code 1 if a package has a vulnerability, and if no package was audited because the service
cannot be reached or does not know any of them. With ``--allow-offline`` the latter is reported
as SKIPPED and passes.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from supply_chain.pins import PINNED

TIMEOUT_S = 300
OPTIONS = "--no-deps --disable-pip --format json --progress-spinner off --timeout 10"


def summarize_audit(report: str, stderr: str, allow_offline: bool = False) -> tuple[int, list[str]]:
    """Return the exit code and the lines to print.

    Args:
        report: pip-audit's JSON; "" if it wrote none.
        stderr: pip-audit's error output.
        allow_offline: pass although no package was audited.
    """
    entries: list[dict[str, Any]] = json.loads(report)["dependencies"] if report else []
    audited = [entry for entry in entries if "vulns" in entry]
    if not audited:
        reasons = ["pip-audit wrote no report", *stderr.strip().splitlines()]
        reasons += [f"none of {len(entries)} packages is known to the service"] * bool(entries)
        status = "SKIPPED" if allow_offline else "FAILED"
        lines = [f"{status}: nothing was audited: {reasons[-1][:300]}"]
        return int(not allow_offline), [*lines, "--allow-offline lets this pass"]
    lines = [
        f"{entry['name']} {entry['version']}: {flaw['id']}, "
        f"fixed in {', '.join(flaw['fix_versions']) or 'no version yet'}"
        for entry in audited
        for flaw in entry["vulns"]
    ]
    skipped = [entry for entry in entries if "vulns" not in entry]
    lines += [f"not audited: {entry['name']}: {entry['skip_reason']}" for entry in skipped]
    vulnerable = sum(bool(entry["vulns"]) for entry in audited)
    lines.append(f"{len(audited)} packages audited, {vulnerable} with known vulnerabilities")
    return int(vulnerable > 0), lines


def main() -> int:
    """Audit ``constraints.txt``, print the result, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--allow-offline", action="store_true")
    allow_offline: bool = parser.parse_args().allow_offline
    command = [sys.executable, "-m", "pip_audit", *OPTIONS.split(), "--requirement", str(PINNED)]
    try:
        audit = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        code, lines = summarize_audit(audit.stdout, audit.stderr, allow_offline)
    except subprocess.TimeoutExpired:
        code, lines = summarize_audit("", f"no answer in {TIMEOUT_S} s", allow_offline)
    sys.stdout.write("".join(f"pip-audit: {line}\n" for line in lines))
    return code


if __name__ == "__main__":
    sys.exit(main())

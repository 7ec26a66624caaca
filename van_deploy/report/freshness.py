"""Leaving out results that belong to files which are no longer in the bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from van_deploy.bench.document import BenchReport
from van_deploy.bundle import Manifest

__all__ = ["fresh_bench", "fresh_checks"]

BY_ARTEFACT = ("artefacts", "accuracies", "losses")
"""Keys of a check's result under which there is one entry an artefact."""


def fresh_checks(manifest: Manifest) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the checks without entries of artefacts that were made anew since.

    Returns:
        The checks, and ``(check, artefact)`` of what was left out.
    """
    now = _digests(manifest)
    checks, stale = {}, []
    for name, entry in manifest.checks.items():
        measured = entry.get("artefacts_sha256", {}) if isinstance(entry, Mapping) else {}
        gone = {artefact for artefact, digest in measured.items() if now.get(artefact) != digest}
        checks[name] = _without(entry, gone) if gone else entry
        stale += [(name, artefact) for artefact in sorted(gone)]
    return checks, stale


def fresh_bench(
    manifest: Manifest, bench: BenchReport | None
) -> tuple[BenchReport | None, list[tuple[str, str]]]:
    """Return a benchmark without the rows of files that are no longer in the bundle."""
    if bench is None:
        return None, []
    known = {*_digests(manifest).values(), manifest.weights.sha256}
    gone = {name for name, entry in bench.contenders.items() if entry.sha256 not in known}
    kept = {
        "rows": tuple(row for row in bench.rows if row.contender not in gone),
        "roofline": tuple(row for row in bench.roofline if row.contender not in gone),
    }
    return bench.model_copy(update=kept), [("bench", name) for name in sorted(gone)]


def _digests(manifest: Manifest) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in manifest.artefacts.items()}


def _without(entry: Mapping[str, Any], gone: set[str]) -> dict[str, Any]:
    """Return a check's result without the entries of some artefacts."""
    return {
        key: {name: item for name, item in value.items() if name not in gone}
        if key in BY_ARTEFACT and isinstance(value, Mapping)
        else value
        for key, value in entry.items()
    }

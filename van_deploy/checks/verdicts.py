"""What verifying a bundle finds, and how a check is kept in it."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

from van_deploy.bundle import Bundle, writing
from van_deploy.checks.gates import Allowed, Finding, Limit, Outcome, Report
from van_deploy.checks.judging import Judgement
from van_deploy.checks.layers import DriftRow
from van_deploy.documents import plain

SCHEMA: Final = "van-deploy/verify/2"
SHOWN_ROWS = 10
MAY_NOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, kw_only=True)
class ArtefactVerdict(Judgement):
    """What was found of one artifact.

    Attributes:
        artefact: its name.
        precision: of the artifact.
        numeric: the numeric class it was judged in.
        runner: what ran it, or would have.
        modules: every module by the error it adds, worst first.
    """

    JSON_PROPERTIES: ClassVar = ("outcome", "reason", "limit", "margin_db", "worst_modules")

    artefact: str
    precision: str
    numeric: str
    runner: str
    modules: tuple[DriftRow, ...] = field(default=(), metadata={"json": False})

    @property
    def reason(self) -> str:
        """Why it was skipped, or ""."""
        return self.findings[0].message if self.outcome is Outcome.SKIPPED else ""

    @property
    def worst_modules(self) -> tuple[DriftRow, ...]:
        """The first of the modules."""
        return self.modules[:SHOWN_ROWS]

    @property
    def failures(self) -> list[str]:
        """The messages of what does not hold."""
        return [f.message for f in self.findings if f.outcome is Outcome.FAIL]

    @property
    def limit(self) -> Limit | None:
        """The limit on the SQNR that decides: the highest of the floor's and the record's."""
        found = [f.limit for f in self.findings if f.rule.startswith("SQNR") and f.limit]
        return max(found, key=lambda limit: limit.value, default=None)

    @property
    def margin_db(self) -> float | None:
        """How far the SQNR is above that limit, in dB."""
        if self.comparison is None or self.limit is None:
            return None
        return self.comparison.sqnr_db - self.limit.value


@dataclass(frozen=True)
class VerifyReport(Report):
    """What was found of every artifact of a bundle.

    Attributes:
        against: what they were compared with.
        images: what they were compared on.
        names: what each image is called.
        noise_db: SQNR of PyTorch in float32 against its float64, on these images.
        modules: what modules were compared with, or "".
        findings: on what belongs to no artifact: how images are read here.
        artefacts: one verdict each, by name.
        allowed: what the user lets pass.
        schema: of the document.
    """

    against: str
    images: str
    names: tuple[str, ...]
    noise_db: float
    modules: str
    findings: tuple[Finding, ...]
    artefacts: Mapping[str, ArtefactVerdict]
    allowed: Allowed
    schema: Literal["van-deploy/verify/2"] = SCHEMA

    def named(self) -> list[tuple[str, Finding]]:
        """Return every finding and what it is about: the images, or an artifact."""
        about = [("images", finding) for finding in self.findings]
        return about + [(v.artefact, f) for v in self.artefacts.values() for f in v.findings]

    @property
    def passed(self) -> bool:
        """Whether an artifact passed, and nothing else stands in the way."""
        shown = any(verdict.outcome is Outcome.PASS for verdict in self.artefacts.values())
        return shown and super().passed


def record_check(bundle: Bundle, name: str, result: object) -> str:
    """Write the result of a check into the manifest, with the digests of the artifacts.

    A bundle that may only be read keeps no record; the check is worth no less for it.

    Args:
        bundle: what was checked.
        name: of the check, such as ``verify``.
        result: the report.

    Returns:
        Why nothing was recorded, a sentence, or "".

    Raises:
        BundleError: the bundle was changed while it was checked.
    """
    digests = {key: artefact.sha256 for key, artefact in bundle.artefacts.items()}
    try:
        with writing(bundle.path) as draft:
            draft.checks[name] = {**plain(result), "artefacts_sha256": digests}
    except OSError as error:
        if error.errno not in MAY_NOT_WRITE:
            raise
        return f"'{bundle.path}' may only be read, so the result of '{name}' is not kept in it."
    return ""

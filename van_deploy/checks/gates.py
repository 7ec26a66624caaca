"""Every limit an artifact is held to, and what PASS means. The only module with such numbers.

``quantize``, ``verify``, ``evaluate``, ``check``, ``drift`` and the report read it. A gate
says PASS only of what was shown:

================  ====================================================================
``PASS``          the rule was applied and holds
``FAIL``          the rule was applied and does not hold
``INCONCLUSIVE``  the data cannot decide; the message says how many more images would
``SKIPPED``       not run; the message says why
================  ====================================================================

FAIL and INCONCLUSIVE end a command with 1, and so does a skip the user did not name
(:class:`Allowed`). Limits depend on the *numeric class*, which is what computes and not
what the file is called: an FP32 engine built with TF32 is of the class ``tf32``.

:mod:`van_deploy.checks.rules` applies the limits. Both import nothing heavier than NumPy:
whoever makes an artifact may ask them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from van_deploy.config import GateProfile
from van_deploy.metrics import Task

BELOW_NOISE_DB = 20.0
"""``fp32`` may be so much noisier than PyTorch's own float32 against its float64: another order
of summation, on another processor, costs 3 to 17 dB on trained VANs (docs/gates.md)."""

ROUNDOFF_DB = 144.5
"""20 log10(2^24). Noise below float32's own roundoff is luck, and no reason to ask for more."""

BROKEN_DB = 20.0
"""Below this an artifact is broken, whatever the network and the class."""


@dataclass(frozen=True)
class ClassLimits:
    """The limits of one numeric class.

    Attributes:
        sqnr_db: least SQNR of the logits on the golden samples; of ``fp32`` see
            :func:`sqnr_floor`.
        module_db: least isolated SQNR of one module, fed the reference's tensors. Measured worst
            modules of right artifacts: 131, 66 and 22 dB for fp32, fp16 and int8
            (docs/gates.md); bf16 has 3 bits fewer than fp16, 18 dB.
        top1_loss: points (percent) of top-1 that may be lost against PyTorch.
        slack_db: how much a module's isolated SQNR may fall between a baseline and now:
            float32's own noise depends on the order in which a processor adds, rounding to
            fewer bits hides that.
        lossy: labels may change by chance on many images, so that only counting images can
            show how much is lost. In the other classes the logits decide.
    """

    sqnr_db: float
    module_db: float
    top1_loss: float
    slack_db: float
    lossy: bool = False


CLASSES: Mapping[str, ClassLimits] = {
    "fp32": ClassLimits(BROKEN_DB, 100.0, 0.0, 15.0),
    # A 10-bit mantissa, as fp16's. Right ones on an H200: 58 to 63 dB (docs/gpu-results.md).
    "tf32": ClassLimits(50.0, 45.0, 0.2, 6.0),
    "fp16": ClassLimits(45.0, 52.0, 0.2, 3.0),
    "bf16": ClassLimits(30.0, 34.0, 0.5, 3.0, lossy=True),
    "int8": ClassLimits(BROKEN_DB, 8.0, 1.0, 2.0, lossy=True),
}
LOSSY = tuple(name for name, limits in CLASSES.items() if limits.lossy)

BELOW_RECORD_DB = 3.0
"""How far below the SQNR recorded when it was made an artifact may be, on the same samples, in the
same runtime, provider and numeric class. It catches a file that changed after it was made."""

BATCH_INVARIANCE_DB = 26.0
"""Whatever the class, an image in a batch is the same image: at most 5 % of the logits' RMS."""

WORST_ROW_DB = 10.0
"""One image may have ten times the mean noise power that is allowed."""

FLIP_SIGMAS = 4.0
"""A label flip is explained where PyTorch's margin is within so many standard deviations of the
noise that the class allows: one in 30,000 is beyond by chance."""

CHANCE_FLIPS = 1 / 2000
"""Share of images that another processor or build may decide otherwise: near-ties."""


@dataclass(frozen=True)
class ScaleBounds:
    """What the activation scales of one calibration method may be, over the best ones.

    The best scale of a tensor is the one with the least squared error on the golden images.

    Attributes:
        centre: what the median over the tensors is expected to be.
        least: smallest of any tensor.
        most: largest of any tensor.
    """

    centre: float
    least: float
    most: float


SCALE_BOUNDS: Mapping[str, ScaleBounds] = {
    "mse": ScaleBounds(1.0, 1 / 3, 3.0),
    "percentile": ScaleBounds(1.15, 1 / 3, 3.5),
    "minmax": ScaleBounds(1.5, 1 / 3, 4.5),
}
"""Measured on the shared van_b0 with golden images of its own kind and with photographs
(docs/gates.md has the medians and the extremes). A method that is not known is held to ``mse``."""

UNSIGNED_LEAST = 0.15
"""The least ratio of unsigned activations (graphs for CPUs). The best scale is sought with the
zero-point as it is, the quantiser moves both ends: its right scales reach down to 0.22 on the
shared van_b0 with photographs and to 0.29 on van_digits with its own kind of images."""

SPEED_SLACK = 0.1
"""Share of a speed ratio that may be lost between a baseline and now."""

SPEED_WITHIN = 0.02
"""Share of a median ratio that its interval should be within; rounds go on until it is."""

SCALE_MEDIAN_FACTOR = 1.4
"""The median may be off its centre by this factor either way: half way to a doubled scale."""

SCALE_SPREAD = (2.0, 0.15)
"""At most this share of the scales may be off the median by more than this factor. Right ones:
0 to 9 %; ranges of another layer: 22 % and more."""

UNSIGNED_SPREAD = (2.0, 0.22)
"""The same for unsigned activations: right ones 11 % (van_digits) and 15 % (the shared van_b0)."""

LEAST_CODE = 112
"""A channel whose largest weight is an integer below this wastes an eighth of them or more; right
scales make it 125 to 127."""

MOST_SATURATED = (4, 0.03)
"""So many integers of a channel, or that share of them, may be at the end of the range."""


class Outcome(str, enum.Enum):
    """What a gate says."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Limit:
    """A number an artifact is held to.

    Attributes:
        value: in the unit of the rule.
        origin: where it came from, such as ``floor for int8`` or ``recipe [gates.int8]``.
    """

    value: float
    origin: str


@dataclass(frozen=True)
class Finding:
    """One rule applied to one artifact.

    Attributes:
        rule: its name, such as ``SQNR``.
        outcome: what it says.
        message: what is wrong, undecided or skipped; for a PASS what was shown. One sentence
            without a full stop.
        value: what was measured, or None.
        limit: what it was held to, or None.
        unit: of both, such as ``dB`` or ``pp``.
        skip: for SKIPPED, its kind, which ``--allow-skip`` can name: ``engines`` (its GPU is not
            in this machine), ``runtimes`` (its runtime or provider is not installed or not of
            its version), ``accuracy`` and ``speed`` (the baseline has such figures and this run
            did not measure them); "" where nothing forgives it.
    """

    rule: str
    outcome: Outcome
    message: str = ""
    value: float | None = None
    limit: Limit | None = None
    unit: str = ""
    skip: str = ""


@dataclass(frozen=True)
class Allowed:
    """What the user lets pass that no PASS was shown of.

    Attributes:
        skip: kinds of skips, as :attr:`Finding.skip`.
        inconclusive: whether what the data cannot decide is let pass.
    """

    skip: tuple[str, ...] = ()
    inconclusive: bool = False

    def holds(self, finding: Finding) -> bool:
        """Return whether a finding stands in nobody's way."""
        if finding.outcome is Outcome.SKIPPED:
            return finding.skip in self.skip
        if finding.outcome is Outcome.INCONCLUSIVE:
            return self.inconclusive
        return finding.outcome is Outcome.PASS

    def passes(self, findings: Iterable[Finding]) -> bool:
        """Return whether a command ends with 0: something ran, and nothing stands in the way."""
        found = list(findings)
        ran = any(finding.outcome is not Outcome.SKIPPED for finding in found)
        return ran and all(self.holds(finding) for finding in found)


class Report:
    """Findings that a command ends by.

    Attributes:
        allowed: what the user lets pass.
    """

    allowed: Allowed

    def named(self) -> list[tuple[str, Finding]]:
        """Return every finding and what it is about."""
        raise NotImplementedError

    @property
    def passed(self) -> bool:
        """Whether something passed, and nothing stands in the way."""
        return self.allowed.passes(finding for _, finding in self.named())

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


DEFAULT = GateProfile()
"""A recipe that sets nothing."""


def outcome_of(findings: Iterable[Finding]) -> Outcome:
    """Return what several findings say together: the worst of them; SKIPPED for none."""
    found = {finding.outcome for finding in findings}
    order = (Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.PASS)
    return next((outcome for outcome in order if outcome in found), Outcome.SKIPPED)


def held(
    rule: str,
    fault: str,
    value: float | None = None,
    limit: Limit | None = None,
    unit: str = "",
    shown: str = "",
) -> Finding:
    """Return a rule that was applied: PASS, and what was ``shown``, or FAIL where there is a fault.

    The other arguments are those of :class:`Finding`.
    """
    return Finding(
        rule, Outcome.FAIL if fault else Outcome.PASS, fault or shown, value, limit, unit
    )


def skipped(rule: str, message: str, kind: str = "") -> Finding:
    """Return a rule that was not applied; ``kind`` as :attr:`Finding.skip`."""
    return Finding(rule, Outcome.SKIPPED, message, skip=kind)


def numeric_class(precision: str, *, tf32: bool = False) -> str:
    """Return the class that an artifact of ``precision`` is judged in.

    Args:
        precision: of the artifact.
        tf32: whether its FP32 layers may compute in TF32: the engine's sidecar or the ONNX
            Runtime session says so.
    """
    return "tf32" if precision == "fp32" and tf32 else precision


def sqnr_floor(numeric: str, noise_db: float, profile: GateProfile = DEFAULT) -> Limit:
    """Return the least SQNR of the logits.

    Args:
        numeric: the numeric class.
        noise_db: SQNR of PyTorch's float32 against its float64 on the same images.
        profile: what the recipe sets otherwise.
    """
    value, origin = CLASSES[numeric].sqnr_db, f"floor for {numeric}"
    if numeric == "fp32":
        own = min(noise_db, ROUNDOFF_DB)
        value = max(own - BELOW_NOISE_DB, value)
        origin = f"PyTorch's own float32 noise, {own:.1f} dB, minus {BELOW_NOISE_DB:g}"
    return _unless_set(profile.sqnr_db, numeric, Limit(value, origin))


def module_floor(numeric: str, profile: GateProfile = DEFAULT) -> Limit:
    """Return the least isolated SQNR of any module."""
    limit = Limit(CLASSES[numeric].module_db, f"floor for one module of {numeric}")
    return _unless_set(profile.module_db, numeric, limit)


def allowed_loss(numeric: str, profile: GateProfile = DEFAULT) -> Limit:
    """Return the points of top-1 that may be lost."""
    limit = Limit(CLASSES[numeric].top1_loss, f"allowed for {numeric}")
    return _unless_set(profile.top1_loss, numeric, limit)


def _unless_set(value: float | None, numeric: str, limit: Limit) -> Limit:
    """Return a limit, or what the recipe sets in its place."""
    return limit if value is None else Limit(value, f"recipe [gates.{numeric}]")


def flip_margin(floor_db: float, task: Task = Task.SINGLE_LABEL) -> float:
    """Return the margin, in RMS logits, up to which noise at the floor explains a label flip.

    Between two logits the noise is that of a difference; a single logit that is compared with
    0 has its own alone.
    """
    pair = math.sqrt(2) if task is Task.SINGLE_LABEL else 1.0
    return FLIP_SIGMAS * pair * 10 ** (-floor_db / 20)


def chance_changes(images: int) -> int:
    """Return how many of ``images`` labels may differ between two runs of the same artifact.

    Near-ties: their expected number and two standard deviations, and never less than one.

    >>> chance_changes(200), chance_changes(2000), chance_changes(50_000)
    (1, 3, 35)
    """
    expected = images * CHANCE_FLIPS
    return max(1, math.floor(expected + 2 * math.sqrt(expected)))

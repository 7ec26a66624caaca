"""Quality gates: all limits that artifacts must meet, and the rules that apply them.

``quantize``, ``verify``, ``evaluate``, ``check``, ``drift`` and the report use these limits; no
other module defines any. A gate has one of four outcomes:

================  ====================================================================
``PASS``          the rule was applied and the limit is met
``FAIL``          the rule was applied and the limit is not met
``INCONCLUSIVE``  the data cannot decide; the message says how many images would
``SKIPPED``       not run; the message says why
================  ====================================================================

FAIL and INCONCLUSIVE make a command exit with 1, and so does a skip that the user did not allow
(:class:`AllowOptions`). Limits depend on the *numeric class*: the arithmetic that is used, not the
precision in the file's name. An FP32 engine built with TF32 has the class ``tf32``.

The rules are pure functions, and the module imports nothing heavier than NumPy.
"""

import enum
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from van_deploy.config import GateProfile
from van_deploy.documents import Verdict, limit_lines
from van_deploy.intervals import (
    Interval,
    mcnemar_exact,
    tango_interval,
    unseen_share,
    wilson_interval,
)
from van_deploy.metrics import Array, Flip, Task, find_flips, sqnr_db, worst_row_sqnr_db

# ``fp32`` may be this much noisier than PyTorch's own float32 against its float64: another order
# of summation, on another processor, costs 3 to 17 dB on trained VANs.
NOISE_MARGIN_DB = 20.0

# 20 log10(2^24). Noise below float32's own roundoff is chance and does not raise the limit.
ROUNDOFF_DB = 144.5

# Below this an artifact is broken, for any network and numeric class.
MIN_SQNR_DB = 20.0


@dataclass(frozen=True)
class ClassLimits:
    """The limits of one numeric class.

    Attributes:
        sqnr_db: minimum SQNR of the logits on the golden samples; for ``fp32`` see
            :func:`sqnr_floor`.
        module_db: minimum isolated SQNR of one module that is fed the reference's tensors. The
            worst modules of correct artifacts have 131, 66 and 22 dB in fp32, fp16 and int8
            (docs/gates.md); bf16 has 3 bits fewer than fp16, 18 dB.
        top1_loss: maximum top-1 loss against PyTorch, in points (percent).
        lossy: whether many labels may change by chance, so that only the accuracy on labelled
            images shows the loss. In the other classes the logits decide.
    """

    sqnr_db: float
    module_db: float
    top1_loss: float
    lossy: bool = False


CLASSES: Mapping[str, ClassLimits] = {
    "fp32": ClassLimits(MIN_SQNR_DB, 100.0, 0.0),
    # A 10-bit mantissa, as in fp16. Correct ones on an H200: 58 to 63 dB (docs/gpu-results.md).
    "tf32": ClassLimits(50.0, 45.0, 0.2),
    "fp16": ClassLimits(45.0, 52.0, 0.2),
    "bf16": ClassLimits(30.0, 34.0, 0.5, lossy=True),
    "int8": ClassLimits(MIN_SQNR_DB, 8.0, 1.0, lossy=True),
}
LOSSY = tuple(name for name, limits in CLASSES.items() if limits.lossy)

# An artifact may be this far below the SQNR recorded at its creation, on the same samples, in the
# same runtime, provider and numeric class. This detects files that changed afterwards.
RECORD_MARGIN_DB = 3.0

# In any class the batch may change an image's logits by at most 5 % of their RMS.
BATCH_INVARIANCE_DB = 26.0

# One image may have ten times the allowed mean noise power.
WORST_IMAGE_MARGIN_DB = 10.0

# A label flip is explained if PyTorch's margin is within this many standard deviations of the
# noise that the class allows: by chance one in 30,000 is beyond.
FLIP_SIGMAS = 4.0

# Share of images whose label may differ on another processor or build: near-ties.
CHANCE_FLIPS = 1 / 2000


# Ratio of a calibration method's activation scales to the optimal scales: the expected median over
# the tensors, and the maximum of any tensor. The optimal scale of a tensor has the least squared
# error on the golden images. Measured on the shared van_b0 with golden images like its training
# data and with photographs (docs/gates.md has the medians and extremes). Unknown methods use
# the bounds of ``mse``.
SCALE_BOUNDS: Mapping[str, tuple[float, float]] = {
    "mse": (1.0, 3.0),
    "percentile": (1.15, 3.5),
    "minmax": (1.5, 4.5),
}

# The minimum of this ratio of any tensor, and the maximum share of scales that differ from the
# median by more than SCALE_SPREAD_FACTOR: 0 to 9 % in correct graphs, 22 % and more with the ranges
# of another layer.
SIGNED_SCALES = (1 / 3, 0.15)

# The same for unsigned activations (graphs for CPUs). The optimal scale is searched with the
# zero-point fixed, but the quantiser moves both ends: correct scales reach down to 0.22 on the
# shared van_b0 with photographs and to 0.29 on van_digits with digits. Shares: 11 % on van_digits
# and 15 % on the shared van_b0.
UNSIGNED_SCALES = (0.15, 0.22)
SCALE_SPREAD_FACTOR = 2.0

# Maximum relative loss of a speed ratio against the baseline.
SPEED_TOLERANCE = 0.1

# Timing rounds continue until the interval of the median ratio is within this share of it.
SPEED_INTERVAL_WIDTH = 0.02

# The median may be off its centre by this factor either way: half way to a doubled scale.
SCALE_MEDIAN_FACTOR = 1.4

# A channel whose largest integer weight is below this wastes an eighth of the range or more; with
# correct scales it is 125 to 127.
MIN_LARGEST_CODE = 112

# Maximum number, and maximum share, of a channel's integers at the end of the range.
MAX_SATURATED = (4, 0.03)


class Outcome(str, enum.Enum):
    """Outcome of a gate."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    SKIPPED = "skipped"


@dataclass(frozen=True, order=True)
class Limit:
    """Limit of a rule; limits are ordered by value.

    Attributes:
        value: in the unit of the rule.
        origin: source of the value, such as ``floor for int8`` or ``recipe [gates.int8]``.
    """

    value: float
    origin: str


@dataclass(frozen=True)
class Finding:
    """Result of one rule for one artifact.

    Attributes:
        rule: name of the rule, such as ``SQNR``.
        outcome: outcome of the rule.
        message: reason for a FAIL, INCONCLUSIVE or SKIPPED, evidence for a PASS. One sentence
            without a full stop.
        value: the measured value, or None.
        limit: the limit, or None.
        unit: of both, such as ``dB`` or ``pp``.
        skip: for SKIPPED, the kind that ``--allow-skip`` can name: ``engines`` (this machine
            lacks the GPU), ``runtimes`` (the runtime or provider is not installed or has another
            version), ``accuracy`` and ``speed`` (the baseline has values that this run did not
            measure; an artifact without logits has no accuracy); "" if no option allows it.
    """

    rule: str
    outcome: Outcome
    message: str = ""
    value: float | None = None
    limit: Limit | None = None
    unit: str = ""
    skip: str = ""


@dataclass(frozen=True)
class AllowOptions:
    """The ``--allow-skip`` and ``--allow-inconclusive`` options.

    Attributes:
        skip: allowed kinds of skips, see :attr:`Finding.skip`.
        inconclusive: whether INCONCLUSIVE is allowed.
    """

    skip: tuple[str, ...] = ()
    inconclusive: bool = False


class GateReport(Verdict):
    """Base of the reports whose findings decide a command's exit code.

    Attributes:
        allowed: the user's allow options.
    """

    allowed: AllowOptions

    def named_findings(self) -> list[tuple[str, Finding]]:
        """Return every finding with the name of its subject."""
        raise NotImplementedError

    @property
    def passed(self) -> bool:
        """Whether the command exits with 0: an artifact ran, and every finding is accepted."""
        return self.ran and not self.rejected

    def accepts(self, finding: Finding) -> bool:
        """Return whether a finding is a PASS, or is allowed and an artifact ran."""
        if finding.outcome is Outcome.SKIPPED:
            return self.ran and finding.skip in self.allowed.skip
        if finding.outcome is Outcome.INCONCLUSIVE:
            return self.allowed.inconclusive
        return finding.outcome is Outcome.PASS

    @property
    def ran(self) -> bool:
        """Whether an artifact ran; the decoding of images is no artifact."""
        findings = [f for _, f in self.named_findings() if not f.rule.startswith(PREPROCESSING)]
        return any(finding.outcome is not Outcome.SKIPPED for finding in findings)

    @property
    def rejected(self) -> list[tuple[str, Finding]]:
        """The findings that are not accepted, each with the name of its subject."""
        return [pair for pair in self.named_findings() if not self.accepts(pair[1])]


DEFAULT_PROFILE = GateProfile()

# Start of the rules that check how this machine decodes images, not an artifact.
PREPROCESSING = "preprocessing/"

# Levels of 255 by which an image that is decoded and resized on this machine may differ.
RESIZE_LIMIT = Limit(1, "difference between builds of Pillow")

# Between a graph's probabilities and those of its own logits: rounding of float32.
SAME_PROBABILITY = Limit(1e-5, "its own logits give the expected one")

# Larger numbers of images are not useful advice.
MAX_IMAGES_TO_DECIDE = 10**8

# Messages of one verdict that are shown.
MAX_MESSAGES = 4


def outcome_of(findings: Iterable[Finding]) -> Outcome:
    """Return the worst outcome of several findings; SKIPPED if there are none."""
    outcomes = {finding.outcome for finding in findings}
    order = (Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.PASS)
    return next((outcome for outcome in order if outcome in outcomes), Outcome.SKIPPED)


class CheckResult:
    """Base of the results with findings.

    Attributes:
        findings: results of the rules.
    """

    JSON_PROPERTIES: ClassVar[tuple[str, ...]] = ("outcome",)

    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> Outcome:
        """The worst outcome of the findings."""
        return outcome_of(self.findings)

    @property
    def reason(self) -> str:
        """Messages of the findings with the worst outcome; "" for a PASS."""
        if self.outcome is Outcome.PASS:
            return ""
        messages = [f.message for f in self.findings if f.outcome is self.outcome and f.message]
        return "; ".join(limit_lines(messages, MAX_MESSAGES))


def pass_or_fail(
    rule: str, fault: str, value: float | None = None, limit: Limit | None = None, shown: str = ""
) -> Finding:
    """Return FAIL with the message ``fault`` if that is not empty, else PASS with ``shown``.

    The other arguments are those of :class:`Finding`.
    """
    outcome = Outcome.FAIL if fault else Outcome.PASS
    return Finding(rule, outcome, fault or shown, value, limit)


def skipped_finding(rule: str, message: str, kind: str = "") -> Finding:
    """Return SKIPPED with a reason; for ``kind`` see :attr:`Finding.skip`."""
    return Finding(rule, Outcome.SKIPPED, message, skip=kind)


def check_minimum(
    rule: str, value: float, limit: Limit, unit: str = "dB", where: str = ""
) -> Finding:
    """Return PASS if ``value`` is at least the limit, FAIL if it is below or NaN."""
    if value >= limit.value:
        return Finding(rule, Outcome.PASS, "", value, limit, unit)
    pairs = ((f"{value:.{digits}f}", f"{limit.value:.{digits}f}") for digits in range(1, 10))
    shown, least = next(
        (pair for pair in pairs if pair[0] != pair[1]), (f"{value}", f"{limit.value}")
    )
    message = f"{where}{rule} {shown} {unit} is below {least} {unit} ({limit.origin})"
    return Finding(rule, Outcome.FAIL, message, value, limit, unit)


# --- limits ----------------------------------------------------------------------------------


def numeric_class(precision: str, *, tf32: bool = False) -> str:
    """Return the numeric class of an artifact.

    Args:
        precision: precision of the artifact.
        tf32: whether its FP32 layers may compute in TF32, according to the engine's sidecar or
            the ONNX Runtime session.
    """
    return "tf32" if precision == "fp32" and tf32 else precision


def sqnr_floor(
    numeric: str, noise_db: float, profile: GateProfile = DEFAULT_PROFILE, offset_db: float = 0.0
) -> Limit:
    """Return the minimum SQNR of the logits.

    Args:
        numeric: the numeric class.
        noise_db: SQNR of PyTorch's float32 against its float64 on the same images.
        profile: limits of the recipe, which take precedence.
        offset_db: for a regression, how far the signal is above the differences between images
            (:func:`van_deploy.metrics.offset_db`). It raises the floor, at most to that of FP32.
    """
    own = min(noise_db, ROUNDOFF_DB)
    value, origin = CLASSES[numeric].sqnr_db, f"floor for {numeric}"
    exact = max(own - NOISE_MARGIN_DB, value)
    if numeric == "fp32":
        value = exact
        origin = f"PyTorch's own float32 noise, {own:.1f} dB, minus {NOISE_MARGIN_DB:g}"
    elif offset_db:
        value = min(value + offset_db, exact)
        origin += f" plus {offset_db:.1f} dB for the mean over the images"
    return _recipe_limit_or(profile.sqnr_db, numeric, value, origin)


def module_floor(numeric: str, profile: GateProfile = DEFAULT_PROFILE) -> Limit:
    """Return the minimum isolated SQNR of a module."""
    origin = f"floor for one module of {numeric}"
    return _recipe_limit_or(profile.module_db, numeric, CLASSES[numeric].module_db, origin)


def allowed_loss(numeric: str, profile: GateProfile = DEFAULT_PROFILE) -> Limit:
    """Return the maximum top-1 loss, in points."""
    origin = f"allowed for {numeric}"
    return _recipe_limit_or(profile.top1_loss, numeric, CLASSES[numeric].top1_loss, origin)


def _recipe_limit_or(own: float | None, numeric: str, value: float, origin: str) -> Limit:
    return Limit(value, origin) if own is None else Limit(own, f"recipe [gates.{numeric}]")


def flip_margin(floor_db: float, task: Task = Task.SINGLE_LABEL) -> float:
    """Return the margin, in RMS logits, up to which noise at the floor explains a label flip.

    The difference of two logits has the noise of both; a single logit, which is compared with 0,
    has its own.
    """
    pair = math.sqrt(2) if task is Task.SINGLE_LABEL else 1.0
    return FLIP_SIGMAS * pair * 10 ** (-floor_db / 20)


def chance_label_changes(images: int) -> int:
    """Return how many of ``images`` labels may differ between two runs of the same artifact.

    The expected number of near-ties plus two standard deviations, at least one.

    >>> chance_label_changes(200), chance_label_changes(2000), chance_label_changes(50_000)
    (1, 3, 35)
    """
    expected = images * CHANCE_FLIPS
    return max(1, math.floor(expected + 2 * math.sqrt(expected)))


# --- logits ----------------------------------------------------------------------------------


def check_logits(
    expected: Array,
    actual: Array,
    floor: Limit,
    recorded_db: float | None = None,
    task: Task = Task.SINGLE_LABEL,
    where: str = "",
) -> tuple[list[Finding], list[Flip]]:
    """Return the findings on logits ``(N, K)``, and all label flips, the widest margin first.

    Args:
        expected: PyTorch's logits, float64.
        actual: the artifact's logits for the same images.
        floor: from :func:`sqnr_floor`.
        recorded_db: SQNR recorded at the artifact's creation, on the same samples in the same
            runtime, provider and numeric class; None without such a record.
        task: how logits become labels.
        where: prefix of the messages, such as ``batch 8: ``.
    """
    if actual.shape != expected.shape:
        message = f"the output has shape {actual.shape}, PyTorch's output has {expected.shape}"
        return [pass_or_fail("shape", where + message)], []
    limit = floor
    if recorded_db is not None:
        origin = f"{recorded_db:.1f} dB recorded at creation, minus {RECORD_MARGIN_DB:g}"
        limit = max(floor, Limit(min(recorded_db, ROUNDOFF_DB) - RECORD_MARGIN_DB, origin))
    worst_origin = f"{WORST_IMAGE_MARGIN_DB:g} dB below the limit of the SQNR"
    worst_limit = Limit(floor.value - WORST_IMAGE_MARGIN_DB, worst_origin)
    flips = find_flips(expected, actual, task, flip_margin(floor.value, task))
    return [
        check_minimum("SQNR", sqnr_db(expected, actual), limit, where=where),
        check_minimum("worst image", worst_row_sqnr_db(expected, actual), worst_limit, where=where),
        check_flips(flips, floor, task, where),
    ], flips


def check_flips(flips: Sequence[Flip], floor: Limit, task: Task, where: str = "") -> Finding:
    """Return whether noise at the floor explains all label flips, the widest margin first."""
    limit = Limit(flip_margin(floor.value, task), f"noise at {floor.value:.1f} dB")
    faults = [flip for flip in flips if flip.fault]
    relevant = faults or flips
    widest = relevant[0].margin if relevant else 0.0
    margins = f"of up to {widest:.2g} RMS logits; {limit.origin} explains {limit.value:.2g}"
    why = f" with a margin in PyTorch {margins}" if faults else ", explained by the allowed noise"
    message = f"{where}{len(relevant)} label flip{'s' * (len(relevant) != 1)}{why}"
    outcome = Outcome.FAIL if faults else Outcome.PASS
    return Finding("label flips", outcome, message * bool(relevant), widest, limit, "RMS logits")


def check_batch_invariance(alone: Array, together: Array, floor: Limit, batch: int) -> Finding:
    """Return whether the logits ``(N, K)`` of images in a batch are those of single images.

    The limit is the floor of the class, or :data:`BATCH_INVARIANCE_DB` if that is higher.
    """
    limit = max(floor, Limit(BATCH_INVARIANCE_DB, "floor for any class"))
    value = worst_row_sqnr_db(alone, together)
    return check_minimum("batch invariance", value, limit, where=f"batch {batch}: ")


# --- accuracy --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """Accuracy loss of an artifact against PyTorch on the same images, in points (percent).

    Attributes:
        images: number of images.
        loss: of top-1 or F1; negative if the artifact is better.
        interval: 95 % interval of the loss.
        lost: images that only PyTorch classifies correctly; None for F1.
        won: images that only the artifact classifies correctly; None for F1.
        p_value: McNemar's exact test, reported without a limit.
    """

    images: int
    loss: float
    interval: Interval
    lost: int | None = None
    won: int | None = None
    p_value: float | None = None


def paired_loss(lost: int, won: int, images: int) -> Loss:
    """Return the loss with Tango's score interval; without images that is -100 to 100 points."""
    low, high = tango_interval(lost, won, images)
    loss = 100 * (lost - won) / images if images else math.nan
    return Loss(images, loss, (100 * low, 100 * high), lost, won, mcnemar_exact(lost, won))


def is_at_chance(correct: int, images: int, classes: int) -> bool:
    """Return whether ``correct`` of ``images`` labels do not show a top-1 above chance.

    The lower end of Wilson's interval is then at most one in ``classes``, or in two.
    """
    return wilson_interval(correct, images)[0] <= 1 / max(classes, 2)


def check_loss(
    loss: Loss,
    allowed: Limit,
    metric: str = "top-1",
    lossy: bool = True,
    option: str = "",
    at_chance: bool = False,
) -> Finding:
    """Return the result of the non-inferiority test of an artifact's accuracy.

    PASS if the upper end of the interval is within the allowed loss, FAIL if the lower end is
    beyond it, else INCONCLUSIVE. Artifacts of classes that are not lossy PASS unless they FAIL.
    With ``at_chance`` PyTorch's own accuracy is not shown to be above chance. Then the labels may
    be wrong, such as those of another class order, and no loss is evidence for a PASS.
    """
    low, high = loss.interval
    message = f"{low:+.2f} to {high:+.2f} pp of {metric} lost on {loss.images} images"
    message += f", {allowed.value:g} allowed ({allowed.origin})"
    outcome = Outcome.FAIL if low > allowed.value else Outcome.PASS
    if lossy and at_chance and low <= allowed.value:
        outcome = Outcome.INCONCLUSIVE
        check = f"check labels{', --class-order' * (metric != 'F1')}"
        message += f"; PyTorch's {metric} is not shown to be above chance: {check}"
    elif lossy and low <= allowed.value < high:
        outcome = Outcome.INCONCLUSIVE
        needed = images_to_decide(loss, allowed.value)
        message += (
            f"; {f'about {needed} images' if needed else 'no number of images'} would decide at "
            f"this rate of label flips: give more images, or allow more with "
            f"{option or 'top1_loss in the [gates] of a recipe'}"
        )
    return Finding(f"Δ{metric}", outcome, message, loss.loss, allowed, "pp")


def check_near_lossless(
    sqnr: float, floor: Limit, flips: Sequence[Flip], task: Task = Task.SINGLE_LABEL
) -> list[Finding]:
    """Return the findings on a near-lossless artifact's logits on the evaluation set.

    The SQNR must reach the floor, and noise *at the floor* must explain all label flips (the
    artifact's own error explains any flip).

    Args:
        sqnr: of the logits on the evaluation set, in dB.
        floor: from :func:`sqnr_floor`.
        flips: on the evaluation set, from :func:`van_deploy.metrics.find_flips`.
        task: how logits become labels.
    """
    return [check_minimum("SQNR", sqnr, floor), check_flips(flips, floor, task)]


def images_to_decide(loss: Loss, allowed: float) -> int | None:
    """Return how many images would decide at the same rate of label flips.

    None if no number would: the loss equals the allowed loss.
    """
    lost, won, total = loss.lost, loss.won, loss.images
    if not total:
        return None

    def decides(images: int) -> bool:
        share, unseen = images / total, unseen_share(total)
        if lost is not None and won is not None:
            low, high = (100 * end for end in tango_interval(lost * share, won * share, images))
        else:  # F1: what no image showed shrinks with the number of images, the rest with its root
            less, parts = unseen_share(images) / unseen, [end - loss.loss for end in loss.interval]
            seen = [abs(part) > 100.001 * unseen for part in parts]
            factors = [share**-0.5 if one else less for one in seen]
            low, high = (loss.loss + p * f for p, f in zip(parts, factors, strict=True))
        return high <= allowed or low > allowed

    counts = range(loss.images, MAX_IMAGES_TO_DECIDE)
    index = bisect_left(counts, True, key=decides)
    return counts[index] if index < len(counts) else None

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

The rules that apply the limits are pure functions. Nothing heavier than NumPy is imported:
whoever makes an artifact may ask them.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from van_deploy.config import GateProfile
from van_deploy.intervals import Interval, mcnemar_exact, tango_interval
from van_deploy.metrics import Array, Flip, Task, find_flips, sqnr_db, worst_row_sqnr_db

# ``fp32`` may be so much noisier than PyTorch's own float32 against its float64: another order of
# summation, on another processor, costs 3 to 17 dB on trained VANs (docs/gates.md).
NOISE_MARGIN_DB = 20.0

# 20 log10(2^24). Noise below float32's own roundoff is luck, and no reason to ask for more.
ROUNDOFF_DB = 144.5

# Below this an artifact is broken, whatever the network and the class.
MIN_SQNR_DB = 20.0


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
        lossy: labels may change by chance on many images, so that only counting images can
            show how much is lost. In the other classes the logits decide.
    """

    sqnr_db: float
    module_db: float
    top1_loss: float
    lossy: bool = False


CLASSES: Mapping[str, ClassLimits] = {
    "fp32": ClassLimits(MIN_SQNR_DB, 100.0, 0.0),
    # A 10-bit mantissa, as fp16's. Right ones on an H200: 58 to 63 dB (docs/gpu-results.md).
    "tf32": ClassLimits(50.0, 45.0, 0.2),
    "fp16": ClassLimits(45.0, 52.0, 0.2),
    "bf16": ClassLimits(30.0, 34.0, 0.5, lossy=True),
    "int8": ClassLimits(MIN_SQNR_DB, 8.0, 1.0, lossy=True),
}
LOSSY = tuple(name for name, limits in CLASSES.items() if limits.lossy)

# How far below the SQNR recorded when it was made an artifact may be, on the same samples, in the
# same runtime, provider and numeric class. It catches a file that changed after it was made.
RECORD_MARGIN_DB = 3.0

# Whatever the class, an image in a batch is the same image: at most 5 % of the logits' RMS.
BATCH_INVARIANCE_DB = 26.0

# One image may have ten times the mean noise power that is allowed.
WORST_IMAGE_MARGIN_DB = 10.0

# A label flip is explained where PyTorch's margin is within so many standard deviations of the
# noise that the class allows: one in 30,000 is beyond by chance.
FLIP_SIGMAS = 4.0

# Share of images that another processor or build may decide otherwise: near-ties.
CHANCE_FLIPS = 1 / 2000


# What the activation scales of one calibration method may be over the best ones: expected of the
# median over the tensors, and the largest of any. The best scale of a tensor is the one with the
# least squared error on the golden images. Measured on the shared van_b0 with golden images of its
# own kind and with photographs (docs/gates.md has the medians and the extremes). A method that is
# not known is held to ``mse``.
SCALE_BOUNDS: Mapping[str, tuple[float, float]] = {
    "mse": (1.0, 3.0),
    "percentile": (1.15, 3.5),
    "minmax": (1.5, 4.5),
}

# The smallest such ratio of any tensor.
MIN_SCALE_RATIO = 1 / 3

# The least ratio of unsigned activations (graphs for CPUs). The best scale is sought with the
# zero-point as it is, the quantiser moves both ends: its right scales reach down to 0.22 on the
# shared van_b0 with photographs and to 0.29 on van_digits with its own kind of images.
MIN_UNSIGNED_SCALE_RATIO = 0.15

# Share of a speed ratio that may be lost between a baseline and now.
SPEED_TOLERANCE = 0.1

# Share of a median ratio that its interval should be within; rounds go on until it is.
SPEED_INTERVAL_WIDTH = 0.02

# The median may be off its centre by this factor either way: half way to a doubled scale.
SCALE_MEDIAN_FACTOR = 1.4

# At most this share of the scales may be off the median by more than this factor. Right ones: 0 to
# 9 %; ranges of another layer: 22 % and more.
SCALE_SPREAD = (2.0, 0.15)

# The same for unsigned activations: right ones 11 % (van_digits) and 15 % (the shared van_b0).
UNSIGNED_SPREAD = (2.0, 0.22)

# A channel whose largest weight is an integer below this wastes an eighth of them or more; right
# scales make it 125 to 127.
MIN_LARGEST_CODE = 112

# So many integers of a channel, or that share of them, may be at the end of the range.
MAX_SATURATED = (4, 0.03)


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
class AllowOptions:
    """What the user lets pass that no PASS was shown of.

    Attributes:
        skip: kinds of skips, as :attr:`Finding.skip`.
        inconclusive: whether what the data cannot decide is let pass.
    """

    skip: tuple[str, ...] = ()
    inconclusive: bool = False

    def accepts(self, finding: Finding) -> bool:
        """Return whether a finding stands in nobody's way."""
        let = {Outcome.SKIPPED: finding.skip in self.skip, Outcome.INCONCLUSIVE: self.inconclusive}
        return let.get(finding.outcome, finding.outcome is Outcome.PASS)


class GateReport:
    """Findings that a command ends by.

    Attributes:
        allowed: what the user lets pass.
    """

    allowed: AllowOptions

    def named_findings(self) -> list[tuple[str, Finding]]:
        """Return every finding and what it is about."""
        raise NotImplementedError

    @property
    def passed(self) -> bool:
        """Whether a command ends with 0: something ran, and nothing stands in the way."""
        found = [finding for _, finding in self.named_findings()]
        ran = any(finding.outcome is not Outcome.SKIPPED for finding in found)
        return ran and all(self.allowed.accepts(finding) for finding in found)

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


# A recipe that sets nothing.
DEFAULT = GateProfile()

# Levels of 255 by which an image that is read and resized here may differ.
RESIZE_LIMIT = Limit(1, "what another build of Pillow may resize otherwise")

# Beyond this a number of images is no advice.
MAX_IMAGES_TO_DECIDE = 10**8

# Messages that are shown of several findings together.
SHOWN = 4


def outcome_of(findings: Iterable[Finding]) -> Outcome:
    """Return what several findings say together: the worst of them; SKIPPED for none."""
    found = {finding.outcome for finding in findings}
    order = (Outcome.FAIL, Outcome.INCONCLUSIVE, Outcome.PASS)
    return next((outcome for outcome in order if outcome in found), Outcome.SKIPPED)


class CheckResult:
    """What was found of one artifact.

    Attributes:
        findings: one a rule.
    """

    JSON_PROPERTIES: ClassVar[tuple[str, ...]] = ("outcome",)

    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> Outcome:
        """What all findings say together."""
        return outcome_of(self.findings)

    @property
    def reason(self) -> str:
        """Why they do not pass: the messages of what decides; "" where they do."""
        said = [f.message for f in self.findings if f.outcome is self.outcome and f.message]
        more = [f"and {len(said) - SHOWN} more"] * (len(said) > SHOWN)
        return "" if self.outcome is Outcome.PASS else "; ".join([*said[:SHOWN], *more])


def pass_or_fail(
    rule: str, fault: str, value: float | None = None, limit: Limit | None = None, shown: str = ""
) -> Finding:
    """Return a rule that was applied: PASS, and what was ``shown``, or FAIL where there is a fault.

    The other arguments are those of :class:`Finding`.
    """
    outcome = Outcome.FAIL if fault else Outcome.PASS
    return Finding(rule, outcome, fault or shown, value, limit)


def skipped_finding(rule: str, message: str, kind: str = "") -> Finding:
    """Return a rule that was not applied; ``kind`` as :attr:`Finding.skip`."""
    return Finding(rule, Outcome.SKIPPED, message, skip=kind)


def check_minimum(
    rule: str, value: float, limit: Limit, unit: str = "dB", where: str = ""
) -> Finding:
    """Return whether ``value`` is at least the limit; NaN is not."""
    said = f"{where}{rule} {value:.1f} {unit} is below {limit.value:.1f} {unit} ({limit.origin})"
    outcome, fault = (Outcome.PASS, "") if value >= limit.value else (Outcome.FAIL, said)
    return Finding(rule, outcome, fault, value, limit, unit)


# --- limits ----------------------------------------------------------------------------------


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
        value = max(own - NOISE_MARGIN_DB, value)
        origin = f"PyTorch's own float32 noise, {own:.1f} dB, minus {NOISE_MARGIN_DB:g}"
    return _unless_set(profile.sqnr_db, numeric, value, origin)


def module_floor(numeric: str, profile: GateProfile = DEFAULT) -> Limit:
    """Return the least isolated SQNR of any module."""
    origin = f"floor for one module of {numeric}"
    return _unless_set(profile.module_db, numeric, CLASSES[numeric].module_db, origin)


def allowed_loss(numeric: str, profile: GateProfile = DEFAULT) -> Limit:
    """Return the points of top-1 that may be lost."""
    origin = f"allowed for {numeric}"
    return _unless_set(profile.top1_loss, numeric, CLASSES[numeric].top1_loss, origin)


def _unless_set(own: float | None, numeric: str, value: float, origin: str) -> Limit:
    return Limit(value, origin) if own is None else Limit(own, f"recipe [gates.{numeric}]")


def flip_margin(floor_db: float, task: Task = Task.SINGLE_LABEL) -> float:
    """Return the margin, in RMS logits, up to which noise at the floor explains a label flip.

    Between two logits the noise is that of a difference; a single logit that is compared with
    0 has its own alone.
    """
    pair = math.sqrt(2) if task is Task.SINGLE_LABEL else 1.0
    return FLIP_SIGMAS * pair * 10 ** (-floor_db / 20)


def chance_label_changes(images: int) -> int:
    """Return how many of ``images`` labels may differ between two runs of the same artifact.

    Near-ties: their expected number and two standard deviations, and never less than one.

    >>> chance_label_changes(200), chance_label_changes(2000), chance_label_changes(50_000)
    (1, 3, 35)
    """
    expected = images * CHANCE_FLIPS
    return max(1, math.floor(expected + 2 * math.sqrt(expected)))


# --- logits ----------------------------------------------------------------------------------


def check_logits(
    expected: Array,
    found: Array,
    floor: Limit,
    recorded_db: float | None = None,
    task: Task = Task.SINGLE_LABEL,
    where: str = "",
) -> tuple[list[Finding], list[Flip]]:
    """Return the findings on logits ``(N, K)``, and every label flip, the widest margin first.

    Args:
        expected: PyTorch's, float64.
        found: the artifact's for the same images.
        floor: from :func:`sqnr_floor`.
        recorded_db: SQNR of the same artifact on the same samples in the same runtime, provider
            and numeric class when it was made; None where there is no such record.
        task: how logits become labels.
        where: put before the messages, such as ``batch 8: ``.
    """
    if found.shape != expected.shape:
        message = f"the output has shape {found.shape} where PyTorch's has {expected.shape}"
        return [pass_or_fail("shape", where + message)], []
    least = floor
    if recorded_db is not None:
        origin = f"{recorded_db:.1f} dB recorded when it was made, minus {RECORD_MARGIN_DB:g}"
        own = Limit(min(recorded_db, ROUNDOFF_DB) - RECORD_MARGIN_DB, origin)
        least = max(floor, own, key=lambda each: each.value)
    of_worst = f"{WORST_IMAGE_MARGIN_DB:g} dB below the SQNR's limit"
    worst, worst_limit = worst_row_sqnr_db(expected, found), floor.value - WORST_IMAGE_MARGIN_DB
    flips = find_flips(expected, found, task, flip_margin(floor.value, task))
    return [
        check_minimum("SQNR", sqnr_db(expected, found), least, where=where),
        check_minimum("worst image", worst, Limit(worst_limit, of_worst), where=where),
        _explained(flips, floor, task, where),
    ], flips


def _explained(flips: Sequence[Flip], floor: Limit, task: Task, where: str = "") -> Finding:
    """Return whether noise at the floor explains every label flip, the widest margin first."""
    limit = Limit(flip_margin(floor.value, task), f"noise at {floor.value:.1f} dB")
    faults = [flip for flip in flips if flip.fault]
    told, outcome = faults or flips, Outcome.FAIL if faults else Outcome.PASS
    widest = told[0].margin if told else 0.0
    said = f"{where}{len(told)} label flip{'s' * (len(told) != 1)}"
    why = f"where PyTorch's margin is up to {widest:.2g} RMS logits; {limit.origin} explains"
    said += f" {why} {limit.value:.2g}" if faults else ", within what the allowed noise explains"
    return Finding("label flips", outcome, said * bool(told), widest, limit, "RMS logits")


def check_batch_invariance(alone: Array, together: Array, floor: Limit, batch: int) -> Finding:
    """Return whether each image comes out of a batch as it does alone, both ``(N, K)``.

    The limit is the class's floor, or :data:`BATCH_INVARIANCE_DB` where that asks for more.
    """
    of_any = Limit(BATCH_INVARIANCE_DB, "floor for any class")
    limit = max(floor, of_any, key=lambda each: each.value)
    value = worst_row_sqnr_db(alone, together)
    return check_minimum("batch invariance", value, limit, where=f"batch {batch}: ")


# --- accuracy --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """What an artifact lost against PyTorch on the same images, in points (percent).

    Attributes:
        images: both answered.
        loss: of top-1 or of another share; negative where the artifact is better.
        interval: its 95 % interval.
        lost: images only PyTorch gets right; None where that is not what is counted.
        won: images only the artifact gets right; likewise.
        p_value: McNemar's exact test; reported, and no gate.
    """

    images: int
    loss: float
    interval: Interval
    lost: int | None = None
    won: int | None = None
    p_value: float | None = None


def paired_loss(lost: int, won: int, images: int) -> Loss:
    """Return the loss with Tango's score interval; without images everything is possible."""
    low, high = tango_interval(lost, won, images)
    loss = 100 * (lost - won) / images if images else math.nan
    return Loss(images, loss, (100 * low, 100 * high), lost, won, mcnemar_exact(lost, won))


def accuracy_metric(task: Task) -> str:
    """Return the share that is lost."""
    return "F1" if task is Task.MULTI_LABEL else "top-1"


def check_loss(loss: Loss, allowed: Limit, what: str = "top-1", lossy: bool = True) -> Finding:
    """Return whether a lossy artifact is shown to lose no more than is allowed.

    Non-inferiority: PASS if the interval's upper end is within the allowed loss, FAIL if its
    lower end is beyond, else INCONCLUSIVE. What is not lossy passes unless it FAILs.
    """
    low, high = loss.interval
    said = f"{low:+.2f} to {high:+.2f} pp of {what} lost on {loss.images} images"
    said = f"{said}, {allowed.value:g} allowed ({allowed.origin})"
    outcome = Outcome.FAIL if low > allowed.value else Outcome.PASS
    if lossy and low <= allowed.value < high:
        outcome = Outcome.INCONCLUSIVE
        needed = images_to_decide(loss, allowed.value)
        said += (
            f"; {f'about {needed} images' if needed else 'no number of images'} would decide at "
            "this rate of label flips: give more images, allow a larger top1_loss in the recipe, "
            "or pass --allow-inconclusive"
        )
    return Finding(f"Δ{what}", outcome, said, loss.loss, allowed, "pp")


def check_near_lossless(
    loss: Loss, allowed: Limit, sqnr: float, floor: Limit, flips: Sequence[Flip], task: Task
) -> list[Finding]:
    """Return whether a near-lossless artifact's numbers hold on the evaluation set.

    The logits must hold the floor, no label may flip beyond what noise *at the floor* explains
    (any flip is explained by an artifact's own error), and the loss must not be shown to exceed
    what is allowed.

    Args:
        loss: on the evaluation set.
        allowed: from :func:`allowed_loss`.
        sqnr: of the logits on the evaluation set, in dB.
        floor: from :func:`sqnr_floor`.
        flips: of the evaluation set, from :func:`van_deploy.metrics.find_flips`.
        task: how logits become labels.
    """
    lost = check_loss(loss, allowed, accuracy_metric(task), lossy=False)
    return [check_minimum("SQNR", sqnr, floor), _explained(flips, floor, task), lost]


def images_to_decide(loss: Loss, allowed: float) -> int | None:
    """Return how many images would decide if labels went on flipping at the same rate.

    None where no number would: the loss is the allowed one, or no pairs were counted.
    """
    lost, won = loss.lost, loss.won
    if not loss.images or lost is None or won is None:
        return None

    def decides(images: int) -> bool:
        share = images / loss.images
        low, high = tango_interval(lost * share, won * share, images)
        return 100 * high <= allowed or 100 * low > allowed

    tried = range(loss.images, MAX_IMAGES_TO_DECIDE)
    place = bisect_left(tried, True, key=decides)
    return tried[place] if place < len(tried) else None

"""What can be asked of a quantisation, and which requests contradict themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from van_deploy.errors import UsageError
from van_deploy.precision.cpu import CPU_SCOPE
from van_deploy.precision.equalize import EqualizeSettings
from van_deploy.precision.refine_settings import RefineSettings
from van_deploy.precision.scales import DEFAULT_PERCENTILE, Method

__all__ = ["AUTO", "METHODS", "TARGETS", "QuantizeSettings"]

AUTO = "auto"
METHODS = (*(method.value for method in Method), AUTO)
TARGETS = ("tensorrt", "cpu")


@dataclass(frozen=True)
class QuantizeSettings:
    """What is asked of a quantisation; everything but the bundle and the images.

    Attributes:
        precision: ``fp16`` or ``int8``.
        target: ``tensorrt`` or ``cpu``; the fast INT8 graphs differ.
        method: a :class:`~van_deploy.precision.scales.Method`, or ``auto``.
        percentile: for the method of that name, 0..1.
        scope: ``pointwise``, ``deep``, ``all``, or regular expressions over module names; ""
            for the target's own default.
        rest: what is not INT8: ``fp16`` or ``fp32``; "" for the target's own default.
        keep: modules that stay FP32, besides those of ``DEFAULT_KEEP``.
        keep_defaults: whether ``DEFAULT_KEEP`` stays FP32.
        half_io: make the graph's input and output FP16.
        strict: refuse where FP16 cannot hold a tensor, instead of keeping it FP32.
        noise: calibrate on noise; only ever on explicit request.
        equalize: exact changes of the weights before the ranges are recorded, or None.
        refine: improvements of the plan against the network's own answers, or
            None; for a CPU without gradient descent, which knows TensorRT's rounding.
        max_drop: largest loss in percentage points of top-1 (of agreement without
            labels); the layers that cost more stay in higher precision. None
            quantises the whole scope.
        evaluations: most plans a search for ``max_drop`` may try.
        threads: of ONNX Runtime; None lets it choose.
    """

    precision: str = "int8"
    target: str = "tensorrt"
    method: str = Method.MSE.value
    percentile: float = DEFAULT_PERCENTILE
    scope: tuple[str, ...] = ()
    rest: str = ""
    keep: tuple[str, ...] = ()
    keep_defaults: bool = True
    half_io: bool = False
    strict: bool = False
    noise: bool = False
    equalize: EqualizeSettings | None = field(default_factory=EqualizeSettings)
    refine: RefineSettings | None = field(default_factory=RefineSettings)
    max_drop: float | None = None
    evaluations: int = 16
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        _one_of("precision", self.precision, ("fp16", "int8"))
        _one_of("target", self.target, TARGETS)
        _one_of("method", self.method, METHODS)
        _one_of("rest", self.rest, ("", "fp16", "fp32"))
        if not 0.5 < self.percentile <= 1:
            raise UsageError(
                f"The percentile {100 * self.percentile:g} % is outside (50, 100].",
                "99.999 is usual.",
            )
        if self.precision == "fp16" and (self.max_drop is not None or self.noise):
            raise UsageError(
                "--max-drop and --calibrate-on-noise are for INT8; FP16 was asked for.",
                "Add --precision int8, or leave them out.",
            )
        if self.target == "cpu":
            self._refuse_for_cpu()

    def _refuse_for_cpu(self) -> None:
        if self.precision == "fp16":
            raise UsageError(
                "FP16 makes no sense for --target cpu: ONNX Runtime's CPU kernels cast it to "
                "FP32 and back around every operator.",
                "Use --precision int8 --target cpu, or leave the graph in FP32.",
            )
        if self.rest == "fp16" or self.half_io:
            raise UsageError(
                "--target cpu keeps what is not INT8 in FP32: a CPU casts FP16 at every operator.",
                "Leave out --rest fp16 and --half-io.",
            )

    @property
    def equalize_for_target(self) -> EqualizeSettings | None:
        """The exact changes; on a CPU without those that add operators."""
        if self.equalize is None or self.target == "tensorrt":
            return self.equalize
        return replace(self.equalize, shift=False, stretch=False)

    @property
    def refine_for_target(self) -> RefineSettings | None:
        """The improvements; on a CPU without gradient descent, which knows another rounding."""
        if self.refine is None or self.target == "tensorrt":
            return self.refine
        return replace(self.refine, scales=False, biases=False, turns=False)

    @property
    def rest_precision(self) -> str:
        """What is not INT8 becomes this."""
        return self.rest or ("fp32" if self.target == "cpu" else "fp16")

    @property
    def scope_asked(self) -> str | tuple[str, ...]:
        """The scope, the target's default included."""
        if not self.scope:
            return CPU_SCOPE if self.target == "cpu" else "pointwise"
        return self.scope[0] if len(self.scope) == 1 else self.scope

    @property
    def artefact(self) -> str:
        """What the result is called in the bundle."""
        return "int8-cpu" if self.target == "cpu" else self.precision


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(
            f"There is no {name} called '{value}'.", f"Known: {', '.join(filter(None, known))}."
        )

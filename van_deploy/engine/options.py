"""What can be asked of an engine build, as plain data, and how people write it."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from van_deploy.errors import UsageError
from van_deploy.recipe import BatchRange

__all__ = [
    "BuildOptions",
    "HardwareCompatibility",
    "Profiling",
    "parse_size",
    "parse_target",
    "parse_targets",
]

MAX_OPTIMIZATION_LEVEL = 5
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{u}{s}": 1024**p for p, u in enumerate("kmgt", 1) for s in ("ib", "b", "")},
}


class HardwareCompatibility(str, enum.Enum):
    """Which other GPUs a plan of TensorRT is made for. TensorRT's own names."""

    NONE = "none"
    AMPERE_PLUS = "ampere-plus"
    SAME_COMPUTE_CAPABILITY = "same-compute-capability"


class Profiling(str, enum.Enum):
    """How much of itself a plan can tell afterwards. TensorRT's own names."""

    NONE = "none"
    LAYER_NAMES_ONLY = "layer-names-only"
    DETAILED = "detailed"


@dataclass(frozen=True)
class BuildOptions:
    """Everything that decides what is in a plan, besides the ONNX file and the back end.

    Attributes:
        profiles: batch sizes to be served; TensorRT optimises for each ``opt``.
        targets: compute capabilities such as ``sm_89``, all served by this one
            plan; empty for the GPU in this machine.
        hardware_compatibility: which other GPUs may load the plan.
        version_compatible: let later versions of TensorRT load the plan.
        workspace_bytes: scratch memory on the GPU a layer may use; None for the
            back end's own limit, which is all there is.
        optimization_level: 0 to 5, how long to look for fast kernels; None for
            the back end's own, which is 3.
        tf32: let FP32 convolutions round their inputs to TF32, as TensorRT does
            by default. It changes nothing about FP16 and INT8 layers.
        strip_weights: leave the weights out of the plan; it must be refitted.
        refit: let the weights be replaced without a rebuild.
        profiling: how much the engine inspector can tell.
    """

    profiles: tuple[BatchRange, ...] = (BatchRange(),)
    targets: tuple[str, ...] = ()
    hardware_compatibility: HardwareCompatibility = HardwareCompatibility.NONE
    version_compatible: bool = False
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    tf32: bool = True
    strip_weights: bool = False
    refit: bool = False
    profiling: Profiling = Profiling.LAYER_NAMES_ONLY

    def __post_init__(self) -> None:
        """Refuse what no back end could do.

        Raises:
            UsageError: there is no profile, or a number is out of its range.
        """
        if not self.profiles:
            raise UsageError("No batch profile is asked for.", "Give one, such as --batch 1:8:32.")
        level = self.optimization_level
        if level is not None and not 0 <= level <= MAX_OPTIMIZATION_LEVEL:
            raise UsageError(
                f"There is no optimization level {level}.",
                f"Choose one from 0 (fast build) to {MAX_OPTIMIZATION_LEVEL} (fast engine).",
            )
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise UsageError(
                f"A workspace of {self.workspace_bytes} bytes is none.",
                "Give a size such as --workspace 4GiB, or leave the option out.",
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON has them; :meth:`from_dict` reads them back."""
        plain = asdict(self)
        plain["profiles"] = [str(profile) for profile in self.profiles]
        plain["targets"] = list(self.targets)
        plain["hardware_compatibility"] = self.hardware_compatibility.value
        plain["profiling"] = self.profiling.value
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> BuildOptions:
        """Return the options that :meth:`as_dict` wrote.

        >>> BuildOptions.from_dict(BuildOptions(targets=("sm_89",)).as_dict()).targets
        ('sm_89',)
        """
        return cls(
            **{
                **plain,
                "profiles": tuple(BatchRange.parse(text) for text in plain["profiles"]),
                "targets": tuple(plain["targets"]),
                "hardware_compatibility": HardwareCompatibility(plain["hardware_compatibility"]),
                "profiling": Profiling(plain["profiling"]),
            }
        )


def parse_size(text: str) -> int:
    """Return a size in bytes as people write it; units are binary, ``4GiB`` and ``4G`` alike.

    Raises:
        UsageError: it is not a size.

    >>> parse_size("4GiB"), parse_size("512 MB"), parse_size("1024")
    (4294967296, 536870912, 1024)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"'{text}' is not a size.", "Write a number and a unit, such as 4GiB.")
    return int(float(match[1]) * unit)


def parse_target(text: str) -> str:
    """Return a compute capability as this program spells it.

    Raises:
        UsageError: it is not one.

    >>> parse_target("SM89"), parse_target("8.9"), parse_target("sm_120")
    ('sm_89', 'sm_89', 'sm_120')
    """
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip().lower())
    if match is None:
        raise UsageError(
            f"'{text}' is not a target.",
            "Write compute capabilities such as sm_89; several with commas: sm_86,sm_89.",
        )
    return f"sm_{match[1]}{match[2]}"


def parse_targets(text: str) -> tuple[tuple[str, ...], ...]:
    """Return the targets of each plan to build.

    Commas separate plans; ``+`` joins GPUs that one plan serves.

    Raises:
        UsageError: one of them is not a target, or is named twice.

    >>> parse_targets("sm_86,sm_89")
    (('sm_86',), ('sm_89',))
    >>> parse_targets("sm_86+sm_89")
    (('sm_86', 'sm_89'),)
    """
    plans = tuple(
        tuple(sorted({parse_target(name) for name in plan.split("+")}, key=_number))
        for plan in text.split(",")
    )
    if len(set(plans)) != len(plans):
        raise UsageError(f"'{text}' names a target twice.", "Name each once.")
    return plans


def _number(target: str) -> int:
    return int(target.removeprefix("sm_"))

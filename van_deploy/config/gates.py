"""What an artefact must reach: the table ``[gates]``."""

from __future__ import annotations

from van_deploy.config.fields import option
from van_deploy.schema import Settings


class GateProfile(Settings):
    """What an artefact of one numeric class must reach. Table ``[gates.fp32]`` and its like.

    A limit that is left out is that of :mod:`van_deploy.checks.gates` (see ``docs/gates.md``).
    """

    sqnr_db: float | None = option(None, "Least SQNR of the logits, in dB.")
    module_db: float | None = option(None, "Least isolated SQNR of any module, in dB.")
    top1_loss: float | None = option(
        None, "Points of top-1 (percent) that may be lost on labelled images.", ge=0, le=100
    )


class GateSettings(Settings):
    """What differs from the built-in limits, by numeric class. Table ``[gates]``."""

    fp32: GateProfile = option(GateProfile, "Limits of FP32 artefacts.")
    tf32: GateProfile = option(GateProfile, "Limits of FP32 artefacts that compute in TF32.")
    fp16: GateProfile = option(GateProfile, "Limits of FP16 artefacts.")
    bf16: GateProfile = option(GateProfile, "Limits of BF16 artefacts.")
    int8: GateProfile = option(GateProfile, "Limits of INT8 artefacts.")

    def of(self, numeric: str) -> GateProfile:
        """Return the profile of a numeric class."""
        profile: GateProfile = getattr(self, numeric)
        return profile

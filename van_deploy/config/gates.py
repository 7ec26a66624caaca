"""What an artefact must reach: the table ``[gates]``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from van_deploy.config.fields import option
from van_deploy.errors import UsageError
from van_deploy.schema import Settings

__all__ = ["GateProfile", "GateSettings", "default_gates"]


class GateProfile(Settings):
    """What an artefact of one precision must reach. Table ``[gates.fp32]`` and its like.

    A limit that is left out is derived, in the run that applies it, from
    PyTorch's own float32 noise (see ``docs/gates.md``).
    """

    margin_db: float | None = option(
        None, "Room below the noise expected at this precision, in dB."
    )
    sqnr_db: float | None = option(None, "Least signal to noise ratio of the logits, in dB.")
    relative: float | None = option(None, "Largest `max|difference| / max|logit|`.")
    cosine: float | None = option(None, "Least cosine similarity of any image.")
    kl: float | None = option(None, "Largest mean divergence of the softmax, in nats.")
    row_relative: float | None = option(
        None, "Largest difference of an image alone and in a batch, over `max|logit|`."
    )
    flip_margin: float | None = option(
        None,
        "A changed prediction is a fault where PyTorch's first logit was ahead of its second by "
        "more than this many RMS logits.",
    )
    module_db: float | None = option(
        None, "Least signal to noise ratio that any module adds by itself, in dB."
    )
    top1_drop: float | None = option(
        None, "Most points of top-1 (percent) that may be lost on labelled images."
    )


@cache
def default_gates() -> Mapping[str, GateProfile]:
    """Return the limits by precision, set on measured networks: ``docs/gates.md`` has them."""
    return {
        "fp32": GateProfile(margin_db=20.0, module_db=100.0, top1_drop=0.1),
        "fp16": GateProfile(margin_db=3.0, module_db=52.0, top1_drop=0.2),
        "int8": GateProfile(margin_db=25.0, module_db=8.0, top1_drop=1.0),
    }


class GateSettings(Settings):
    """What differs from :func:`default_gates`, by precision. Table ``[gates]``."""

    fp32: GateProfile = option(GateProfile, "Limits of FP32 artefacts.")
    fp16: GateProfile = option(GateProfile, "Limits of FP16 artefacts.")
    int8: GateProfile = option(GateProfile, "Limits of INT8 artefacts.")

    def of(self, precision: str) -> GateProfile:
        """Return the profile of ``fp32``, ``fp16`` or ``int8``, defaults filled in.

        Raises:
            UsageError: there is none for that precision.
        """
        known = default_gates()
        if precision not in known:
            raise UsageError(
                f"There are no gates for the precision '{precision}'.",
                f"Known: {', '.join(known)}.",
            )
        given: GateProfile = getattr(self, precision)
        return known[precision].changed(**given.model_dump(exclude_none=True))

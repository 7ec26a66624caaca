"""The ranges a quantisation needs: recorded, or taken from the bundle if nothing changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from van_deploy.bundle import Bundle
from van_deploy.errors import InputError
from van_deploy.files import content_key
from van_deploy.precision.cpu import added_tensors
from van_deploy.precision.initial import nodes_in_scope
from van_deploy.precision.observer import float_tensors
from van_deploy.precision.plan import weighted_nodes
from van_deploy.precision.ranges import Ranges, record_ranges
from van_deploy.precision.ranges_file import ranges_from_file
from van_deploy.precision.settings import QuantizeSettings, scope_asked
from van_deploy.precision.stopwatch import Stopwatch

__all__ = ["changed", "counted_tensors", "ranges_of", "ranges_stem"]

DECIDE = ("weights", "preprocessing", "calibration images", "code", "versions")
"""The ingredients of a quantisation that decide its ranges; the method does not."""

Images = npt.NDArray[np.float32]


def ranges_of(
    bundle: Bundle,
    model: ModelProto,
    settings: QuantizeSettings,
    ingredients: Mapping[str, Any],
    batches: Callable[[], Iterable[Images]],
    watch: Stopwatch,
) -> tuple[Ranges, dict[str, Any]]:
    """Return the ranges of ``model``, and whether and why they were reused.

    Args:
        bundle: whose stored ranges are taken if they were made from the same ingredients.
        model: FP32, equalised or not.
        settings: what is asked.
        ingredients: everything that decides the result of the quantisation.
        batches: the calibration images, normalised ``(N, C, S, S)`` float32.
        watch: told what is being done.
    """
    counted = counted_tensors(model, settings)
    made_with = {
        **{part: ingredients[part] for part in DECIDE},
        "graph": hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(),
        "histograms": content_key({"of": counted}),
    }
    stored, why = _stored(bundle, settings.artefact, made_with)
    facts = {"reused": stored is not None, "reason": why}
    if stored is not None:
        return stored, facts
    watch.begin("Recording ranges")
    found = record_ranges(
        model,
        batches(),
        histograms=counted,
        channels=added_tensors(model) if settings.target == "cpu" else (),
        threads=settings.threads,
    )
    return replace(found, facts=json.loads(json.dumps({"made_with": made_with}))), facts


def counted_tensors(model: ModelProto, settings: QuantizeSettings) -> list[str]:
    """Return the tensors of which every value is counted: those whose scale it may decide.

    For a CPU outputs are quantised as well; FP16 shows the range of all that is weighted.
    """
    if settings.target == "cpu":
        return list(float_tensors(model))
    nodes = weighted_nodes(model)
    wanted = nodes_in_scope(model, scope_asked(settings)) if settings.precision == "int8" else nodes
    return sorted({nodes[name].input[0] for name in wanted})


def ranges_stem(artefact: str) -> str:
    """Return what the files with an artefact's ranges are called, without suffix."""
    return "ranges" if artefact == "int8" else f"ranges.{artefact}"


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the names of the ingredients that differ, with commas; "" if none does."""
    plain = json.loads(json.dumps(now))
    return ", ".join(key for key, value in plain.items() if before.get(key) != value)


def _stored(
    bundle: Bundle, artefact: str, made_with: Mapping[str, Any]
) -> tuple[Ranges | None, str]:
    if artefact not in bundle.artefacts:
        return None, "none were recorded yet"
    try:
        bundle.verified(artefact)
        found = ranges_from_file(bundle.path / f"{ranges_stem(artefact)}.npz")
    except InputError as error:
        return None, error.message
    differs = changed(found.facts["made_with"], made_with)
    return (None, f"changed since: {differs}") if differs else (found, "nothing changed")

"""What was measured when somebody said it was good.

A baseline is a list of figures with a name, a direction and a slack. It is
committed beside the recipe; :mod:`van_deploy.checks.regression` measures the same
figures on the same images and names every row that got worse by more than its slack.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from van_deploy.bundle import Bundle
from van_deploy.checks.figures import Figure
from van_deploy.data import CheckImages
from van_deploy.documents import json_from, text_from
from van_deploy.errors import InputError
from van_deploy.files import write_atomic

__all__ = [
    "SCHEMA",
    "Baseline",
    "baseline_of",
    "images_digest",
    "read_baseline",
    "write_baseline",
]

SCHEMA = "van-deploy/baseline/1"


@dataclass(frozen=True)
class Baseline:
    """Figures that were good once.

    Attributes:
        model: whose they are.
        weights_sha256: of the weights.
        images_sha256: of the pixels that were verified on.
        images: what they were.
        figures: by name.
    """

    model: str
    weights_sha256: str
    images_sha256: str
    images: str
    figures: Mapping[str, Figure]


def baseline_of(bundle: Bundle, pictures: CheckImages, figures: Sequence[Figure]) -> Baseline:
    """Return the baseline that says ``figures`` are good."""
    return Baseline(
        model=bundle.name,
        weights_sha256=bundle.manifest.weights.sha256,
        images_sha256=images_digest(pictures),
        images=pictures.description,
        figures={figure.name: figure for figure in figures},
    )


def images_digest(pictures: CheckImages) -> str:
    """Return the SHA-256 of the images."""
    return hashlib.sha256(pictures.values.tobytes()).hexdigest()


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline as JSON, one figure a line, so that a change shows in a diff."""
    about = {key: value for key, value in vars(baseline).items() if key != "figures"}
    head = json.dumps({"schema": SCHEMA, **about}, indent=2)[:-2]
    lines = [
        f"    {json.dumps(name)}: "
        + json.dumps({key: value for key, value in vars(f).items() if key != "name"})
        for name, f in sorted(baseline.figures.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(lines)
    write_atomic(path, f'{head},\n  "figures": {{\n{body}\n  }}\n}}\n')


def read_baseline(path: Path) -> Baseline:
    """Return the baseline in a file.

    Raises:
        InputError: it cannot be read or is none.
    """
    try:
        values = json_from(text_from(path))
        if values["schema"] != SCHEMA:
            raise InputError(
                f"'{path}' has schema '{values['schema']}'; this version reads '{SCHEMA}'.",
                "Write it anew with --update.",
            )
        figures = {
            name: Figure(
                name,
                float(f["value"]),
                str(f["better"]),
                float(f["slack"]),
                float(f.get("spread", 0.0)),
            )
            for name, f in values["figures"].items()
        }
        return Baseline(
            model=str(values["model"]),
            weights_sha256=str(values["weights_sha256"]),
            images_sha256=str(values["images_sha256"]),
            images=str(values["images"]),
            figures=figures,
        )
    except FileNotFoundError:
        raise InputError(
            f"There is no baseline at '{path}'.",
            "Make one with --update, look at it, and commit it.",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"'{path}' is no baseline: {type(error).__name__}: {error}.",
            "Write it anew with --update.",
        ) from error

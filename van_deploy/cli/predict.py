"""``van-deploy predict``: what a bundle's artefact sees in pictures."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from van_deploy.cli.console import AsJson, emit, json_text, plain, remark, telling
from van_deploy.cli.options import with_options
from van_deploy.cli.shared import BundlePath, RequireSignature, opened
from van_deploy.config import PredictSettings
from van_deploy.errors import ImageError, UsageError

__all__ = ["predict"]

STDIN_LIMIT_BYTES = 256 * 2**20


@with_options
def predict(
    bundle: BundlePath,
    images: Annotated[
        list[str],
        typer.Argument(help="Image files, folders, or '-' for an image on standard input."),
    ],
    settings: PredictSettings,
    require_signature: RequireSignature = None,
    json_lines: Annotated[
        bool, typer.Option("--jsonl", help="Print one JSON object a picture, as they come.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what is in pictures, with the preprocessing that belongs to the weights.

    Example: van-deploy predict dist/van_b1 photo.jpg holiday/ --top-k 3
    """
    if as_json and json_lines:
        raise UsageError("--json and --jsonl exclude each other.", "Give one of them.")
    if images.count("-") > 1:
        raise UsageError("Standard input can be read once.", "Give '-' once.")
    asked = opened(bundle, require_signature)
    wanted = [_stdin() if image == "-" else image for image in images]
    from van_deploy.report.sections_model import predictions_blocks
    from van_deploy.results import Predictions
    from van_deploy.serve.predict import Prediction, Speed

    speed, kept = Speed(), list[Prediction]()
    total = bad = 0
    with telling(f"Loading {settings.artefact}") as tell:
        for answer in asked.stream(wanted, settings, speed=speed, progress=tell):
            total, bad = total + 1, bad + (answer.error is not None)
            if json_lines:
                sys.stdout.write(json_text(plain(answer)) + "\n")
                sys.stdout.flush()
            else:
                kept.append(answer)
    if not json_lines:
        answers = Predictions(asked.path, settings.artefact, speed, tuple(kept))
        emit(answers, as_json, predictions_blocks)
    remark(f"{settings.artefact}: {speed}")
    if bad:
        raise ImageError(
            f"{bad} of {total} pictures could not be read.",
            "Replace these files or leave them out; the others are answered above.",
        )


def _stdin() -> bytes:
    content = sys.stdin.buffer.read(STDIN_LIMIT_BYTES + 1)
    if not content:
        raise ImageError("Standard input is empty.", "Pipe an image file into it.")
    if len(content) > STDIN_LIMIT_BYTES:
        raise ImageError(
            f"Standard input holds more than {STDIN_LIMIT_BYTES // 2**20} MiB.",
            "Give the file's path instead.",
        )
    return content

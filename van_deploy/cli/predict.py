"""``van-deploy predict``: what a bundle's artefact sees in pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from van_deploy.cli.console import AsJson, emit, json_text, plain, progress, remark
from van_deploy.cli.opening import RequireSignature, RunnerName, TrustEngine, open_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from van_deploy.runners.network import Network
    from van_deploy.serve.predict import Prediction

__all__ = ["predict"]

STDIN_LIMIT_BYTES = 256 * 2**20


def predict(
    bundle: Annotated[Path, typer.Argument(help="A bundle made by `van-deploy export`.")],
    images: Annotated[
        list[str],
        typer.Argument(help="Image files, folders, or '-' for an image on standard input."),
    ],
    artefact: Annotated[
        str, typer.Option(help="Which one: fp32, int8, fp32-uint8, pytorch, ...")
    ] = "fp32",
    top_k: Annotated[int, typer.Option(help="Classes a picture.")] = 5,
    batch: Annotated[
        int | None, typer.Option(help="Pictures a batch; the bundle's optimum by default.")
    ] = None,
    runner: RunnerName = "ort-cpu",
    trust_engine: TrustEngine = False,
    require_signature: RequireSignature = None,
    threads: Annotated[
        int | None, typer.Option(help="Processor threads; chosen by the run time by default.")
    ] = None,
    json_lines: Annotated[
        bool, typer.Option("--jsonl", help="Print one JSON object a picture, as they come.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what is in pictures, with the preprocessing that belongs to the weights.

    Example: van-deploy predict dist/van_b1 photo.jpg holiday/ --top-k 3
    """
    from van_deploy.errors import ImageError, UsageError
    from van_deploy.runners.network import Network
    from van_deploy.serve.predict import Speed, sources_from

    if as_json and json_lines:
        raise UsageError("--json and --jsonl exclude each other.", "Give one of them.")
    opened = open_bundle(bundle, require_signature)
    sources = sources_from(images, _stdin() if "-" in images else None)
    speed, bad = Speed(), 0
    size = batch or min(opened.manifest.batch.opt, len(sources))
    answers: list[Prediction] = []
    network = Network(opened, artefact, runner=runner, threads=threads, trust_engine=trust_engine)
    for prediction in _predictions(network, sources, top_k, size, speed):
        bad += prediction.error is not None
        if json_lines:
            sys.stdout.write(json_text(plain(prediction)) + "\n")
            sys.stdout.flush()
        else:
            answers.append(prediction)
    if not json_lines:
        document = {
            "bundle": str(opened.path),
            "artefact": artefact,
            "speed": speed,
            "predictions": answers,
        }
        emit(document, as_json, lambda _: _table(answers))
    remark(f"{artefact}, batch {size}: {speed}")
    if bad:
        raise ImageError(
            f"{bad} of {len(sources)} pictures could not be read.",
            "Replace these files or leave them out; the others are answered above.",
        )


def _predictions(
    network: Network, sources: Any, top_k: int, batch: int, speed: Any
) -> Iterator[Prediction]:
    from van_deploy.serve import predict as library

    with progress() as bar:
        task = bar.add_task(f"Loading {network.name}", total=len(sources))
        with network:
            bar.update(task, description="Looking at pictures")
            for prediction in library.predict(
                network, sources, top=top_k, batch=batch, speed=speed
            ):
                bar.advance(task)
                yield prediction


def _stdin() -> bytes:
    from van_deploy.errors import ImageError

    content = sys.stdin.buffer.read(STDIN_LIMIT_BYTES + 1)
    if not content:
        raise ImageError("Standard input is empty.", "Pipe an image file into it.")
    if len(content) > STDIN_LIMIT_BYTES:
        raise ImageError(
            f"Standard input holds more than {STDIN_LIMIT_BYTES // 2**20} MiB.",
            "Give the file's path instead.",
        )
    return content


def _table(predictions: list[Prediction]) -> RenderableType:
    from van_deploy.report.tables import Column, rows_table, verdict

    rows: list[tuple[object, ...]] = []
    for prediction in predictions:
        if prediction.error:
            rows.append((prediction.source, verdict("FAIL"), None, prediction.error))
            continue
        first, *others = prediction.top
        then = ", ".join(f"{c.name} {c.probability:.1%}" for c in others)
        rows.append((prediction.source, first.name, f"{first.probability:.1%}", then))
    columns = (
        Column("picture", wrap=True),
        Column("class", style="bold"),
        Column("probability", "right"),
        Column("then", wrap=True),
    )
    return rows_table(columns, rows)

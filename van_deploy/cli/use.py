"""What is done with a bundle: timed, asked, packaged, served, signed and reported on."""

from __future__ import annotations

import enum
import ipaddress
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from van_deploy.cli.console import CommandOutput, json_text, print_note, print_result, progress_bar
from van_deploy.cli.options import (
    AsJson,
    BundlePath,
    Opened,
    OptionValues,
    RequireSignature,
    opened,
)
from van_deploy.config import BenchSettings, PackageSettings, PredictSettings, ServeSettings
from van_deploy.documents import plain
from van_deploy.errors import GateFailed, ImageError, UsageError
from van_deploy.stopwatch import no_progress

if TYPE_CHECKING:
    from van_deploy.report.document import Block
    from van_deploy.signing import SignedBundle

STDIN_LIMIT_BYTES = 256 * 2**20


class Server(str, enum.Enum):
    """What a package can be for."""

    TRITON = "triton"


@dataclass(frozen=True)
class Listening:
    """A server that answers.

    Attributes:
        url: where.
        models: what it serves.
    """

    url: str
    models: tuple[str, ...]


def bench(
    bundle: Opened,
    options: Annotated[OptionValues, BenchSettings],
    paper: Annotated[
        str,
        typer.Option(
            "--paper-limits",
            help="Only print the limits on paper of a GPU: l4, a10, a100, h100 ...",
        ),
    ] = "",
    compare: Annotated[
        Path | None, typer.Option(help="An older benchmark's JSON to compare with.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the JSON here, too.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save/--no-save", help="Keep the result in the bundle (bench.json).")
    ] = True,
) -> CommandOutput:
    """Time every artifact in every runtime of a device, each in a process of its own.

    Example: van-deploy bench dist/van_b1 --batches 1,8,32
    """
    from van_deploy.bench.document import compare_reports, read_report
    from van_deploy.report.files import write_text
    from van_deploy.report.sections_bench import bench_blocks, limits_blocks

    if paper:
        from van_deploy.bench.roofline import paper_limits

        return CommandOutput(
            paper_limits(bundle.opened(), paper, options.table.batches), limits_blocks
        )
    old = read_report(compare) if compare else None
    report = bundle.benchmark(save=save, **options)
    if output is not None:
        write_text(output, report.text())
    if old is not None:
        report = compare_reports(old, report)
    return CommandOutput(
        report, bench_blocks, [f"warning: {warning}" for warning in report.warnings]
    )


def predict(
    bundle: BundlePath,
    images: Annotated[
        list[str],
        typer.Argument(help="Image files, folders, or '-' for an image on standard input."),
    ],
    options: Annotated[OptionValues, PredictSettings],
    require_signature: RequireSignature = None,
    json_lines: Annotated[
        bool, typer.Option("--jsonl", help="Print one JSON object an image, as they come.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what is in images, with the preprocessing that belongs to the weights.

    Example: van-deploy predict dist/van_b1 photo.jpg holiday/ --top-k 3
    """
    if as_json and json_lines:
        raise UsageError("--json and --jsonl exclude each other.", "Give one of them.")
    if images.count("-") > 1:
        raise UsageError("Standard input can be read once.", "Give '-' once.")
    wanted = [_stdin() if image == "-" else image for image in images]
    from van_deploy.api import Predictions
    from van_deploy.report.sections_model import predictions_blocks
    from van_deploy.serve.predict import Prediction

    kept, artifact = list[Prediction](), options.table.artifact
    total, bad, start = 0, 0, time.perf_counter()
    with progress_bar(f"Loading {artifact}") as progress:
        asked = opened(bundle, require_signature, progress)
        for answer in asked.stream(wanted, **options):
            total, bad = total + 1, bad + (answer.error is not None)
            if json_lines:
                sys.stdout.write(json_text(plain(answer)) + "\n")
                sys.stdout.flush()
            else:
                kept.append(answer)
    rate = total / (time.perf_counter() - start)
    if not json_lines:
        answers = Predictions(asked.path, artifact, rate, tuple(kept))
        print_result(answers, as_json, predictions_blocks)
    print_note(f"{artifact}: {total} images, {rate:.1f} images/s")
    if bad:
        raise ImageError(
            f"{bad} of {total} images could not be read.",
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


def package(
    server: Annotated[Server, typer.Argument(help="What serves it.")],
    bundle: Opened,
    options: Annotated[OptionValues, PackageSettings],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the package; BUNDLE-triton by default."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; check the package that is there.")
    ] = False,
) -> CommandOutput:
    """Write a Triton model repository with its configuration, client and manifests.

    Example: van-deploy package triton dist/van_b1 --output dist/van_b1-triton
    """
    report = bundle.package(output, only_check=check, **options)
    from van_deploy.report.document import checks_table

    wrote = [f"Wrote {report.files} files to {report.path}."] if report.files else []
    rows = [(finding.outcome, finding.name, finding.detail) for finding in report.findings]
    wrong = ", ".join(name for outcome, name, _ in rows if outcome is False)
    failure = GateFailed(
        f"The package '{report.path}' is not what the bundle says: {wrong}.",
        "Package the bundle again.",
    )
    return CommandOutput(report, lambda _: checks_table(rows), wrote, None if report else failure)


def serve(
    bundle: BundlePath,
    options: Annotated[OptionValues, ServeSettings],
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Answer over HTTP: a web page for images, and the v2 protocol for programs.

    Example: van-deploy serve dist/van_b1 --port 8000
    """
    from van_deploy.report.document import Paragraph
    from van_deploy.serve.app import App, listen, run_server
    from van_deploy.serve.models import Service

    settings = options.table
    with progress_bar("Loading"):
        service = Service(opened(bundle, require_signature, no_progress).opened(), settings)
        app = App(service)
        bound, url = listen(settings.host, settings.port)
    if not ipaddress.ip_address(bound.getsockname()[0]).is_loopback:
        keyless = "" if app.requires_key else ", and nobody is asked for a key"
        print_note(f"note: {settings.host} is reachable from other machines{keyless}")

    def ready(_: object) -> None:
        ready = Listening(url, tuple(service.models))
        said = f"{', '.join(ready.models)} at {ready.url}  (Ctrl-C ends)"
        print_result(ready, as_json, lambda _: [Paragraph(said)])

    run_server(app, bound, ready)
    print_note("Stopped; every request that was begun is answered.")


def sign(
    bundle: BundlePath,
    key: Annotated[
        Path,
        typer.Option(
            help="The private key: Ed25519, a PEM file; VAN_DEPLOY_KEY_PASSWORD opens it if it is "
            "encrypted."
        ),
    ],
) -> CommandOutput:
    """Sign a bundle: its manifest, which names every file with its SHA-256.

    Example: van-deploy sign dist/van_b1 --key release.pem
    """
    from van_deploy.signing import sign_bundle

    signed, notes = sign_bundle(bundle, key), []
    if key.stat().st_mode & 0o077:
        notes = [f"note: others on this machine may read or use '{key}': chmod 600 it"]
    return CommandOutput(signed, lambda _: _signature_facts(signed), notes)


def _signature_facts(signed: SignedBundle) -> list[Block]:
    from van_deploy.report.document import key_values

    return key_values({name.replace("_", " "): value for name, value in plain(signed).items()})


def verify_signature(
    bundle: BundlePath,
    public_key: Annotated[
        Path, typer.Option(help="Of who is to have signed it: Ed25519, a PEM file.")
    ],
) -> CommandOutput:
    """Check a bundle's signature, every file's digest, and that no other file is in it.

    Example: van-deploy verify-signature dist/van_b1 --public-key release.pem.pub
    """
    from van_deploy.report.document import notices
    from van_deploy.signing import open_signed_bundle

    _, signed = open_signed_bundle(bundle, public_key)
    said = f"{signed.files} files are what was signed, and there is no other"
    return CommandOutput(signed, lambda _: [*notices("PASS", [said]), *_signature_facts(signed)])


def report(
    bundle: BundlePath,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The HTML file; report.html in the bundle by default. The Markdown goes beside "
            "it, with the suffix .md.",
        ),
    ] = None,
) -> CommandOutput:
    """Write one self-contained HTML file, and the same as Markdown, about a bundle.

    Example: van-deploy report dist/van_b1
    """
    from van_deploy.report.document import bytes_text, key_values, notices

    written = opened(bundle, None, no_progress).report(output)
    sizes = {f"wrote {path}": bytes_text(size) for path, size in written.sizes.items()}
    said = notices(written.verdict, [written.checks])
    return CommandOutput(written, lambda _: [*said, *key_values(sizes)])

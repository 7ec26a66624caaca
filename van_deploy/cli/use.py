"""Work with a bundle: ``bench``, ``predict``, ``package``, ``serve``, ``sign`` and ``report``."""

from __future__ import annotations

import enum
import ipaddress
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from van_deploy.cli.console import Output, json_text, print_note, print_result, progress_bar
from van_deploy.cli.options import (
    AsJson,
    BundlePath,
    OpenBundle,
    OptionValues,
    RequireSignature,
    load_bundle,
    path,
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
    """Servers that a package can be for."""

    TRITON = "triton"


@dataclass(frozen=True)
class Listening:
    """A server that accepts requests.

    Attributes:
        url: its address.
        models: names of the models.
    """

    url: str
    models: tuple[str, ...]


def bench(
    bundle: OpenBundle,
    options: Annotated[OptionValues, BenchSettings],
    paper: Annotated[
        str,
        typer.Option(
            "--paper-limits",
            help="Only print the datasheet limits of a GPU: l4, a10, a100, h100 ...",
        ),
    ] = "",
    compare: Annotated[
        Path | None, typer.Option(help="JSON of an older benchmark to compare with.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the JSON to this file.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save/--no-save", help="Save the result in the bundle (bench.json).")
    ] = True,
) -> Output:
    """Time every artifact in every runtime of a device, each in its own process.

    With --require-signature the result is not saved in the bundle.

    Example: van-deploy bench dist/van_b1 --batches 1,8,32
    """
    from van_deploy.bench.document import compare_reports, read_report
    from van_deploy.report.files import write_text
    from van_deploy.report.sections_bench import bench_blocks, limits_blocks

    if paper:
        from van_deploy.bench.roofline import paper_limits

        conflicts = ["--compare"] * (compare is not None) + ["--output"] * (output is not None)
        conflicts += [flag for flag in options.flags if flag != "--batches"]
        if conflicts:
            raise UsageError(
                f"--paper-limits times nothing, and conflicts with {', '.join(conflicts)}.",
                "Remove it, or the other options; --batches sets the batch sizes.",
            )
        return Output(paper_limits(bundle.load(), paper, options.table.batches), limits_blocks)
    old = read_report(compare) if compare else None
    report = bundle.benchmark(save=save, **options)
    if output is not None:
        write_text(output, report.text())
    if old is not None:
        report = compare_reports(old, report)
    return Output(report, bench_blocks, [f"warning: {warning}" for warning in report.warnings])


def predict(
    bundle: BundlePath,
    images: Annotated[
        list[str],
        typer.Argument(help="Image files, folders, or '-' for an image on standard input."),
    ],
    options: Annotated[OptionValues, PredictSettings],
    require_signature: RequireSignature = None,
    json_lines: Annotated[
        bool, typer.Option("--jsonl", help="Print one JSON object per image, immediately.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict the classes of images, with the preprocessing of the weights.

    Example: van-deploy predict dist/van_b1 photo.jpg holiday/ --top-k 3
    """
    if as_json and json_lines:
        raise UsageError("--json and --jsonl conflict.", "Give one of them.")
    if images.count("-") > 1:
        raise UsageError("Standard input can be read only once.", "Give '-' once.")
    sources = [_stdin() if image == "-" else path(image) for image in images]
    from van_deploy.api import Predictions
    from van_deploy.report.sections_model import predictions_blocks
    from van_deploy.serve.predict import Prediction

    saved, artifact = list[Prediction](), options.table.artifact
    total, failed, start = 0, 0, time.perf_counter()
    with progress_bar(f"Loading {artifact}") as progress:
        source = load_bundle(bundle, require_signature, progress)
        for prediction in source.stream(sources, **options):
            total, failed = total + 1, failed + (prediction.error is not None)
            if json_lines:
                sys.stdout.write(json_text(plain(prediction)) + "\n")
                sys.stdout.flush()
            else:
                saved.append(prediction)
    rate = total / (time.perf_counter() - start)
    if not json_lines:
        predictions = Predictions(source.path, artifact, rate, tuple(saved))
        print_result(predictions, as_json, predictions_blocks)
    print_note(f"{artifact}: {total} image{'s' * (total != 1)}, {rate:.1f} images/s")
    if failed:
        raise ImageError(
            f"{failed} of {total} images could not be read.",
            "Replace or remove these files.",
        )


def _stdin() -> bytes:
    content = sys.stdin.buffer.read(STDIN_LIMIT_BYTES + 1)
    if not 0 < len(content) <= STDIN_LIMIT_BYTES:
        fault = f"has more than {STDIN_LIMIT_BYTES // 2**20} MiB" if content else "is empty"
        raise ImageError(f"Standard input {fault}.", "Pipe an image, or give its path.")
    return content


def package(
    server: Annotated[Server, typer.Argument(help="Server of the package.")],
    bundle: OpenBundle,
    options: Annotated[OptionValues, PackageSettings],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the package; BUNDLE-triton by default."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the existing package, and write nothing.")
    ] = False,
) -> Output:
    """Write a Triton model repository with its configuration, client and manifests.

    Example: van-deploy package triton dist/van_b1 --output dist/van_b1-triton
    """
    report = bundle.package(output, only_check=check, **options)
    from van_deploy.report.document import checks_table

    notes = [f"Wrote {report.files} files to {report.path}."] if report.files else []
    rows = [(finding.outcome, finding.name, finding.detail) for finding in report.findings]
    failed = ", ".join(name for outcome, name, _ in rows if outcome is False)
    failure = GateFailed(
        f"The package '{report.path}' does not match the bundle: {failed}.",
        "Package the bundle again.",
    )
    return Output(report, lambda _: checks_table(rows), notes, None if report else failure)


def serve(
    bundle: BundlePath,
    options: Annotated[OptionValues, ServeSettings],
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Serve a bundle over HTTP: a web page for images, and the v2 protocol for programs.

    Example: van-deploy serve dist/van_b1 --port 8000
    """
    from van_deploy.report.document import Paragraph
    from van_deploy.serve.app import App, listen, run_server
    from van_deploy.serve.models import Service

    settings = options.table
    with progress_bar("Loading"):
        service = Service(load_bundle(bundle, require_signature, no_progress).load(), settings)
        app = App(service)
        bound, url = listen(settings.host, settings.port)
    if not ipaddress.ip_address(bound.getsockname()[0]).is_loopback:
        no_key = "" if app.requires_key else ", without an API key"
        print_note(f"note: {settings.host} is reachable from other machines{no_key}")

    def ready(_: object) -> None:
        ready = Listening(url, tuple(service.models))
        text = f"{', '.join(ready.models)} at {ready.url}  (Ctrl-C ends)"
        print_result(ready, as_json, lambda _: [Paragraph(text)])

    unfinished = run_server(app, bound, ready)
    lost = f"requests in progress that were not completed: {unfinished}"
    print_note(f"Stopped; {lost if unfinished else 'all requests in progress were completed'}.")


def sign(
    bundle: BundlePath,
    key: Annotated[
        Path,
        typer.Option(
            help="The private key: Ed25519, a PEM file; the password of an encrypted key is in "
            "VAN_DEPLOY_KEY_PASSWORD."
        ),
    ],
) -> Output:
    """Sign a bundle: its manifest, which has the SHA-256 of every file.

    Example: van-deploy sign dist/van_b1 --key release.pem
    """
    from van_deploy.signing import sign_bundle

    signed, notes = sign_bundle(bundle, key), []
    if key.stat().st_mode & 0o077:
        notes = [f"note: others on this machine may read or use '{key}': chmod 600 it"]
    return Output(signed, lambda _: _signature_facts(signed), notes)


def _signature_facts(signed: SignedBundle) -> list[Block]:
    from van_deploy.report.document import key_values

    return key_values({name.replace("_", " "): value for name, value in plain(signed).items()})


def verify_signature(
    bundle: BundlePath,
    public_key: Annotated[
        Path, typer.Option(help="The public key of the signer: Ed25519, a PEM file.")
    ],
) -> Output:
    """Check a bundle's signature, the digest of every file, and that there is no other file.

    Example: van-deploy verify-signature dist/van_b1 --public-key release.pem.pub
    """
    from van_deploy.report.document import notices
    from van_deploy.signing import open_signed_bundle

    _, signed = open_signed_bundle(bundle, public_key)
    text = f"{signed.files} files match the signature, and there are no others"
    return Output(signed, lambda _: [*notices("PASS", [text]), *_signature_facts(signed)])


def report(
    bundle: BundlePath,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The HTML file; report.html in the bundle by default. The Markdown is next to it, "
            "with the suffix .md.",
        ),
    ] = None,
) -> Output:
    """Write a report of a bundle: one self-contained HTML file, and the same as Markdown.

    Example: van-deploy report dist/van_b1
    """
    from van_deploy.report.document import bytes_text, key_values, notices

    written = load_bundle(bundle, None, no_progress).report(output)
    sizes = {f"wrote {path}": bytes_text(size) for path, size in written.sizes.items()}
    verdict = notices(written.verdict, [written.checks])
    return Output(written, lambda _: [*verdict, *key_values(sizes)])

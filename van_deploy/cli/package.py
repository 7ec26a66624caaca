"""``van-deploy package``: a bundle as a Triton model repository, and its check."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from van_deploy.cli.console import AsJson, emit, remark
from van_deploy.cli.opening import RequireSignature, open_bundle

if TYPE_CHECKING:
    from rich.console import RenderableType

    from van_deploy.serve.triton_check import PackageCheck

__all__ = ["Server", "package"]


class Server(str, enum.Enum):
    """What a package can be for."""

    TRITON = "triton"


def package(
    server: Annotated[Server, typer.Argument(help="What serves it.")],
    bundle: Annotated[Path, typer.Argument(help="A bundle made by `van-deploy export`.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the package; BUNDLE-triton by default."),
    ] = None,
    artefact: Annotated[
        list[str] | None,
        typer.Option(
            help="Which to package; may be repeated. By default fp32-uint8 where the bundle "
            "has it, else fp32."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; check the package that is there.")
    ] = False,
    queue_delay_us: Annotated[
        int, typer.Option(min=0, help="Longest wait for other requests.")
    ] = 1000,
    queue_limit: Annotated[int, typer.Option(min=1, help="Requests waiting, at most.")] = 256,
    queue_timeout_ms: Annotated[
        int, typer.Option(min=0, help="Refuse what waited longer; 0 for never.")
    ] = 0,
    instances: Annotated[int, typer.Option(min=1, help="Copies of each model.")] = 1,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Run ONNX models on a GPU; plans always are.")
    ] = False,
    triton_release: Annotated[
        str, typer.Option(help="Of the container image, such as 25.08.")
    ] = "",
    triton_python: Annotated[str, typer.Option(help="Of the Python backend, such as 3.12.")] = "",
    backend: Annotated[str, typer.Option(help="Of ONNX artefacts: onnxruntime or python.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=0, help="Inside one operator.")] = 2,
    model_version: Annotated[int, typer.Option(min=1, help="Number of the version.")] = 1,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Write a Triton model repository with its configuration, client and manifests.

    Example: van-deploy package triton dist/van_b1 --output dist/van_b1-triton
    """
    from van_deploy.errors import GateFailed, MissingDependency
    from van_deploy.serve.triton import package_triton
    from van_deploy.serve.triton_check import check_package
    from van_deploy.serve.triton_model import TritonSettings

    opened = open_bundle(bundle, require_signature)
    folder = output or opened.path.with_name(f"{opened.path.resolve().name}-{server.value}")
    if not check:
        settings = TritonSettings(
            queue_delay_us=queue_delay_us,
            queue_limit=queue_limit,
            queue_timeout_ms=queue_timeout_ms,
            instances=instances,
            gpu=gpu,
            release=triton_release,
            python=triton_python,
            backend=backend,
            threads=threads,
            version=model_version,
        )
        made = package_triton(opened, folder, artefact or (), settings)
        remark(f"Wrote {len(made.files)} files to {made.path}.")
    try:
        report = check_package(folder, opened)
    except MissingDependency as error:
        if check:
            raise
        skipped = f"skipped: {error.message} {error.remedy}"
        emit({"path": str(folder), "check": skipped}, as_json, lambda r: f"check {r['check']}")
        return
    emit(report.as_dict(), as_json, lambda _: _table(report))
    if not report:
        wrong: list[Any] = [f.name for f in report.findings if not f.outcome]
        raise GateFailed(
            f"The package '{folder}' is not what the bundle says: {', '.join(wrong)}.",
            "Package the bundle again.",
        )


def _table(report: PackageCheck) -> RenderableType:
    from van_deploy.report.tables import checks_table

    return checks_table(vars(finding) for finding in report.findings)

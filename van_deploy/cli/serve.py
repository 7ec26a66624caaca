"""``van-deploy serve``: a small server for a bundle, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from van_deploy.cli.console import AsJson, emit, remark
from van_deploy.cli.opening import RequireSignature, RunnerName, TrustEngine, open_bundle

__all__ = ["serve"]

LIMITS = "Limits"


def serve(
    bundle: Annotated[Path, typer.Argument(help="A bundle made by `van-deploy export`.")],
    artefact: Annotated[
        list[str] | None,
        typer.Option(
            help="Which to serve; may be repeated, the first answers the page. "
            "By default fp32-uint8 where the bundle has it, else fp32."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. There is no authentication.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    runner: RunnerName = "ort-cpu",
    trust_engine: TrustEngine = False,
    require_signature: RequireSignature = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads a batch; chosen by the run time by default.")
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Batches at the same time.")] = 1,
    max_delay_ms: Annotated[
        float, typer.Option(min=0.0, help="How long a lone request waits for others.")
    ] = 1.0,
    queue_limit: Annotated[
        int | None,
        typer.Option(min=1, help="Images in the server; more get 429.", rich_help_panel=LIMITS),
    ] = None,
    max_json_mib: Annotated[
        float, typer.Option(min=0.001, help="Largest JSON.", rich_help_panel=LIMITS)
    ] = 1.0,
    max_held_mib: Annotated[
        float, typer.Option(min=1, help="All requests held at once.", rich_help_panel=LIMITS)
    ] = 256.0,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that clients must send.")
    ] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log every request, not only faults.")
    ] = False,
    max_body_mib: Annotated[
        float, typer.Option(min=0.001, help="Largest request.", rich_help_panel=LIMITS)
    ] = 32.0,
    read_timeout_s: Annotated[
        float,
        typer.Option(min=0.1, help="Longest a request may take to come.", rich_help_panel=LIMITS),
    ] = 30.0,
    max_connections: Annotated[
        int, typer.Option(min=1, help="More get 503.", rich_help_panel=LIMITS)
    ] = 512,
    compare: Annotated[
        bool, typer.Option("--compare/--no-compare", help="Let the page ask PyTorch too.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Answer over HTTP: a web page for pictures, and the v2 protocol for programs.

    Example: van-deploy serve dist/van_b1 --port 8000
    """
    from van_deploy.cli.console import progress
    from van_deploy.serve.server import is_loopback, listen, run_server, url_of
    from van_deploy.serve.service import Service, ServiceSettings

    settings = ServiceSettings(
        artefacts=tuple(dict.fromkeys(artefact or ())),
        runner=runner,
        trust_engine=trust_engine,
        threads=threads,
        instances=instances,
        queue_limit=queue_limit,
        max_delay_ms=max_delay_ms,
        max_body_bytes=round(max_body_mib * 2**20),
        max_json_bytes=round(max_json_mib * 2**20),
        max_held_bytes=round(max_held_mib * 2**20),
        api_key=api_key_file.read_text().strip() if api_key_file else "",
        log_requests=log_requests,
        read_timeout_s=read_timeout_s,
        compare=compare,
    )
    with progress() as bar:
        bar.add_task("Loading", total=None)
        service = Service(open_bundle(bundle, require_signature), settings)
        service.load()
        bound = listen(host, port)
    if not is_loopback(host):
        remark(f"note: {host} is reachable from other machines, and nobody is asked who they are")

    def ready(_: object) -> None:
        document = {"url": url_of(bound), "models": list(service.models)}
        emit(
            document,
            as_json,
            lambda _: f"{', '.join(service.models)} at {url_of(bound)}  (Ctrl-C ends)",
        )

    run_server(service, bound, max_connections=max_connections, on_ready=ready)
    remark("Stopped; every request that was begun is answered.")

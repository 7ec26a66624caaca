"""``van-deploy serve``: a small server for a bundle, on this machine."""

from __future__ import annotations

from van_deploy.cli.console import AsJson, emit, remark, telling
from van_deploy.cli.options import with_options
from van_deploy.cli.shared import BundlePath, RequireSignature, opened
from van_deploy.config import ServeSettings

__all__ = ["serve"]


@with_options
def serve(
    bundle: BundlePath,
    settings: ServeSettings,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Answer over HTTP: a web page for pictures, and the v2 protocol for programs.

    Example: van-deploy serve dist/van_b1 --port 8000
    """
    from van_deploy.serve.server import listen, run_server
    from van_deploy.serve.service import Service

    with telling("Loading"):
        service = Service(opened(bundle, require_signature).opened(), settings)
        service.load()
        listening = listen(settings.host, settings.port)
    if not listening.loopback:
        remark(
            f"note: {settings.host} is reachable from other machines, and nobody is asked who "
            "they are"
        )

    def ready() -> None:
        document = {"url": listening.url, "models": list(service.models)}
        emit(
            document,
            as_json,
            lambda _: f"{', '.join(service.models)} at {listening.url}  (Ctrl-C ends)",
        )

    run_server(service, listening, max_connections=settings.max_connections, on_ready=ready)
    remark("Stopped; every request that was begun is answered.")

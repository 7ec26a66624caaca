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
    """Answer over HTTP: a web page for images, and the v2 protocol for programs.

    Example: van-deploy serve dist/van_b1 --port 8000
    """
    from van_deploy.report.document import Paragraph
    from van_deploy.results import Listening
    from van_deploy.serve.app import App
    from van_deploy.serve.server import is_loopback, listen, run_server, url_of
    from van_deploy.serve.service import Service

    with telling("Loading"):
        service = Service(opened(bundle, require_signature).opened(), settings)
        app = App(service)
        service.load()
        bound = listen(settings.host, settings.port)
    if not is_loopback(settings.host):
        keyless = "" if app.keyed else ", and nobody is asked for a key"
        remark(f"note: {settings.host} is reachable from other machines{keyless}")

    def ready(_: object) -> None:
        ready = Listening(url_of(bound), tuple(service.models))
        said = f"{', '.join(ready.models)} at {ready.url}  (Ctrl-C ends)"
        emit(ready, as_json, lambda _: [Paragraph(said)])

    run_server(app, bound, ready)
    remark("Stopped; every request that was begun is answered.")

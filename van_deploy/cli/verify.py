"""``van-deploy verify``: every artefact against the PyTorch network it came from."""

from __future__ import annotations

from van_deploy.cli.console import AsJson, emit, remark, telling
from van_deploy.cli.options import with_options
from van_deploy.cli.shared import BundlePath, RequireSignature, opened
from van_deploy.config import VerifySettings
from van_deploy.errors import GateFailed

__all__ = ["verify"]


@with_options
def verify(
    bundle: BundlePath,
    settings: VerifySettings,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Compare every artefact with PyTorch: logits, batch sizes, flips, and module by module.

    Example: van-deploy verify dist/van_b1 --images photos/
    """
    asked = opened(bundle, require_signature)
    with telling() as tell:
        report = asked.verify(settings, progress=tell)
    from van_deploy.report.sections_checks import failure_text, verify_blocks

    for text in asked.remarks:
        remark(f"note: {text}")
    names = asked.manifest.class_names
    emit(report, as_json, lambda found: verify_blocks(found, names))
    if not report:
        raise GateFailed(
            failure_text(report.named(), report.allowed, "verified"),
            "See the rows above; `van-deploy drift` names the module.",
        )

"""``van-deploy evaluate``: accuracy on labelled images, PyTorch's and every artefact's."""

from __future__ import annotations

from van_deploy.cli.console import AsJson, emit, remark, telling
from van_deploy.cli.options import with_options
from van_deploy.cli.shared import BundlePath, RequireSignature, opened
from van_deploy.config import EvaluationSettings
from van_deploy.errors import GateFailed

__all__ = ["evaluate"]


@with_options
def evaluate(
    bundle: BundlePath,
    settings: EvaluationSettings,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Measure top-1 and top-5 of PyTorch and every artefact, and what was lost between them.

    Example: van-deploy evaluate dist/van_b1 --images imagenet/val
    """
    asked = opened(bundle, require_signature)
    with telling() as tell:
        report = asked.evaluate(None, settings, progress=tell)
    from van_deploy.report.sections_checks import evaluate_blocks, failure_text

    for text in asked.remarks:
        remark(f"note: {text}")
    emit(report, as_json, evaluate_blocks)
    if not report:
        raise GateFailed(
            failure_text(report.named(), report.allowed, "evaluated"),
            "See the rows above; `van-deploy drift` names the module.",
        )

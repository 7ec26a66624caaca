"""``van-deploy quantize``: a bundle's network in FP16 or INT8, and what that costs."""

from __future__ import annotations

import typer

from van_deploy.cli.console import AsJson, emit, remark, telling
from van_deploy.cli.options import with_options
from van_deploy.cli.shared import BundlePath, Force, opened
from van_deploy.config import QuantizeSettings

__all__ = ["quantize"]


@with_options
def quantize(
    bundle: BundlePath,
    settings: QuantizeSettings,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Add an FP16 or INT8 graph to a bundle, judged beside FP32.

    Ends with exit code 1 if the result does not hold its gate.

    Example: van-deploy quantize dist/van_b1 --images train/ --eval val/
    """
    with telling("Opening the bundle") as tell:
        result = opened(bundle, None).quantize(settings, force=force, progress=tell)
    word = "reused" if result.reused else "made anew"
    remark(f"{result.artefact}: {word}: {result.reason}")
    from van_deploy.report.sections_precision import quantized_blocks

    emit(result, as_json, quantized_blocks)
    if not result:
        raise typer.Exit(1)

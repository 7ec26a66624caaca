"""``van-deploy list``: the VAN variants and where their weights are."""

from __future__ import annotations

from van_deploy.cli.console import AsJson, emit

__all__ = ["list_"]


def list_(as_json: AsJson = False) -> None:
    """List the variants: size, work, accuracy, and where their weights are.

    Example: van-deploy list --json
    """
    from van_deploy.model.listing import listed_variants
    from van_deploy.report.sections_model import listed_blocks

    emit(listed_variants(), as_json, listed_blocks)

"""``van-deploy verify-signature``: whether a bundle is what somebody signed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from van_deploy.cli.console import AsJson, emit
from van_deploy.cli.shared import BundlePath

__all__ = ["verify_signature"]


def verify_signature(
    bundle: BundlePath,
    public_key: Annotated[
        Path, typer.Option(help="Of who is to have signed it: Ed25519, a PEM file.")
    ],
    as_json: AsJson = False,
) -> None:
    """Check a bundle's signature, every file's digest, and that no other file is in it.

    Example: van-deploy verify-signature dist/van_b1 --public-key release.pem.pub
    """
    from van_deploy.report.document import Facts, Notice
    from van_deploy.signing import Signed, signed_bundle
    from van_deploy.signing_keys import public_key_from

    opened, signature = signed_bundle(bundle, public_key_from(public_key))
    files = len(opened.digests)
    signed = Signed(opened.path, signature.key_id, signature.date, files)
    said = f"{files} files are what was signed, and there is no other"
    emit(signed, as_json, lambda _: [Notice("PASS", said), Facts(vars(signed))])

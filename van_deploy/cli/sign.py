"""``van-deploy sign``: a signature over a bundle's manifest, and new keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from van_deploy.cli.console import AsJson, emit, remark
from van_deploy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from van_deploy.report.document import Facts

__all__ = ["sign"]


def sign(
    bundle: Annotated[
        Path | None, typer.Argument(help="The bundle, made by `van-deploy export`.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="The private key: Ed25519, a PEM file.")] = None,
    new_key: Annotated[
        Path | None,
        typer.Option(help="Make a pair instead: FILE (private, mode 0600) and FILE.pub."),
    ] = None,
    password_file: Annotated[
        Path | None,
        typer.Option(
            help="File whose first line opens or protects the private key; "
            "VAN_DEPLOY_KEY_PASSWORD by default."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sign a bundle: its manifest, which names every file with its SHA-256.

    Example: van-deploy sign dist/van_b1 --key release.pem
    """
    from van_deploy.bundle import Bundle
    from van_deploy.signing import Signed, sign_bundle
    from van_deploy.signing_keys import new_pair, password_from, private_key_from

    if new_key is not None:
        if bundle is not None or key is not None:
            raise UsageError("--new-key only makes a pair of keys.", "Sign in a second command.")
        emit(new_pair(new_key, password_from(password_file)), as_json, _facts)
        return
    if bundle is None or key is None:
        raise UsageError(
            "A bundle and --key FILE are wanted.",
            "Make a pair of keys first with `van-deploy sign --new-key FILE`.",
        )
    secret = private_key_from(key, password_from(password_file))
    if key.stat().st_mode & 0o077:
        remark(f"note: others on this machine may read or use '{key}': chmod 600 it")
    signature = sign_bundle(bundle, secret)
    files = len(Bundle.open(bundle).digests)
    emit(Signed(bundle, signature.key_id, signature.date, files), as_json, _facts)


def _facts(result: Mapping[str, object]) -> list[Facts]:
    from van_deploy.report.document import Facts

    return [Facts({key.replace("_", " "): value for key, value in result.items()})]

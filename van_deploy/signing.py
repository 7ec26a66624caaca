"""Signing a bundle's manifest with Ed25519, and checking such a signature.

The manifest names every file of the bundle with its SHA-256, so one signature
over it speaks for all of them. It lies beside the manifest as a small JSON file.
What is signed is the schema, the date and the manifest's bytes, each of the first
two ended by a newline. The keys are those of :mod:`van_deploy.signing_keys`.

Needs the package ``cryptography``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from van_deploy.bundle import MANIFEST, SIGNATURE, Bundle
from van_deploy.bundle.manifest import manifest_from
from van_deploy.documents import json_from
from van_deploy.errors import BundleError, SignatureError
from van_deploy.files import write_atomic
from van_deploy.signing_keys import key_id

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

__all__ = [
    "SCHEMA",
    "Signature",
    "read_signature",
    "sign_bundle",
    "signed_bundle",
]

SCHEMA = "van-deploy/signature/1"
ALGORITHM = "ed25519"
LARGEST_SIGNATURE_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Signature:
    """What ``manifest.json.sig`` says.

    Attributes:
        algorithm: ``ed25519``.
        key_id: SHA-256 of the public key (DER, SubjectPublicKeyInfo), in hexadecimal.
        date: when it was signed, by the clock of the signer (ISO 8601, UTC); signed too.
        signature: 64 bytes, in base64.
    """

    algorithm: str
    key_id: str
    date: str
    signature: str


def sign_bundle(path: Path, key: Ed25519PrivateKey) -> Signature:
    """Sign the bundle at ``path``, and return the signature, which replaces an older one.

    Raises:
        BundleError: a file of the bundle is missing, changed, or not in the manifest,
            so that a signature would not hold or not cover it.
    """
    bundle = Bundle.open(path)
    content = (bundle.path / MANIFEST).read_bytes()
    _require_whole(bundle, BundleError, "Nothing was signed. Make the bundle again.")
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    raw = key.sign(_signed_bytes(date, content))
    signature = Signature(ALGORITHM, key_id(key.public_key()), date, base64.b64encode(raw).decode())
    text = json.dumps({"schema": SCHEMA, **asdict(signature)}, indent=2) + "\n"
    write_atomic(bundle.path / SIGNATURE, text)
    return signature


def read_signature(bundle: Path) -> Signature:
    """Return what the signature file in a bundle's folder says; it is not checked.

    Raises:
        SignatureError: there is none, or it cannot be read.
    """
    path = bundle / SIGNATURE
    if not path.is_file():
        raise SignatureError(
            f"The bundle '{bundle}' is not signed: it has no {SIGNATURE}.",
            f"Sign it where it was made, with `van-deploy sign {bundle} --key FILE`.",
        )
    try:
        with path.open("rb") as file:
            document = json_from(file.read(LARGEST_SIGNATURE_BYTES).decode())
        schema = document.pop("schema")
        if schema != SCHEMA:
            raise SignatureError(
                f"'{path}' has schema '{schema}'; this version reads '{SCHEMA}'.",
                "Sign the bundle again with this version of van-deploy.",
            )
        return _signature_from(document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SignatureError(
            f"The signature '{path}' is damaged: {type(error).__name__}: {error}.",
            "Do not use this bundle; fetch it again.",
        ) from error


def signed_bundle(path: Path, key: Ed25519PublicKey) -> tuple[Bundle, Signature]:
    """Return the bundle at ``path`` and its signature, after checking both whole.

    The signature must be this key's and fit the manifest, every file must have the
    digest the manifest names, and there may be no file that the manifest does not name.

    Raises:
        SignatureError: any of this is not so.
        BundleError: there is no bundle, or its manifest cannot be read.
    """
    from cryptography.exceptions import InvalidSignature

    bundle = Bundle.open(path)
    content = (bundle.path / MANIFEST).read_bytes()
    found = read_signature(bundle.path)
    wanted = key_id(key)
    if found.key_id != wanted:
        raise SignatureError(
            f"The bundle '{bundle.path}' is signed with another key, {found.key_id[:16]}..., "
            f"not with {wanted[:16]}....",
            "Do not use it, unless you trust that key: then give its public key.",
        )
    try:
        key.verify(base64.b64decode(found.signature), _signed_bytes(found.date, content))
    except InvalidSignature:
        raise _stale(bundle, found) from None
    if manifest_from(content.decode(), bundle.path / MANIFEST) != bundle.manifest:
        raise SignatureError(
            f"'{bundle.path}' was changed while its signature was checked.", "Check it again."
        )
    _require_whole(bundle, SignatureError, "Do not use this bundle; fetch it again.")
    return bundle, found


def _signed_bytes(date: str, manifest: bytes) -> bytes:
    return f"{SCHEMA}\n{date}\n".encode() + manifest


def _signature_from(document: Mapping[str, Any]) -> Signature:
    found = Signature(**document)
    if not all(isinstance(value, str) for value in vars(found).values()):
        raise TypeError("its values are not text")
    if found.algorithm != ALGORITHM:
        raise ValueError(f"its algorithm is '{found.algorithm}', not {ALGORITHM}")
    if len(base64.b64decode(found.signature, validate=True)) != 64:
        raise ValueError("its signature has not 64 bytes")
    return found


def _require_whole(bundle: Bundle, kind: type[BundleError], remedy: str) -> None:
    problems, strangers = bundle.problems(), bundle.unnamed()
    if problems:
        raise kind(" ".join(problems[:3]), remedy)
    if strangers:
        raise kind(
            f"{len(strangers)} files in '{bundle.path}' are not in its manifest, so no signature "
            f"covers them: {', '.join(strangers[:5])}.",
            "Remove them or move them elsewhere.",
        )


def _stale(bundle: Bundle, signature: Signature) -> SignatureError:
    return SignatureError(
        f"The signature of '{bundle.path}' does not fit: key {signature.key_id[:16]}... signed it "
        f"on {signature.date}, and its manifest (written {bundle.manifest.written}) is not "
        "what was signed.",
        "If you changed the bundle yourself since (quantize, build, verify, report ... write to "
        "its manifest), sign it again. If not, do not use it.",
    )

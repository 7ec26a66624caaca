"""Signing a bundle's manifest with Ed25519, and checking such a signature.

The manifest names every file of the bundle with its SHA-256, so one signature
over it speaks for all of them. It lies beside the manifest as a small JSON file.
What is signed is the schema, the date and the manifest's bytes, each of the first
two ended by a newline. The keys are those of :mod:`van_deploy.signing_keys`.

Needs the package ``cryptography``.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import AfterValidator, Field

from van_deploy.bundle import MANIFEST, SIGNATURE, Bundle
from van_deploy.errors import BundleError, SignatureError
from van_deploy.fields import Text
from van_deploy.files import write_atomic
from van_deploy.manifest import manifest_from
from van_deploy.signing_keys import key_id
from van_deploy.versioned import Versioned, read_versioned

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

__all__ = [
    "SCHEMA",
    "Signature",
    "Signed",
    "read_signature",
    "sign_bundle",
    "signed_bundle",
]

SCHEMA: Final = "van-deploy/signature/1"
SIGNATURE_BYTES = 64  # RFC 8032


def _signature(text: str) -> str:
    if len(base64.b64decode(text, validate=True)) != SIGNATURE_BYTES:
        raise ValueError(f"has not {SIGNATURE_BYTES} bytes")
    return text


class Signature(Versioned):
    """What ``manifest.json.sig`` says.

    Attributes:
        algorithm: the only one.
        key_id: SHA-256 of the public key (DER, SubjectPublicKeyInfo), in hexadecimal.
        date: when it was signed, by the clock of the signer (ISO 8601, UTC); signed too.
        signature: 64 bytes, in base64.
    """

    schema_: Literal["van-deploy/signature/1"] = Field(alias="schema")
    algorithm: Literal["ed25519"]
    key_id: Text
    date: Text
    signature: Annotated[str, AfterValidator(_signature)]


@dataclass(frozen=True)
class Signed:
    """A bundle, and whose signature it has.

    Attributes:
        bundle: its folder.
        key_id: of the key that signed it.
        date: when, by the clock of the signer.
        files: how many the signature speaks for.
    """

    bundle: Path
    key_id: str
    date: str
    files: int


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
    signature = Signature(
        schema=SCHEMA,
        algorithm="ed25519",
        key_id=key_id(key.public_key()),
        date=date,
        signature=base64.b64encode(raw).decode(),
    )
    write_atomic(bundle.path / SIGNATURE, signature.text())
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
    return read_versioned(
        Signature,
        path,
        "signature",
        SignatureError,
        damaged="Do not use this bundle; fetch it again.",
        outdated="Sign the bundle again with this version of van-deploy.",
    )


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

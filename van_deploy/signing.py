"""Signing a bundle's manifest with Ed25519, and checking such a signature.

The manifest names every file of the bundle with its SHA-256, so one signature
over it speaks for all of them. It lies beside the manifest as a small JSON file.
What is signed is the schema, the date and the manifest's bytes, each of the first
two ended by a newline. Keys are ordinary PEM files (PKCS #8 and SubjectPublicKeyInfo),
as OpenSSL makes and reads them.

Needs the package ``cryptography``.
"""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.bundle.commit import SIGNATURE
from van_deploy.errors import BundleError, InputError, SignatureError, require_extra
from van_deploy.files import write_atomic
from van_deploy.manifest import manifest_from
from van_deploy.schema import Text, VersionedSchema, read_document

SIGNATURE_BYTES = 64  # RFC 8032
PASSWORD_VARIABLE = "VAN_DEPLOY_KEY_PASSWORD"
LARGEST_KEY_BYTES = 64 * 2**10  # a PEM key of this kind has 120
FETCH_AGAIN = "Do not use this bundle; fetch it again, or have it signed again."


def _signature(text: str) -> str:
    if len(base64.b64decode(text, validate=True)) != SIGNATURE_BYTES:
        raise ValueError(f"has not {SIGNATURE_BYTES} bytes")
    return text


class Signature(VersionedSchema):
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
class SignedBundle:
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


def sign_bundle(path: Path, key_file: Path) -> SignedBundle:
    """Sign the bundle at ``path`` with a private key; the signature replaces an older one.

    Raises:
        BundleError: a file of the bundle is missing, changed, or not in the manifest,
            so that a signature would not hold or not cover it.
        InputError: there is no such key in the file, or its password is missing or wrong.
        MissingDependency: ``cryptography`` is not installed.
    """
    key = _key_from(key_file, "private")
    bundle = Bundle.open(path)
    content = (bundle.path / MANIFEST).read_bytes()
    _require_whole(bundle, BundleError, "Nothing was signed. Make the bundle again.")
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    signature = Signature(
        schema="van-deploy/signature/1",
        algorithm="ed25519",
        key_id=_key_id(key.public_key()),
        date=date,
        signature=base64.b64encode(key.sign(_signed_bytes(date, content))).decode(),
    )
    write_atomic(bundle.path / SIGNATURE, signature.text())
    return SignedBundle(path, signature.key_id, date, len(bundle.digests))


def open_signed_bundle(path: Path, key_file: Path) -> tuple[Bundle, SignedBundle]:
    """Return the bundle at ``path`` and whose signature it has, after checking both whole.

    The signature must be that of the public key's owner and fit the manifest, every file must
    have the digest the manifest names, and there may be no file that the manifest does not name.

    Raises:
        SignatureError: any of this is not so.
        BundleError: there is no bundle, or its manifest cannot be read.
        InputError: there is no such key in the file.
        MissingDependency: ``cryptography`` is not installed.
    """
    key = _key_from(key_file, "public")
    from cryptography.exceptions import InvalidSignature

    bundle, wanted = Bundle.open(path), _key_id(key)
    content, file = (bundle.path / MANIFEST).read_bytes(), bundle.path / SIGNATURE
    if not file.is_file():
        raise SignatureError(
            f"The bundle '{bundle.path}' is not signed: it has no {SIGNATURE}.",
            f"Sign it where it was made, with `van-deploy sign {bundle.path} --key FILE`.",
        )
    found = read_document(Signature, file, "signature", SignatureError, FETCH_AGAIN)
    if found.key_id != wanted:
        raise SignatureError(
            f"The bundle '{bundle.path}' is signed with another key, {found.key_id[:16]}..., "
            f"not with {wanted[:16]}....",
            "Do not use it, unless you trust that key: then give its public key.",
        )
    try:
        key.verify(base64.b64decode(found.signature), _signed_bytes(found.date, content))
    except InvalidSignature:
        raise SignatureError(
            f"The signature of '{bundle.path}' does not fit: key {wanted[:16]}... signed it on "
            f"{found.date}, and its manifest (written {bundle.manifest.written}) is not "
            "what was signed.",
            "If you changed the bundle yourself since (quantize, build, verify, report ... write "
            "to its manifest), sign it again. If not, do not use it.",
        ) from None
    # What was signed, whatever stands in the file by now.
    bundle = replace(bundle, manifest=manifest_from(content.decode(), bundle.path / MANIFEST))
    _require_whole(bundle, SignatureError, FETCH_AGAIN)
    return bundle, SignedBundle(bundle.path, found.key_id, found.date, len(bundle.digests))


def _signed_bytes(date: str, manifest: bytes) -> bytes:
    return f"{Signature.schema_name()}\n{date}\n".encode() + manifest


def _require_whole(bundle: Bundle, kind: type[BundleError], remedy: str) -> None:
    problems, strangers = bundle.problems(), bundle.unlisted_files()
    if problems:
        raise kind(" ".join(problems[:3]), remedy)
    if strangers:
        raise kind(
            f"{len(strangers)} files in '{bundle.path}' are not in its manifest, so no signature "
            f"covers them: {', '.join(strangers[:5])}.",
            "Remove them or move them elsewhere.",
        )


def _key_id(key: Any) -> str:
    """Return the SHA-256 of a public key's DER form, in hexadecimal.

    ``openssl pkey -pubin -in KEY.pub -outform DER | sha256sum`` prints the same.
    """
    from cryptography.hazmat.primitives import serialization as pem

    der = key.public_bytes(pem.Encoding.DER, pem.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _key_from(path: Path, wanted: Literal["private", "public"]) -> Any:
    """Return the Ed25519 key in a PEM file, opened with the environment's password."""
    with require_extra("A signature", "sign"):
        from cryptography.hazmat.primitives import serialization as pem
        from cryptography.hazmat.primitives.asymmetric import ed25519
    key: object
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_KEY_BYTES)
        if wanted == "private":
            password = os.environ.get(PASSWORD_VARIABLE, "").encode() or None
            key = pem.load_pem_private_key(content, password if b"ENCRYPTED" in content else None)
        else:
            key = pem.load_pem_public_key(content)
        name = type(key).__name__.lstrip("_")
        if not isinstance(key, ed25519.Ed25519PrivateKey | ed25519.Ed25519PublicKey):
            raise TypeError(f"it is an {name}")  # noqa: TRY301 - one message for all
    except Exception as error:  # of many types, one for each way in which a file can be none
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"'{path}' holds no {wanted} Ed25519 key in PEM form that can be read: {reason}.",
            "The private key signs and stays where it is, the public one checks; an encrypted one "
            f"wants its password in the environment variable {PASSWORD_VARIABLE}. SECURITY.md "
            "shows how OpenSSL makes a pair.",
        ) from error
    return key

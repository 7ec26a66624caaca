"""Signing a bundle's manifest with Ed25519, and checking such a signature.

The manifest has the SHA-256 of every file of the bundle, so one signature of the manifest
covers all files. The signature is a small JSON file next to the manifest. The signed bytes
are the schema, the date and the manifest, with a newline after each of the first two. Keys
are PEM files (PKCS #8 and SubjectPublicKeyInfo), as OpenSSL makes and reads them.

Needs the package ``cryptography``.
"""

import base64
import hashlib
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.bundle.folder import SIGNATURE
from van_deploy.errors import BundleError, InputError, SignatureError, require_extra
from van_deploy.files import write_atomic
from van_deploy.manifest import read_manifest
from van_deploy.schema import Text, VersionedSchema, read_document

PASSWORD_VARIABLE = "VAN_DEPLOY_KEY_PASSWORD"
MAX_KEY_BYTES = 64 * 2**10  # an Ed25519 key in PEM has 120
REPLACE = "Do not use this bundle; download it again, or have it signed again."


class Signature(VersionedSchema):
    """Contents of ``manifest.json.sig``.

    Attributes:
        algorithm: always ``ed25519``.
        key_id: SHA-256 of the public key (DER, SubjectPublicKeyInfo), in hexadecimal.
        date: time of signing, by the signer's clock (ISO 8601, UTC); part of the signed bytes.
        signature: 64 bytes (RFC 8032), in base64.
    """

    schema_: Literal["van-deploy/signature/1"] = Field(alias="schema")
    algorithm: Literal["ed25519"]
    key_id: Text
    date: Text
    signature: str = Field(pattern="^[A-Za-z0-9+/]{86}==$")


@dataclass(frozen=True)
class SignedBundle:
    """A signed bundle.

    Attributes:
        bundle: its folder.
        key_id: of the key that signed it.
        date: time of signing, by the signer's clock.
        files: number of files that the signature covers.
    """

    bundle: Path
    key_id: str
    date: str
    files: int


def sign_bundle(path: Path, key_file: Path) -> SignedBundle:
    """Sign the bundle at ``path`` with a private key, and replace an older signature.

    Raises:
        BundleError: a file of the bundle is missing, changed, or not in the manifest.
        InputError: the file is not such a key, or its password is missing or incorrect.
        MissingDependency: ``cryptography`` is not installed.
    """
    key = _read_key(key_file, "private")
    bundle, content = _read_bundle(path)
    _require_complete(bundle, BundleError, "Nothing was signed. Create the bundle again.")
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    signature = Signature(
        schema="van-deploy/signature/1",
        algorithm="ed25519",
        key_id=_key_id(key.public_key()),
        date=date,
        signature=base64.b64encode(key.sign(_signed_bytes(date, content))).decode(),
    )
    write_atomic(bundle.path / SIGNATURE, signature.text())
    return SignedBundle(bundle.path, signature.key_id, date, len(bundle.digests))


def open_signed_bundle(path: Path, key_file: Path) -> tuple[Bundle, SignedBundle]:
    """Return the bundle at ``path`` and its signature, after verifying both.

    The signature must match the public key and the manifest, every file must have its digest in
    the manifest, and every file must be in the manifest.

    Raises:
        SignatureError: one of these conditions fails.
        BundleError: there is no bundle, or its manifest cannot be read.
        InputError: the file is not such a key.
        MissingDependency: ``cryptography`` is not installed.
    """
    key = _read_key(key_file, "public")
    from cryptography.exceptions import InvalidSignature

    bundle, content = _read_bundle(path)
    key_id, file = _key_id(key), bundle.path / SIGNATURE
    if not file.is_file():
        raise SignatureError(
            f"The bundle '{bundle.path}' is not signed: it has no {SIGNATURE}.",
            f"Sign it on the machine that made it: `van-deploy sign {bundle.path} --key FILE`.",
        )
    signature = read_document(Signature, file, "signature", SignatureError, REPLACE)
    if signature.key_id != key_id:
        raise SignatureError(
            f"The bundle '{bundle.path}' is signed with another key, {signature.key_id[:16]}..., "
            f"not with {key_id[:16]}....",
            "Do not use it, unless you trust that key: then give its public key.",
        )
    try:
        key.verify(base64.b64decode(signature.signature), _signed_bytes(signature.date, content))
    except InvalidSignature:
        raise SignatureError(
            f"The signature of '{bundle.path}' is not valid: key {key_id[:16]}... signed it on "
            f"{signature.date}, and its manifest (written {bundle.manifest.written}) was changed "
            "after that.",
            "If you changed the bundle yourself (quantize, build, verify, report ... write to its "
            "manifest), sign it again. Otherwise do not use it.",
        ) from None
    _require_complete(bundle, SignatureError, REPLACE)
    return bundle, SignedBundle(bundle.path, key_id, signature.date, len(bundle.digests))


def _read_bundle(path: Path) -> tuple[Bundle, bytes]:
    """Return the bundle at ``path``, with the manifest that is in the bytes of its manifest."""
    folder = Bundle.open(path).path
    content = (folder / MANIFEST).read_bytes()
    return Bundle(folder, read_manifest(folder, content.decode())), content


def _signed_bytes(date: str, manifest: bytes) -> bytes:
    return f"{Signature.schema_name()}\n{date}\n".encode() + manifest


def _require_complete(bundle: Bundle, kind: type[BundleError], remedy: str) -> None:
    problems, unlisted = bundle.problems(), bundle.unlisted_files()
    if problems:
        raise kind(" ".join(problems[:3]), remedy)
    if unlisted:
        raise kind(
            f"{len(unlisted)} files in '{bundle.path}' are not in its manifest, so no signature "
            f"covers them: {', '.join(unlisted[:5])}.",
            "Remove them or move them elsewhere.",
        )


def _key_id(key: Any) -> str:
    """Return the SHA-256 of a public key's DER form, in hexadecimal.

    ``openssl pkey -pubin -in KEY.pub -outform DER | sha256sum`` prints the same.
    """
    from cryptography.hazmat.primitives import serialization as pem

    der = key.public_bytes(pem.Encoding.DER, pem.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _read_key(path: Path, kind: Literal["private", "public"]) -> Any:
    """Return the Ed25519 key in a PEM file; the password is in the environment."""
    with require_extra("A signature", "sign"):
        from cryptography.hazmat.primitives import serialization as pem
        from cryptography.hazmat.primitives.asymmetric import ed25519
    key: object
    try:
        with path.open("rb") as file:
            content = file.read(MAX_KEY_BYTES)
        if kind == "private":
            password = os.environ.get(PASSWORD_VARIABLE, "").encode() or None
            key = pem.load_pem_private_key(content, password if b"ENCRYPTED" in content else None)
        else:
            key = pem.load_pem_public_key(content)
        if not isinstance(key, ed25519.Ed25519PrivateKey | ed25519.Ed25519PublicKey):
            raise TypeError(f"it is an {type(key).__name__.lstrip('_')}")  # noqa: TRY301 - one message for all
    except Exception as error:  # cryptography raises many types for invalid files
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"'{path}' is not a readable {kind} Ed25519 key in PEM form: {reason}.",
            "Sign with the private key and verify with the public key; set the password of an "
            f"encrypted key in the environment variable {PASSWORD_VARIABLE}. SECURITY.md shows "
            "how to create a pair with OpenSSL.",
        ) from error
    return key

"""Signing a bundle's manifest with Ed25519, and checking such a signature.

The manifest names every file of the bundle with its SHA-256, so one signature
over it speaks for all of them. It lies beside the manifest as a small JSON file.
What is signed is the schema, the date and the manifest's bytes, each of the first
two ended by a newline. Keys are ordinary PEM files (PKCS #8 and
SubjectPublicKeyInfo), as OpenSSL writes and reads them.

Needs the package ``cryptography``.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from van_deploy.bundle import MANIFEST, SIGNATURE, Bundle, write_atomic
from van_deploy.environment.packages import pip_command
from van_deploy.errors import BundleError, InputError, MissingDependency, SignatureError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

__all__ = [
    "PASSWORD_VARIABLE",
    "SCHEMA",
    "Signature",
    "key_id",
    "new_key",
    "private_key_from",
    "public_key_from",
    "read_signature",
    "require_signing",
    "sign_bundle",
    "signed_bundle",
]

SCHEMA = "van-deploy/signature/1"
ALGORITHM = "ed25519"
PASSWORD_VARIABLE = "VAN_DEPLOY_KEY_PASSWORD"
LARGEST_KEY_BYTES = 64 * 2**10  # a PEM key of this kind has 120
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


def require_signing() -> None:
    """Return if ``cryptography`` is installed.

    Raises:
        MissingDependency: it is not.
    """
    if importlib.util.find_spec("cryptography") is None:
        raise MissingDependency(
            "Signatures need the package 'cryptography', which is not installed.",
            f"Install it with `{pip_command()} install cryptography`.",
        )


def new_key(path: Path, password: str = "") -> tuple[Path, str]:
    """Make a pair of keys and return the public key's file and its id.

    Args:
        path: of the private key, mode 0600; the public key goes beside it as ``.pub``.
        password: encrypts the private key; "" leaves it plain.

    Raises:
        UsageError: one of the files is there already; nothing is overwritten.
        InputError: a file cannot be written.
        MissingDependency: ``cryptography`` is not installed.
    """
    require_signing()
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = path.with_name(f"{path.name}.pub")
    for file in (path, public):
        if file.exists() or file.is_symlink():
            raise UsageError(
                f"'{file}' is there already, and keys are never overwritten.",
                "Choose another name with --new-key FILE.",
            )
    key = Ed25519PrivateKey.generate()
    how = pem.BestAvailableEncryption(password.encode()) if password else pem.NoEncryption()
    secret = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, how)
    shown = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    _write_new(path, secret, 0o600)
    try:
        _write_new(public, shown, 0o644)
    except InputError:
        path.unlink()
        raise
    return public, key_id(key.public_key())


def key_id(key: Ed25519PublicKey) -> str:
    """Return the SHA-256 of a public key's DER form, in hexadecimal.

    ``openssl pkey -pubin -in KEY.pub -outform DER | sha256sum`` prints the same.
    """
    from cryptography.hazmat.primitives import serialization as pem

    der = key.public_bytes(pem.Encoding.DER, pem.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def private_key_from(path: Path, password: str = "") -> Ed25519PrivateKey:
    """Return the private key in a PEM file.

    Raises:
        InputError: there is no such key in the file, or the password is missing or wrong.
        MissingDependency: ``cryptography`` is not installed.
    """
    require_signing()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _key_bytes(path, public=False)
    try:
        key = load_pem_private_key(content, password.encode() if password else None)
    except TypeError:  # a password where none belongs, or none where one does
        if password:
            key = load_pem_private_key(content, None)
        else:
            raise InputError(
                f"The private key '{path}' is encrypted, and no password is given.",
                f"Put it in the environment variable {PASSWORD_VARIABLE}, or in a file and give "
                "--password-file FILE.",
            ) from None
    except Exception as error:
        if b"ENCRYPTED" in content and password:
            raise InputError(
                f"The password does not open the private key '{path}'.",
                f"Check {PASSWORD_VARIABLE} or --password-file.",
            ) from error
        raise _no_key(path, "private") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _other_kind(path, key)
    return key


def public_key_from(path: Path) -> Ed25519PublicKey:
    """Return the public key in a PEM file.

    Raises:
        InputError: there is no such key in the file.
        MissingDependency: ``cryptography`` is not installed.
    """
    require_signing()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = _key_bytes(path, public=True)
    try:
        key = load_pem_public_key(content)
    except Exception as error:
        raise _no_key(path, "public") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _other_kind(path, key)
    return key


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
            document = json.loads(file.read(LARGEST_SIGNATURE_BYTES).decode())
        schema = document.pop("schema")
        if schema != SCHEMA:
            raise SignatureError(
                f"'{path}' has schema '{schema}'; this version reads '{SCHEMA}'.",
                "Sign the bundle again with this version of van-deploy.",
            )
        return _signature_from(document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    if json.loads(content) != bundle.manifest:
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
    written = bundle.manifest.get("written", "an unknown time")
    return SignatureError(
        f"The signature of '{bundle.path}' does not fit: key {signature.key_id[:16]}... signed it "
        f"on {signature.date}, and its manifest (written {written}) is not what was signed.",
        "If you changed the bundle yourself since (quantize, build, verify, report ... write to "
        "its manifest), sign it again. If not, do not use it.",
    )


def _key_bytes(path: Path, *, public: bool) -> bytes:
    """Return a PEM file's bytes, and refuse the other half of a pair by name."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_KEY_BYTES)
    except OSError as error:
        raise InputError(
            f"The key '{path}' cannot be read: {error.strerror or error}.",
            "Make a pair with `van-deploy sign --new-key FILE`.",
        ) from error
    if public and b"PRIVATE KEY-----" in content:
        raise InputError(
            f"'{path}' is a private key; a public one is wanted.",
            "Give the .pub file beside it, and keep the private one where it is.",
        )
    if not public and b"PUBLIC KEY-----" in content:
        raise InputError(
            f"'{path}' is a public key; only the private one signs.", "Give the file without .pub."
        )
    return content


def _no_key(path: Path, what: str) -> InputError:
    return InputError(
        f"'{path}' holds no {what} Ed25519 key in PEM form.",
        "Give a file made by `van-deploy sign --new-key FILE` or `openssl genpkey -algorithm "
        "ed25519`.",
    )


def _other_kind(path: Path, key: object) -> InputError:
    name = type(key).__name__.lstrip("_")
    return InputError(
        f"'{path}' holds another kind of key ({name}); Ed25519 is wanted.",
        "Make a pair with `van-deploy sign --new-key FILE`.",
    )


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that must not be there yet, with its mode from the first byte on."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    except OSError as error:
        raise InputError(
            f"The key '{path}' cannot be written: {error.strerror or error}.",
            "Choose another place with --new-key FILE.",
        ) from error

"""Signing a bundle's manifest with Ed25519, checking such a signature, and the keys for it.

The manifest names every file of the bundle with its SHA-256, so one signature
over it speaks for all of them. It lies beside the manifest as a small JSON file.
What is signed is the schema, the date and the manifest's bytes, each of the first
two ended by a newline. Keys are ordinary PEM files (PKCS #8 and SubjectPublicKeyInfo),
as OpenSSL writes and reads them.

Needs the package ``cryptography``.
"""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field

from van_deploy.bundle import MANIFEST, SIGNATURE, Bundle
from van_deploy.errors import BundleError, InputError, SignatureError, UsageError, needs_extra
from van_deploy.files import write_atomic
from van_deploy.manifest import manifest_from
from van_deploy.schema import Text, Versioned, read_versioned

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ed25519

SCHEMA: Final = "van-deploy/signature/1"
SIGNATURE_BYTES = 64  # RFC 8032
PASSWORD_VARIABLE = "VAN_DEPLOY_KEY_PASSWORD"
LARGEST_KEY_BYTES = 64 * 2**10  # a PEM key of this kind has 120
NEW_PAIR = "Make a pair with `van-deploy sign --new-key FILE`."


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


@dataclass(frozen=True)
class KeyPair:
    """A new pair of keys.

    Attributes:
        private_key: its file, mode 0600.
        has_password: whether a password protects it.
        public_key: its file.
        key_id: of the public key.
    """

    private_key: Path
    has_password: bool
    public_key: Path
    key_id: str


def sign_bundle(path: Path, key: ed25519.Ed25519PrivateKey) -> Signed:
    """Sign the bundle at ``path``; the signature replaces an older one.

    Raises:
        BundleError: a file of the bundle is missing, changed, or not in the manifest,
            so that a signature would not hold or not cover it.
    """
    bundle = Bundle.open(path)
    content = (bundle.path / MANIFEST).read_bytes()
    _require_whole(bundle, BundleError, "Nothing was signed. Make the bundle again.")
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    signature = Signature(
        schema=SCHEMA,
        algorithm="ed25519",
        key_id=key_id(key.public_key()),
        date=date,
        signature=base64.b64encode(key.sign(_signed_bytes(date, content))).decode(),
    )
    write_atomic(bundle.path / SIGNATURE, signature.text())
    return Signed(path, signature.key_id, date, len(bundle.digests))


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
    remedy = "Do not use this bundle; fetch it again, or have it signed again."
    return read_versioned(Signature, path, "signature", SignatureError, remedy)


def signed_bundle(path: Path, key: ed25519.Ed25519PublicKey) -> tuple[Bundle, Signed]:
    """Return the bundle at ``path`` and whose signature it has, after checking both whole.

    The signature must be this key's and fit the manifest, every file must have the
    digest the manifest names, and there may be no file that the manifest does not name.

    Raises:
        SignatureError: any of this is not so.
        BundleError: there is no bundle, or its manifest cannot be read.
    """
    from cryptography.exceptions import InvalidSignature

    bundle = Bundle.open(path)
    content = (bundle.path / MANIFEST).read_bytes()
    found, wanted = read_signature(bundle.path), key_id(key)
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
    if manifest_from(content.decode(), bundle.path / MANIFEST) != bundle.manifest:
        raise SignatureError(
            f"'{bundle.path}' was changed while its signature was checked.", "Check it again."
        )
    _require_whole(bundle, SignatureError, "Do not use this bundle; fetch it again.")
    return bundle, Signed(bundle.path, found.key_id, found.date, len(bundle.digests))


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


# --- keys ------------------------------------------------------------------------------------


def new_pair(path: Path, password: str = "") -> KeyPair:
    """Make a pair of keys.

    Args:
        path: of the private key, mode 0600; the public key goes beside it as ``.pub``.
        password: encrypts the private key; "" leaves it plain.

    Raises:
        UsageError: one of the files is there already; nothing is overwritten.
        InputError: a file cannot be written.
        MissingDependency: ``cryptography`` is not installed.
    """
    with needs_extra("A signature", "sign"):
        from cryptography.hazmat.primitives import serialization as pem
        from cryptography.hazmat.primitives.asymmetric import ed25519
    public = path.with_name(f"{path.name}.pub")
    for file in (path, public):
        if file.exists() or file.is_symlink():
            raise UsageError(
                f"'{file}' is there already, and keys are never overwritten.",
                "Choose another name with --new-key FILE.",
            )
    key = ed25519.Ed25519PrivateKey.generate()
    how = pem.BestAvailableEncryption(password.encode()) if password else pem.NoEncryption()
    secret = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, how)
    shown = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    _write_new(path, secret, 0o600)
    try:
        _write_new(public, shown, 0o644)
    except InputError:
        path.unlink()
        raise
    return KeyPair(path, bool(password), public, key_id(key.public_key()))


def key_id(key: ed25519.Ed25519PublicKey) -> str:
    """Return the SHA-256 of a public key's DER form, in hexadecimal.

    ``openssl pkey -pubin -in KEY.pub -outform DER | sha256sum`` prints the same.
    """
    from cryptography.hazmat.primitives import serialization as pem

    der = key.public_bytes(pem.Encoding.DER, pem.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def private_key_from(path: Path, password: str = "") -> ed25519.Ed25519PrivateKey:
    """Return the private key in a PEM file; ``password`` is for one that is encrypted.

    Raises:
        InputError: there is no such key in the file, or the password is missing or wrong.
        MissingDependency: ``cryptography`` is not installed.
    """
    key: ed25519.Ed25519PrivateKey = _key_from(path, "private", "public", password)
    return key


def public_key_from(path: Path) -> ed25519.Ed25519PublicKey:
    """Return the public key in a PEM file. Errors are :func:`private_key_from`'s."""
    key: ed25519.Ed25519PublicKey = _key_from(path, "public", "private")
    return key


def _key_from(path: Path, wanted: str, other: str, password: str = "") -> Any:
    with needs_extra("A signature", "sign"):
        from cryptography.hazmat.primitives import serialization as pem
        from cryptography.hazmat.primitives.asymmetric import ed25519
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_KEY_BYTES)
    except OSError as error:
        raise InputError(
            f"The key '{path}' cannot be read: {error.strerror or error}.", NEW_PAIR
        ) from error
    if f"{other.upper()} KEY-----".encode() in content:
        raise InputError(
            f"'{path}' is a {other} key; a {wanted} one is wanted.",
            "The private key signs and stays where it is; FILE.pub beside it checks.",
        )
    encrypted = b"ENCRYPTED" in content
    if encrypted and not password:
        raise InputError(
            f"The private key '{path}' is encrypted, and no password is given.",
            f"Put it in the environment variable {PASSWORD_VARIABLE}, or in a file and give "
            "--password-file FILE.",
        )
    key: object
    try:
        if wanted == "private":
            key = pem.load_pem_private_key(content, password.encode() if encrypted else None)
        else:
            key = pem.load_pem_public_key(content)
    except Exception as error:  # of many types, one for each way in which a file can be none
        if encrypted:
            raise InputError(
                f"The password does not open the private key '{path}'.",
                f"Check {PASSWORD_VARIABLE} or --password-file.",
            ) from error
        key = error
    kinds = {"private": ed25519.Ed25519PrivateKey, "public": ed25519.Ed25519PublicKey}
    if not isinstance(key, kinds[wanted]):
        found = key if isinstance(key, Exception) else type(key).__name__.lstrip("_")
        raise InputError(f"'{path}' holds no {wanted} Ed25519 key in PEM form: {found}.", NEW_PAIR)
    return key


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


def password_from(file: Path | None) -> str:
    """Return the password in the first line of a file, or in the environment; "" for none.

    Raises:
        InputError: the file cannot be read, or is empty.
    """
    if file is None:
        return os.environ.get(PASSWORD_VARIABLE, "")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The password file '{file}' cannot be read: {error}.") from error
    if not lines or not lines[0]:
        raise InputError(
            f"The password file '{file}' is empty.", "Write the password in its first line."
        )
    return lines[0]

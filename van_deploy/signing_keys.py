"""Ed25519 keys in PEM files: made, read, and told apart from what is none.

They are ordinary PEM files (PKCS #8 and SubjectPublicKeyInfo), as OpenSSL writes
and reads them. Needs the package ``cryptography``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.environment.packages import pip_command
from van_deploy.errors import InputError, MissingDependency, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

__all__ = [
    "PASSWORD_VARIABLE",
    "KeyPair",
    "key_id",
    "new_key",
    "new_pair",
    "password_from",
    "private_key_from",
    "public_key_from",
    "require_signing",
]

PASSWORD_VARIABLE = "VAN_DEPLOY_KEY_PASSWORD"
LARGEST_KEY_BYTES = 64 * 2**10  # a PEM key of this kind has 120


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


def new_pair(path: Path, password: str = "") -> KeyPair:
    """Make a pair of keys. Arguments and errors are those of :func:`new_key`."""
    public, name = new_key(path, password)
    return KeyPair(path, bool(password), public, name)


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

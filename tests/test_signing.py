"""A signed bundle is whole, of that key, and as it was signed; anything else is told."""

from __future__ import annotations

import base64
import hashlib
import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from tests.conftest import Cli
from tests.described import described, entry
from tests.each import each
from van_deploy.bundle import MANIFEST, SIGNATURE, Bundle, writing
from van_deploy.errors import BundleError, InputError, SignatureError, UsageError
from van_deploy.signing import (
    PASSWORD_VARIABLE,
    key_id,
    new_pair,
    private_key_from,
    public_key_from,
    read_signature,
    sign_bundle,
    signed_bundle,
)

FILES = ("model.onnx", "labels.txt", "engines/m.plan", "engines/m.json", "report.html")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return a bundle with a graph, an engine and its sidecar, and a report."""
    folder = tmp_path / "b"
    with writing(folder, name="m") as draft:
        for name in FILES:
            draft.file(name).write_text(f"the content of {name}")
        draft.description = described()
        draft.record(entry("fp32", "onnx", "fp32", "model.onnx", FILES[:2]))
        draft.record(entry("engine", "engine", "fp32", "engines/m.plan", FILES[2:4]))
    return folder


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return new_pair(tmp_path / "k.pem").private_key


@pytest.fixture
def public(key: Path) -> Path:
    return key.with_name("k.pem.pub")


@pytest.fixture
def signed(bundle: Path, key: Path) -> Path:
    sign_bundle(bundle, private_key_from(key))
    return bundle


def test_a_signature_of_the_whole_bundle_is_checked(signed: Path, public: Path) -> None:
    opened, found = signed_bundle(signed, public_key_from(public))
    assert opened.digests.keys() == set(FILES)
    assert (found.bundle, found.files) == (signed, len(FILES))
    assert found.key_id == read_signature(signed).key_id == key_id(public_key_from(public))


def test_signing_again_replaces_the_signature(signed: Path, public: Path, tmp_path: Path) -> None:
    other = new_pair(tmp_path / "other.pem")
    sign_bundle(signed, private_key_from(other.private_key))
    signed_bundle(signed, public_key_from(other.public_key))
    with pytest.raises(SignatureError, match="is signed with another key, "):
        signed_bundle(signed, public_key_from(public))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_digest(signed: Path) -> None:
    """Change a file and its digest in the manifest, as who wants not to be noticed would."""
    (signed / "model.onnx").write_text("another network")
    manifest = json.loads((signed / MANIFEST).read_text())
    digest = hashlib.sha256(b"another network").hexdigest()
    manifest["artefacts"]["fp32"]["files"]["model.onnx"] = digest
    (signed / MANIFEST).write_text(json.dumps(manifest, indent=2))
    Bundle.open(signed).verified("fp32")


def rewrite(signed: Path) -> None:
    with writing(signed) as draft:
        draft.checks["verify"] = {"passed": True}


def change_signature(**values: object) -> Callable[[Path], None]:
    def changed(signed: Path) -> None:
        document = json.loads((signed / SIGNATURE).read_text())
        (signed / SIGNATURE).write_text(json.dumps({**document, **values}))

    return changed


def write(name: str, text: str) -> Callable[[Path], None]:
    def written(signed: Path) -> None:
        (signed / name).parent.mkdir(exist_ok=True)
        (signed / name).write_text(text)

    return written


STALE, STRANGE = r"The signature of .* does not fit: key ", r"^1 files in .* are not in its manifes"
SPOILED: list[tuple[Callable[[Path], object], str]] = [
    *((lambda b, n=n: flip(b / n), f"/{n}' was changed after the manifest") for n in FILES),
    *((lambda b, n=n: (b / n).unlink(), f"/{n}' is named in the manifest and") for n in FILES),
    (edit_digest, STALE),
    (rewrite, STALE),
    (lambda b: (b / MANIFEST).write_bytes((b / MANIFEST).read_bytes() + b" "), STALE),
    (change_signature(date="2099-01-01T00:00:00+00:00"), STALE),
    (change_signature(signature=base64.b64encode(bytes(64)).decode()), STALE),
    (lambda b: (b / SIGNATURE).unlink(), r"is not signed: it has no manifest\.json\.sig"),
    (lambda b: (b / "more").symlink_to(b.parent), STRANGE),
    (write(".hidden", "x"), STRANGE),
    (write(".staging-x/model.onnx", "x"), STRANGE),
    *(
        (write(SIGNATURE, text), "is damaged")
        for text in ("", "[]", "null", "{}", "\0\0", "[" * 100_000, '{"schema": "x"')
    ),
    (write(SIGNATURE, '{"schema": "van-deploy/signature/9", "algorithm": "none"}'), "has schema"),
    (change_signature(algorithm="none"), "is damaged"),
    (change_signature(signature="AAAA"), "is damaged"),
    (change_signature(signature="!"), "is damaged"),
    (change_signature(date=3), "is damaged"),
    (change_signature(more="x"), "is damaged"),
]


@each(("spoil", "message"), SPOILED, fresh="signed")
def test_what_is_not_as_it_was_signed_is_told(
    signed: Path, public: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(signed)
    with pytest.raises(SignatureError, match=message) as caught:
        signed_bundle(signed, public_key_from(public))
    assert caught.value.exit_code == 5


def test_a_rewrite_keeps_the_stale_signature_and_signing_again_mends_it(
    signed: Path, key: Path, public: Path
) -> None:
    before = read_signature(signed)
    rewrite(signed)
    assert read_signature(signed) == before
    sign_bundle(signed, private_key_from(key))
    signed_bundle(signed, public_key_from(public))


@each(
    ("spoil", "message"),
    [
        (write("model.onnx", "other"), "was changed after the manifest was written"),
        (write(".hidden", "x"), STRANGE),
    ],
    fresh="bundle",
)
def test_a_bundle_that_is_not_whole_is_not_signed(
    bundle: Path, key: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(bundle)
    with pytest.raises(BundleError, match=message):
        sign_bundle(bundle, private_key_from(key))
    assert not (bundle / SIGNATURE).exists()


# --- keys ----------------------------------------------------------------------------------


def test_a_new_private_key_is_for_its_owner_alone(key: Path, public: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert public.read_bytes().startswith(b"-----BEGIN PUBLIC KEY-----")
    assert private_key_from(key, "a password that it does not need")


@each("there", ["k.pem", "k.pem.pub"])
def test_a_key_is_never_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(UsageError, match="is there already, and keys are never overwritten"):
        new_pair(tmp_path / "k.pem")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


def test_an_encrypted_key_wants_its_password(tmp_path: Path) -> None:
    new_pair(tmp_path / "k.pem", "secret")
    for password, message in (
        ("", "is encrypted, and no password is given"),
        ("wrong", "The password does not open the private key"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            private_key_from(tmp_path / "k.pem", password)
        assert PASSWORD_VARIABLE in caught.value.remedy
        assert "--password-file" in caught.value.remedy
    opened = private_key_from(tmp_path / "k.pem", "secret").public_key()
    assert key_id(opened) == key_id(public_key_from(tmp_path / "k.pem.pub"))


def pem_of(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, form: pem.PrivateFormat
) -> bytes:
    return key.private_bytes(pem.Encoding.PEM, form, pem.NoEncryption())


OURS = ed25519.Ed25519PrivateKey.generate()


@each(
    ("load", "content", "words"),
    [
        (private_key_from, b"", "holds no private Ed25519 key in PEM form"),
        (private_key_from, b"\0" * 100_000, "holds no private Ed25519 key in PEM form"),
        (
            private_key_from,
            b"-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----",
            "holds no private",
        ),
        (private_key_from, pem_of(OURS, pem.PrivateFormat.OpenSSH), "holds no private"),
        (
            private_key_from,
            pem_of(ec.generate_private_key(ec.SECP256R1()), pem.PrivateFormat.PKCS8),
            "holds no private Ed25519 key in PEM form: .*EC",
        ),
        (public_key_from, b"x", "holds no public Ed25519 key in PEM form"),
        (
            public_key_from,
            pem_of(OURS, pem.PrivateFormat.PKCS8),
            "is a private key; a public one is wanted",
        ),
        (
            private_key_from,
            OURS.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo),
            "is a public key; a private one is wanted",
        ),
        (private_key_from, None, r"cannot be read: No such file or directory\."),
        (public_key_from, None, r"cannot be read: No such file or directory\."),
        (new_pair, None, r"cannot be written: No such file or directory\."),
    ],
)
def test_a_file_that_is_no_such_key(
    tmp_path: Path, load: Callable[[Path], object], content: bytes | None, words: str
) -> None:
    path = tmp_path / "x" if content is not None else tmp_path / "absent/x"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        load(path)


# --- the commands --------------------------------------------------------------------------


def test_the_whole_way_on_the_command_line(
    cli: Cli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "release.pem"
    (tmp_path / "password").write_text("secret\nsecond line")
    with_password = ("--password-file", tmp_path / "password")
    assert cli("sign", "--new-key", key, *with_password, "--json").exit_code == 0
    refused = cli("sign", bundle, "--key", key)
    assert (refused.exit_code, refused.stdout) == (5, "")
    assert "is encrypted, and no password is given." in refused.stderr
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    key.chmod(0o644)
    signed = cli("sign", bundle, "--key", key)
    assert signed.exit_code == 0
    told = " ".join(signed.stderr.split())
    assert f"others on this machine may read or use '{key}'" in told
    result = cli("verify-signature", bundle, "--public-key", f"{key}.pub", "--json")
    assert (result.exit_code, json.loads(result.stdout)["files"]) == (0, len(FILES))
    table = cli("verify-signature", bundle, "--public-key", f"{key}.pub").stdout
    assert "5 files are what was signed, and there is no other" in table


@each(
    "arguments",
    [
        *(("sign",), ("sign", "b"), ("sign", "--key", "k"), ("sign", "b", "--new-key", "k")),
        ("sign", "--key", "k", "--new-key", "k"),
        ("build", "--matrix", "f.toml", "--require-signature", "k"),
    ],
)
def test_wrong_usage(cli: Cli, arguments: tuple[str, ...]) -> None:
    assert cli(*arguments).exit_code == 2


CONSUMERS = {
    "predict": ("{}", "x.png"),
    "serve": ("{}",),
    "build": ("{}",),
    "verify": ("{}",),
    "inspect": ("{}",),
    "evaluate": ("{}", "--images", "x"),
    "drift": ("{}",),
    "bench": ("{}",),
    "check": ("{}", "--baseline", "x.json", "--update"),
    "package": ("triton", "{}"),
}


@each("command", CONSUMERS, fresh="bundle")
def test_every_consumer_refuses_a_bundle_without_the_signature(
    cli: Cli, bundle: Path, key: Path, public: Path, command: str
) -> None:
    words = [command, *(word.format(bundle) for word in CONSUMERS[command])]
    missing = cli(*words, "--require-signature", public)
    assert (missing.exit_code, missing.stdout) == (5, "")
    assert missing.stderr.startswith(f"error: The bundle '{bundle}' is not signed")
    sign_bundle(bundle, private_key_from(key))
    if command == "inspect":  # the files here are no ONNX: it is their reader that refuses them
        taken = cli(*words, "--require-signature", public)
        assert (taken.exit_code, "is not an ONNX file" in taken.stderr) == (5, True)
    (bundle / "labels.txt").write_text("cat\n")
    edited = cli(*words, "--require-signature", public)
    assert (edited.exit_code, edited.stdout) == (5, "")
    assert f"'{bundle}/labels.txt' was changed" in edited.stderr


def test_without_cryptography_it_says_how_to_install_it(
    cli: Cli, bundle: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    commands = (
        ("sign", "--new-key", "k"),
        ("sign", bundle, "--key", public),
        ("verify-signature", bundle, "--public-key", public),
        ("inspect", bundle, "--require-signature", public),
    )
    for arguments in commands:
        result = cli(*arguments)
        assert result.exit_code == 3
        assert "A signature needs a package that is not installed" in result.stderr
        assert "pip install 'van-deploy[sign]'" in " ".join(result.stderr.split())

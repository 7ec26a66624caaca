"""Signatures of bundles: signing, verification, and every change that must be detected."""

import base64
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import van_deploy as vd
from tests.artifacts import Copy
from tests.conftest import Cli
from tests.each import each
from tests.json_documents import edit_json
from tests.manifest_parts import artifact_entry, network_info
from van_deploy.bundle import MANIFEST, Bundle, edit_bundle
from van_deploy.bundle.folder import SIGNATURE
from van_deploy.errors import BundleError, InputError, SignatureError
from van_deploy.signing import PASSWORD_VARIABLE, open_signed_bundle, sign_bundle

FILES = ("model.onnx", "labels.txt", "engines/m.plan", "engines/m.json", "report.html")
OURS = ed25519.Ed25519PrivateKey.generate()


def private(key: Any = OURS, form: Any = pem.PrivateFormat.PKCS8, password: str = "") -> bytes:
    how = pem.BestAvailableEncryption(password.encode()) if password else pem.NoEncryption()
    return bytes(key.private_bytes(pem.Encoding.PEM, form, how))


def public(key: ed25519.Ed25519PrivateKey = OURS) -> bytes:
    spki = pem.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(pem.Encoding.PEM, spki)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return a bundle with a graph, an engine and its sidecar, and a report."""
    folder = tmp_path / "b"
    with edit_bundle(folder, name="m") as draft:
        for name in FILES:
            draft.file(name).write_text(f"the content of {name}")
        draft.description = network_info()
        draft.record(artifact_entry("fp32", "onnx", "fp32", "model.onnx", FILES[:2]))
        draft.record(artifact_entry("engine", "engine", "fp32", "engines/m.plan", FILES[2:4]))
    return folder


@pytest.fixture
def key(tmp_path: Path) -> Path:
    (tmp_path / "k.pem").write_bytes(private())
    return tmp_path / "k.pem"


@pytest.fixture
def public_key(tmp_path: Path) -> Path:
    """Return the public key."""
    (tmp_path / "k.pem.pub").write_bytes(public())
    return tmp_path / "k.pem.pub"


@pytest.fixture
def signed(bundle: Path, key: Path) -> Path:
    sign_bundle(bundle, key)
    return bundle


def test_sign_and_verify(signed: Path, key: Path, public_key: Path) -> None:
    opened, signature = open_signed_bundle(signed, public_key)
    assert opened.digests.keys() == set(FILES)
    assert (signature.bundle, signature.files) == (signed, len(FILES))
    der = OURS.public_key().public_bytes(pem.Encoding.DER, pem.PublicFormat.SubjectPublicKeyInfo)
    assert signature.key_id == hashlib.sha256(der).hexdigest()
    rewrite(signed)
    assert (signed / SIGNATURE).exists()
    assert sign_bundle(signed / MANIFEST, key).bundle == signed  # replaces the stale signature
    open_signed_bundle(signed, public_key)
    key.write_bytes(private(ed25519.Ed25519PrivateKey.generate()))
    sign_bundle(signed, key)
    with pytest.raises(SignatureError, match="is signed with another key, "):
        open_signed_bundle(signed, public_key)


def edit_digest(signed: Path) -> None:
    """Change a file and its digest in the manifest, as an attacker would."""
    (signed / "model.onnx").write_text("another network")
    digest = hashlib.sha256(b"another network").hexdigest()
    edit_json(signed / MANIFEST, "artifacts fp32 files model.onnx", digest)
    Bundle.open(signed).verified_path("fp32")


def rewrite(signed: Path) -> None:
    with edit_bundle(signed) as draft:
        draft.checks["verify"] = {"passed": True}


def edit_signature(key: str, value: str) -> Callable[[Path], None]:
    return lambda signed: edit_json(signed / SIGNATURE, key, value)


def write(name: str, text: str) -> Callable[[Path], None]:
    def add(signed: Path) -> None:
        (signed / name).parent.mkdir(exist_ok=True)
        (signed / name).write_text(text)

    return add


STALE, UNLISTED = "The signature of .* is not valid", "^1 files in .* are not in its manifest"
CHANGES: list[tuple[Callable[[Path], object], str]] = [
    *((write(n, f"The content of {n}"), f"/{n}' was changed after the manifest") for n in FILES),
    *((lambda b, n=n: (b / n).unlink(), f"/{n}' is in the manifest, but") for n in FILES),
    (edit_digest, STALE),
    (rewrite, STALE),
    (lambda b: (b / MANIFEST).write_bytes((b / MANIFEST).read_bytes() + b" "), STALE),
    (edit_signature("date", "2099-01-01T00:00:00+00:00"), STALE),
    (edit_signature("signature", base64.b64encode(bytes(64)).decode()), STALE),
    (lambda b: (b / SIGNATURE).unlink(), r"is not signed: it has no manifest\.json\.sig"),
    (lambda b: (b / "more").symlink_to(b.parent), UNLISTED),
    (write(".hidden", "x"), UNLISTED),
    (write(".staging-x/model.onnx", "x"), UNLISTED),
    *((write(SIGNATURE, text), "is damaged") for text in ("", "[]", "{}", "\0", "[" * 100_000)),
    (write(SIGNATURE, '{"schema": "van-deploy/signature/9", "algorithm": "none"}'), "has schema"),
    (edit_signature("algorithm", "none"), "is damaged"),
    *((edit_signature("signature", text), "is damaged") for text in ("AAAA", "!")),
    (edit_signature("more", "x"), "is damaged"),
]


@each(("edit", "message"), CHANGES, fresh="signed")
def test_changes_after_signing_are_detected(
    signed: Path, public_key: Path, edit: Callable[[Path], object], message: str
) -> None:
    edit(signed)
    with pytest.raises(SignatureError, match=message) as caught:
        open_signed_bundle(signed, public_key)
    assert caught.value.exit_code == 5


def test_incomplete_bundles_are_not_signed(bundle: Path, key: Path) -> None:
    for name, message in ((".hidden", UNLISTED), ("model.onnx", "was changed after the manifest")):
        write(name, "other")(bundle)
        with pytest.raises(BundleError, match=message):
            sign_bundle(bundle, key)
    assert not (bundle / SIGNATURE).exists()


@each(
    ("kind", "content", "words"),
    [
        *(("private", text, "PEM form") for text in (b"", b"\0" * 100_000, public())),
        ("private", private(form=pem.PrivateFormat.OpenSSH), "PEM form"),
        ("private", private(ec.generate_private_key(ec.SECP256R1())), "it is an EC"),
        ("public", private(), "is not a readable public"),
        ("public", None, "No such file or directory"),
    ],
)
def test_invalid_keys(
    bundle: Path, tmp_path: Path, kind: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        (sign_bundle if kind == "private" else open_signed_bundle)(bundle, tmp_path / "x")
    assert PASSWORD_VARIABLE in caught.value.remedy
    assert not (bundle / SIGNATURE).exists()


def test_commands(
    cli: Cli, bundle: Path, key: Path, public_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key.write_bytes(private(password="secret"))
    for password in ("", "wrong"):
        monkeypatch.setenv(PASSWORD_VARIABLE, password)
        assert "assword" in cli.fails(5, "sign", bundle, "--key", key)
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    key.chmod(0o644)
    signed = cli("sign", bundle, "--key", key, "--json")
    assert signed.exit_code == 0
    assert "others on this machine may read" in " ".join(signed.stderr.split())
    verify = ("verify-signature", bundle, "--public-key", public_key)
    assert cli.document(*verify)["files"] == len(FILES)
    assert "5 files match the signature, and there are no others" in cli.passes(*verify)
    cli.fails(2, "sign", bundle)


CONSUMERS = [
    *(f"{name} {{}}" for name in ("serve", "build", "verify", "inspect", "drift", "bench")),
    *("predict {} x.png", "evaluate {} --images x", "package triton {}"),
    "check {} --baseline x.json --update",
]


@each("command", CONSUMERS, fresh="bundle")
def test_commands_refuse_unsigned_and_changed_bundles(
    cli: Cli, bundle: Path, key: Path, public_key: Path, command: str
) -> None:
    words = (command.format(bundle), "--require-signature", public_key)
    assert cli.fails(5, *words).startswith(f"error: The bundle '{bundle}' is not signed")
    sign_bundle(bundle, key)
    if command == "inspect {}":  # the signature is accepted, and the file is not ONNX
        assert "is not the ONNX file of a network" in cli(*words).stderr
    (bundle / "labels.txt").write_text("cat\n")
    assert f"'{bundle}/labels.txt' was changed" in cli.fails(5, *words)


def test_bench_leaves_a_signed_bundle_as_it_is(
    digits_bundle: Bundle, copy_bundle: Copy, key: Path, public_key: Path
) -> None:
    bundle = copy_bundle(digits_bundle)
    sign_bundle(bundle, key)
    options: Any = {"runners": ["ort-cpu"], "batches": [1], "roofline": False, "device": "cpu"}
    options |= {"seconds": 0.05, "calls": 1, "rounds": 1, "limit": 0.05, "warmup": 0.0}
    assert vd.open_bundle(bundle, require_signature=public_key).benchmark(**options).rows
    open_signed_bundle(bundle, public_key)


def test_missing_cryptography(
    cli: Cli, bundle: Path, public_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    for words in (("sign", "--key"), ("inspect", "--require-signature")):
        refused = cli.fails(3, words[0], bundle, words[1], public_key)
        assert "pip install 'van-deploy[sign]'" in refused

"""A signed bundle is whole, of that key, and as it was signed; anything else is told."""

from __future__ import annotations

import base64
import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from typer.testing import Result

from tests.conftest import Cli
from tests.described import described, entry
from tests.each import each
from van_deploy.bundle import MANIFEST, SIGNATURE, Bundle, writing
from van_deploy.errors import BundleError, InputError, SignatureError, UsageError
from van_deploy.signing import Signature, read_signature, sign_bundle, signed_bundle
from van_deploy.signing_keys import (
    PASSWORD_VARIABLE,
    key_id,
    new_key,
    private_key_from,
    public_key_from,
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
    new_key(tmp_path / "k.pem")
    return tmp_path / "k.pem"


@pytest.fixture
def public(key: Path) -> Path:
    return key.with_name("k.pem.pub")


@pytest.fixture
def signed(bundle: Path, key: Path) -> Path:
    sign_bundle(bundle, private_key_from(key))
    return bundle


def checked(bundle: Path, public: Path) -> Signature:
    return signed_bundle(bundle, public_key_from(public))[1]


def test_a_signature_of_the_whole_bundle_is_checked(signed: Path, public: Path) -> None:
    signature = checked(signed, public)
    assert signature == read_signature(signed)
    assert signature.key_id == key_id(public_key_from(public))
    assert signed_bundle(signed, public_key_from(public))[0].digests.keys() == set(FILES)


def test_a_report_is_named_by_the_manifest_too(bundle: Path) -> None:
    assert set(Bundle.open(bundle).manifest.files) == {"report.html"}
    assert Bundle.open(bundle).unnamed() == []


def test_signing_again_replaces_the_signature(signed: Path, public: Path, tmp_path: Path) -> None:
    new_key(tmp_path / "other.pem")
    sign_bundle(signed, private_key_from(tmp_path / "other.pem"))
    checked(signed, tmp_path / "other.pem.pub")
    with pytest.raises(SignatureError, match="is signed with another key, "):
        checked(signed, public)


@each("name", FILES, fresh="signed")
def test_one_flipped_bit_in_any_file_is_told(signed: Path, public: Path, name: str) -> None:
    content = bytearray((signed / name).read_bytes())
    content[len(content) // 2] ^= 1
    (signed / name).write_bytes(content)
    with pytest.raises(SignatureError, match=f"'{signed}/{name}' was changed after the manifest"):
        checked(signed, public)


@each("name", FILES, fresh="signed")
def test_a_missing_file_is_told(signed: Path, public: Path, name: str) -> None:
    (signed / name).unlink()
    with pytest.raises(SignatureError, match=f"'{signed}/{name}' is named in the manifest and"):
        checked(signed, public)


def edited_digest(signed: Path) -> None:
    """Change a file and its digest in the manifest, as who wants not to be noticed would."""
    (signed / "model.onnx").write_text("another network")
    manifest = json.loads((signed / MANIFEST).read_text())
    import hashlib

    digest = hashlib.sha256(b"another network").hexdigest()
    manifest["artefacts"]["fp32"]["files"]["model.onnx"] = digest
    (signed / MANIFEST).write_text(json.dumps(manifest, indent=2))
    Bundle.open(signed).verified("fp32")


def flipped_byte(signed: Path) -> None:
    content = (signed / MANIFEST).read_bytes()
    (signed / MANIFEST).write_bytes(content.replace(b'"name": "m"', b'"name": "n"'))


def rewritten(signed: Path) -> None:
    with writing(signed) as draft:
        draft.checks["verify"] = {"passed": True}


def added_space(signed: Path) -> None:
    (signed / MANIFEST).write_bytes((signed / MANIFEST).read_bytes() + b" ")


def other_date(signed: Path) -> None:
    text = (signed / SIGNATURE).read_text()
    date = json.loads(text)["date"]
    (signed / SIGNATURE).write_text(text.replace(date, "2099-01-01T00:00:00+00:00"))


def flipped_signature(signed: Path) -> None:
    document = json.loads((signed / SIGNATURE).read_text())
    raw = bytearray(base64.b64decode(document["signature"]))
    raw[5] ^= 1
    document["signature"] = base64.b64encode(raw).decode()
    (signed / SIGNATURE).write_text(json.dumps(document))


@each(
    "change",
    [edited_digest, flipped_byte, rewritten, added_space, other_date, flipped_signature],
    fresh="signed",
)
def test_what_was_changed_after_signing_does_not_fit(
    signed: Path, public: Path, change: Callable[[Path], None]
) -> None:
    change(signed)
    with pytest.raises(SignatureError, match=r"The signature of .* does not fit: key ") as caught:
        checked(signed, public)
    assert caught.value.remedy.startswith("If you changed the bundle yourself since")
    assert caught.value.exit_code == 5


def test_a_rewrite_keeps_the_stale_signature_and_signing_again_mends_it(
    signed: Path, key: Path, public: Path
) -> None:
    before = read_signature(signed)
    rewritten(signed)
    assert read_signature(signed) == before
    sign_bundle(signed, private_key_from(key))
    checked(signed, public)


def link_to_a_folder(bundle: Path) -> None:
    (bundle / "more").symlink_to(bundle.parent)


def hidden_file(bundle: Path) -> None:
    (bundle / ".hidden").write_text("x")


def left_staging(bundle: Path) -> None:
    (bundle / ".staging-x").mkdir()
    (bundle / ".staging-x/model.onnx").write_text("x")


@each("add", [link_to_a_folder, hidden_file, left_staging], fresh="bundle")
def test_what_the_manifest_does_not_name_is_refused(
    bundle: Path, key: Path, public: Path, add: Callable[[Path], None]
) -> None:
    sign_bundle(bundle, private_key_from(key))
    add(bundle)
    with pytest.raises(SignatureError, match=r"^1 files in .* are not in its manifest"):
        checked(bundle, public)
    with pytest.raises(BundleError, match=r"^1 files in .* are not in its manifest"):
        sign_bundle(bundle, private_key_from(key))


def test_a_bundle_with_a_changed_file_is_not_signed(bundle: Path, key: Path) -> None:
    (bundle / "model.onnx").write_text("other")
    with pytest.raises(BundleError, match="was changed after the manifest was written"):
        sign_bundle(bundle, private_key_from(key))
    assert not (bundle / SIGNATURE).exists()


def test_an_unsigned_bundle_says_so(bundle: Path, public: Path) -> None:
    with pytest.raises(SignatureError, match=r"is not signed: it has no manifest\.json\.sig"):
        checked(bundle, public)


@each(
    "text",
    [
        *("", "[]", "null", "{}", "\0\0", "[" * 100_000, '{"schema": "van-deploy/signature/1"}'),
        '{"schema": "van-deploy/signature/9", "algorithm": "none"}',
    ],
    fresh="signed",
)
def test_a_damaged_signature_is_one_sentence(signed: Path, public: Path, text: str) -> None:
    (signed / SIGNATURE).write_text(text)
    with pytest.raises(SignatureError, match=r"is damaged|has schema"):
        checked(signed, public)


@each(
    ("field", "value"),
    [("algorithm", "none"), ("signature", "AAAA"), ("signature", "!"), ("date", 3), ("more", "x")],
    fresh="signed",
)
def test_a_signature_of_another_form_is_damaged(
    signed: Path, public: Path, field: str, value: object
) -> None:
    document = {**json.loads((signed / SIGNATURE).read_text()), field: value}
    (signed / SIGNATURE).write_text(json.dumps(document))
    with pytest.raises(SignatureError, match="is damaged"):
        checked(signed, public)


# --- keys ----------------------------------------------------------------------------------


def test_a_new_private_key_is_for_its_owner_alone(key: Path, public: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert public.read_bytes().startswith(b"-----BEGIN PUBLIC KEY-----")


@each("there", ["k.pem", "k.pem.pub"])
def test_a_key_is_never_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(UsageError, match="is there already, and keys are never overwritten"):
        new_key(tmp_path / "k.pem")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


def test_a_key_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written: No such file or directory\."):
        new_key(tmp_path / "absent/k.pem")


def test_an_encrypted_key_wants_its_password(tmp_path: Path) -> None:
    new_key(tmp_path / "k.pem", "secret")
    with pytest.raises(InputError, match="is encrypted, and no password is given") as caught:
        private_key_from(tmp_path / "k.pem")
    assert PASSWORD_VARIABLE in caught.value.remedy
    assert "--password-file" in caught.value.remedy
    with pytest.raises(InputError, match="The password does not open the private key"):
        private_key_from(tmp_path / "k.pem", "wrong")
    opened = private_key_from(tmp_path / "k.pem", "secret").public_key()
    assert key_id(opened) == key_id(public_key_from(tmp_path / "k.pem.pub"))


def test_a_password_for_a_plain_key_is_not_needed(key: Path) -> None:
    assert private_key_from(key, "anything")


def pem_of(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, form: pem.PrivateFormat
) -> bytes:
    return key.private_bytes(pem.Encoding.PEM, form, pem.NoEncryption())


@each(
    ("content", "words"),
    [
        (b"", "holds no private Ed25519 key in PEM form"),
        (b"\0" * 100_000, "holds no private Ed25519 key in PEM form"),
        (b"-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----", "holds no private"),
        (
            pem_of(ed25519.Ed25519PrivateKey.generate(), pem.PrivateFormat.OpenSSH),
            "holds no private",
        ),
        (
            pem_of(ec.generate_private_key(ec.SECP256R1()), pem.PrivateFormat.PKCS8),
            "holds another kind of key",
        ),
    ],
)
def test_a_file_that_is_no_private_key(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=words):
        private_key_from(tmp_path / "x")


def test_the_other_half_of_a_pair_is_named(key: Path, public: Path) -> None:
    with pytest.raises(InputError, match=r"k\.pem' is a private key; a public one is wanted"):
        public_key_from(key)
    with pytest.raises(InputError, match="is a public key; only the private one signs"):
        private_key_from(public)


@each("load", [private_key_from, public_key_from])
def test_a_key_that_is_not_there(tmp_path: Path, load: Callable[[Path], object]) -> None:
    with pytest.raises(InputError, match=r"cannot be read: No such file or directory\."):
        load(tmp_path / "absent")


# --- the commands --------------------------------------------------------------------------


def test_the_whole_way_on_the_command_line(
    cli: Cli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "release.pem"
    (tmp_path / "password").write_text("secret\nsecond line")
    with_password = ("--password-file", tmp_path / "password")
    assert cli("sign", "--new-key", key, *with_password).exit_code == 0
    refused = cli("sign", bundle, "--key", key)
    assert (refused.exit_code, refused.stdout) == (5, "")
    assert "is encrypted, and no password is given." in refused.stderr
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    assert cli("sign", bundle, "--key", key).exit_code == 0
    result = cli("verify-signature", bundle, "--public-key", f"{key}.pub", "--json")
    assert (result.exit_code, json.loads(result.stdout)["files"]) == (0, len(FILES))
    table = cli("verify-signature", bundle, "--public-key", f"{key}.pub").stdout
    assert "5 files are what was signed, and there is no other" in table


def test_a_key_others_can_read_is_remarked(cli: Cli, bundle: Path, key: Path) -> None:
    key.chmod(0o644)
    assert f"others on this machine may read or use '{key}'" in " ".join(
        cli("sign", bundle, "--key", key).stderr.split()
    )


@each(
    "arguments",
    [(), ("b",), ("--key", "k"), ("b", "--new-key", "k"), ("--key", "k", "--new-key", "k")],
)
def test_wrong_usage(cli: Cli, arguments: tuple[str, ...]) -> None:
    assert cli("sign", *arguments).exit_code == 2


CONSUMERS = {
    "predict": ("x.png",),
    "serve": (),
    "build": (),
    "verify": (),
    "inspect": (),
    "evaluate": ("--images", "x"),
    "drift": (),
    "bench": (),
    "check": ("--baseline", "x.json", "--update"),
}


def consumed(cli: Cli, command: str, bundle: Path, public: Path) -> Result:
    before = ("triton",) if command == "package" else ()
    options = ("--require-signature", public)
    return cli(command, *before, bundle, *CONSUMERS.get(command, ()), *options)


@each("command", [*CONSUMERS, "package"], fresh="bundle")
def test_every_consumer_refuses_a_bundle_without_the_signature(
    cli: Cli, bundle: Path, key: Path, public: Path, command: str
) -> None:
    missing = consumed(cli, command, bundle, public)
    assert (missing.exit_code, missing.stdout) == (5, "")
    assert missing.stderr.startswith(f"error: The bundle '{bundle}' is not signed")
    sign_bundle(bundle, private_key_from(key))
    (bundle / "labels.txt").write_text("cat\n")
    edited = consumed(cli, command, bundle, public)
    assert (edited.exit_code, edited.stdout) == (5, "")
    assert f"'{bundle}/labels.txt' was changed" in edited.stderr


def test_inspect_takes_a_signed_bundle_up_to_its_content(
    cli: Cli, signed: Path, public: Path
) -> None:
    """The files here are no ONNX: it is the reader that refuses them, not the signature."""
    result = consumed(cli, "inspect", signed, public)
    assert result.exit_code == 5
    assert "model.onnx" in result.stderr
    assert "is not an ONNX file" in result.stderr


def test_a_matrix_is_not_covered_by_one_signature(cli: Cli, public: Path) -> None:
    result = cli("build", "--matrix", "f.toml", "--require-signature", public)
    assert result.exit_code == 2


def test_without_cryptography_it_says_how_to_install_it(
    cli: Cli, bundle: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "cryptography" else found(name)
    )
    commands = (
        ("sign", "--new-key", "k"),
        ("sign", bundle, "--key", "k"),
        ("verify-signature", bundle, "--public-key", public),
        ("inspect", bundle, "--require-signature", public),
    )
    for arguments in commands:
        result = cli(*arguments)
        assert result.exit_code == 3
        assert "Signatures need the package 'cryptography'" in result.stderr
        assert "install cryptography`" in result.stderr

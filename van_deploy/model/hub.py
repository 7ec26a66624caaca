"""Weights from the Hugging Face hub: found, downloaded, checked.

Downloads, caching, resuming and revisions are ``huggingface_hub``'s, with the
mirror in ``HF_ENDPOINT`` if there is one and the user's token for gated
repositories. ``locate_weights`` needs neither the network nor any heavy import.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from van_deploy.errors import DownloadError, UsageError
from van_deploy.model.digests import hub_cache
from van_deploy.model.variants import CONFIG, PROCESSOR, HubFile, Variant, variant_named

__all__ = ["Progress", "choose_file", "fetch_weights", "locate_weights"]

Progress = Callable[[str, int, "int | None"], None]
"""Called with a file's name, the bytes that are here, and those there will be (or None)."""

_PREFERRED = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = re.compile(r"\.(safetensors|bin|pth|pt|ckpt|pth\.tar)$", re.IGNORECASE)


class _UnreachableError(DownloadError):
    """The hub did not answer, or broke off."""


def locate_weights(variant: str | Variant) -> Path | None:
    """Return where a variant's public weights are on this machine, or None.

    Looks in the hub's cache only: no network, nothing heavy imported.

    Raises:
        UsageError: there is no such variant.
    """
    known = variant_named(variant) if isinstance(variant, str) else variant
    if known.weights is None:
        return None
    snapshot = _snapshot(known.weights.repo_id, known.weights.revision)
    path = snapshot / known.weights.filename if snapshot else None
    return path if path and path.is_file() else None


def fetch_weights(
    repo_id: str,
    filename: str | None = None,
    *,
    revision: str = "main",
    offline: bool = False,
    progress: Progress | None = None,
) -> tuple[HubFile, Path, str, tuple[str, ...]]:
    """Return a repository's weights file, its place here, its SHA-256, and notes.

    It is downloaded if it is not here yet; the JSON beside it in the repository lies beside
    it here.

    Args:
        repo_id: ``owner/name``.
        filename: the file to take; without it, the one that can be meant.
        revision: a commit, branch or tag.
        offline: use only what is in the cache (also ``HF_HUB_OFFLINE=1``).
        progress: told how much is here.

    Raises:
        DownloadError: no network, no such repository or file, no permission, no
            room, or another digest than the hub announced.
        UsageError: the repository has several files that could be meant.
    """
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    snapshot = _snapshot(repo_id, revision)
    notes: tuple[str, ...] = ()
    here = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*")] if snapshot else []
    names = here
    if not offline and not (snapshot and snapshot.name == revision and filename in here):
        try:
            with _clear_errors(repo_id, None):
                info = _api().model_info(repo_id, revision=revision)
                names = [sibling.rfilename for sibling in info.siblings or ()]
        except _UnreachableError as error:
            if not here or (filename and filename not in here):
                raise
            offline = True
            notes = (f"the copy in the cache, since the hub cannot be asked: {error.message}",)
    if not names:
        raise _not_cached(repo_id, filename)
    chosen = filename or choose_file(names, repo_id)
    folder = chosen[: chosen.rfind("/") + 1]
    beside = [folder + name for name in (CONFIG, PROCESSOR) if folder + name in names]
    path, *_ = [_download(repo_id, name, revision, offline, progress) for name in (chosen, *beside)]
    file = HubFile(repo_id, chosen, revision)
    return file, path, _checked_digest(path, file), notes


def choose_file(names: Iterable[str], where: str) -> str:
    """Return the one weights file among ``names`` that can be meant.

    ``model.safetensors`` before ``pytorch_model.bin``, else the only one there is.

    Raises:
        UsageError: there is none, or several; they are listed.
    """
    names = sorted(names)
    found = [name for name in _PREFERRED if name in names][:1]
    found = found or [name for name in names if _WEIGHTS.search(name)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(
            f"{where} has no weights that PyTorch can read (it has {', '.join(names[:8])}).",
            "Pass a repository with a .safetensors, .bin, .pth or .pth.tar file.",
        )
    raise UsageError(
        f"{where} has {len(found)} weights files: {', '.join(found[:10])}.",
        f"Say which: {where}:{found[0]}",
    )


def _snapshot(repo_id: str, revision: str) -> Path | None:
    """Return the cached snapshot of a repository's revision."""
    folder = hub_cache() / f"models--{repo_id.replace('/', '--')}"
    commit = revision
    with contextlib.suppress(OSError):
        commit = (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _download(
    repo_id: str, name: str, revision: str, offline: bool, progress: Progress | None
) -> Path:
    with _clear_errors(repo_id, name):
        path = _api().hf_hub_download(
            repo_id,
            name,
            revision=revision,
            cache_dir=hub_cache(),
            local_files_only=offline,
            tqdm_class=_progress_class(name, progress),
        )
    return Path(path)


def _progress_class(name: str, progress: Progress | None) -> Any:
    """Return a progress bar for huggingface_hub that draws nothing and reports."""
    from huggingface_hub.utils.tqdm import tqdm

    class Reported(tqdm):  # type: ignore[type-arg, unused-ignore]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call, unused-ignore]
            self.total = options.get("total")
            self.n = options.get("initial") or 0

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if progress is not None:
                progress(name, int(self.n), self.total)

    return Reported


def _checked_digest(path: Path, file: HubFile) -> str:
    from van_deploy.files import file_sha256

    digest, blob = file_sha256(path), path.resolve()
    # The hub names large files' blobs by their SHA-256.
    if re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != digest:
        remedy = "Remove that file and try again."
        with contextlib.suppress(OSError):  # a cache that may only be read
            blob.unlink()
            remedy = "It was removed from the cache: try again, and check HF_ENDPOINT if it is set."
        raise DownloadError(
            f"{file} is damaged: the hub announced the SHA-256 {blob.name}, "
            f"the file at {blob} has {digest}.",
            remedy,
        )
    return digest


# --- errors --------------------------------------------------------------------------------


def _not_cached(repo_id: str, name: str | None) -> DownloadError:
    what = f"{repo_id}/{name}" if name else repo_id
    return DownloadError(
        f"{what} is not in the cache ({hub_cache()}), and this is offline.",
        "Run once without --offline, or pass a file with --weights FILE.",
    )


@contextmanager
def _clear_errors(repo_id: str, name: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into an error that says what to do.

    Raises:
        DownloadError: the hub cannot be reached, or has or gives no such thing.
        UsageError: the repository's name is impossible.
    """
    from huggingface_hub import errors

    here = f" ({os.environ['HF_ENDPOINT']})" if os.environ.get("HF_ENDPOINT") else ""
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError:
        message = f"{repo_id} is gated: its owners must let you in."
        remedy = f"Ask for access on its page, then {log_in}."
    except errors.RepositoryNotFoundError:
        message = f"There is no repository {repo_id} on the hub{here}, or it is private."
        remedy = f"Check the name, and that no path was meant; for a private one, {log_in}."
    except errors.RevisionNotFoundError:
        message = f"The repository {repo_id} has no such revision."
        remedy = f"See https://huggingface.co/{repo_id}/commits/main for those it has."
    except errors.HFValidationError as error:
        raise UsageError(
            f"'{repo_id}' is no repository: {error}", "Repositories are owner/name."
        ) from None
    except Exception as error:
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
            raise _not_cached(repo_id, name) from None
        if not isinstance(error, errors.EntryNotFoundError) or cause is not error:
            raise _unreachable(f"{repo_id}/{name}" if name else repo_id, here, cause) from None
        message = f"The repository {repo_id} has no file {name}."
        remedy = f"See https://huggingface.co/{repo_id}/tree/main for what it has."
    else:
        return
    raise DownloadError(message, remedy)


def _unreachable(what: str, here: str, error: BaseException) -> DownloadError:
    import huggingface_hub

    # The next download begins with a new connection: this one's may be half dead.
    getattr(huggingface_hub, "close_session", lambda: None)()  # from huggingface_hub 1 on
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if isinstance(error, OSError) and error.strerror:
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return _UnreachableError(
        f"{what} could not be downloaded{here}: {reason}.",
        "Check the network, the room on the disk, and HF_ENDPOINT if a mirror is set; or "
        "download the file elsewhere and pass it with --weights FILE.",
    )

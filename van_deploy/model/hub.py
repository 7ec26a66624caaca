"""The Hugging Face hub: what a repository has, and its files, downloaded.

Downloads, caching, resuming and revisions are ``huggingface_hub``'s, with the mirror in
``HF_ENDPOINT`` if there is one and the user's token for gated repositories.
:func:`locate_weights` needs neither the network nor any heavy import.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from van_deploy.errors import DownloadError, UsageError, VanDeployError
from van_deploy.model.variants import HubFile, Variant

Progress = Callable[[str, int, "int | None"], None]
"""Called with a file's name, the bytes that are here, and those there will be (or None)."""


class _UnreachableError(DownloadError):
    """The hub did not answer, or broke off."""


def locate_weights(variant: Variant) -> Path | None:
    """Return where a variant's public weights are in the hub's cache, or None."""
    file = variant.weights
    snapshot = _snapshot(file.repo_id, file.revision) if file else None
    path = snapshot / file.filename if file and snapshot else None
    return path if path and path.is_file() else None


def known_files(file: HubFile, offline: bool) -> tuple[list[str], bool, tuple[str, ...]]:
    """Return what files a repository has, whether only the cache can be used, and what to tell.

    Raises:
        DownloadError: there is no such repository, or the hub cannot be asked and the cache
            does not have it.
    """
    from huggingface_hub import errors

    repo_id, wanted, revision = file.repo_id, file.filename, file.revision
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    snapshot = _snapshot(repo_id, revision)
    here = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*")] if snapshot else []
    is_commit = snapshot is not None and snapshot.name == revision
    if here and (offline or (is_commit and wanted in here)):
        return here, offline, ()
    try:
        with _clear_errors(repo_id, wanted if offline else ""):
            if offline:
                raise errors.OfflineModeIsEnabled
            siblings = _api().model_info(repo_id, revision=revision).siblings
    except _UnreachableError as error:
        if not here or (wanted and wanted not in here):
            raise
        note = f"the copy in the cache, since the hub cannot be asked: {error.message}"
        return here, True, (note,)
    return [sibling.rfilename for sibling in siblings or ()], offline, ()


def cache_folder() -> Path:
    """Return ``$VAN_DEPLOY_CACHE``, else ``van-deploy`` in the user's cache; it may not exist."""
    return Path(os.environ.get("VAN_DEPLOY_CACHE") or _user_cache() / "van-deploy")


def hub_cache() -> Path:
    """Return the hub's cache folder, as ``huggingface_hub`` would choose it now."""
    home = os.environ.get("HF_HOME") or _user_cache() / "huggingface"
    return Path(
        os.path.expandvars(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    ).expanduser()


def _user_cache() -> Path:
    """Return ``$XDG_CACHE_HOME``, else ``~/.cache``, else this user's in the temporary folder."""
    home = os.path.expanduser("~")
    if not os.path.isdir(home):
        home = os.path.join(tempfile.gettempdir(), f"home-{getattr(os, 'getuid', int)()}")
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache"))


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


def download(
    repo_id: str, name: str, revision: str, offline: bool, progress: Progress | None
) -> Path:
    """Return a repository's file in the cache, downloaded if it is not there yet.

    Raises:
        DownloadError: it cannot be had.
    """
    from huggingface_hub.utils.tqdm import tqdm

    class Reported(tqdm):  # type: ignore[type-arg, unused-ignore]
        """A progress bar that draws nothing and reports."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call, unused-ignore]
            self.total, self.n = options.get("total"), options.get("initial") or 0

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if progress is not None:
                progress(name, int(self.n), self.total)

    with _clear_errors(repo_id, name):
        path = _api().hf_hub_download(
            repo_id,
            name,
            revision=revision,
            cache_dir=hub_cache(),
            local_files_only=offline,
            tqdm_class=Reported,
        )
    return Path(path)


@contextlib.contextmanager
def _clear_errors(repo_id: str, name: str = "") -> Iterator[None]:
    """Turn whatever huggingface_hub raises into an error that says what to do."""
    try:
        yield
    except Exception as error:
        raise _explained(error, repo_id, name) from None


def _explained(error: Exception, repo_id: str, name: str) -> VanDeployError:
    import huggingface_hub
    from huggingface_hub import errors

    what = f"{repo_id}/{name}" if name else repo_id
    here = f" ({os.environ['HF_ENDPOINT']})" if os.environ.get("HF_ENDPOINT") else ""
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
        return DownloadError(
            f"{what} is not in the cache ({hub_cache()}), and this is offline.",
            "Run once without --offline, or pass a file with --weights FILE.",
        )
    for kind, told in (
        (errors.GatedRepoError, f"{repo_id} is gated: its owners must let you in"),
        (errors.RepositoryNotFoundError, f"There is no repository {repo_id}, or it is private"),
        (errors.RevisionNotFoundError, f"The repository {repo_id} has no such revision"),
        (errors.EntryNotFoundError, f"The repository {repo_id} has no file {name}"),
        (errors.HFValidationError, f"'{repo_id}' is no repository: {cause}"),
    ):
        if isinstance(cause, kind):
            return (UsageError if kind is errors.HFValidationError else DownloadError)(
                f"{told}{here}.",
                f"See https://huggingface.co/{repo_id}, and that no path was meant; what is "
                "private or gated needs `hf auth login` or HF_TOKEN.",
            )
    # The next download begins with a new connection: this one's may be half dead.
    getattr(huggingface_hub, "close_session", lambda: None)()  # from huggingface_hub 1 on
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
    return _UnreachableError(
        f"{what} could not be downloaded{here}: {reason}.",
        "Check the network, the room on the disk, and HF_ENDPOINT if a mirror is set; or "
        "download the file elsewhere and pass it with --weights FILE.",
    )

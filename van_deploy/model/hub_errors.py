"""What can go wrong with the hub, in sentences that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from van_deploy.errors import DownloadError, UsageError
from van_deploy.model.digests import hub_cache

__all__ = ["clear_errors", "not_cached"]


def not_cached(repo_id: str, name: str | None) -> DownloadError:
    """Return the error for a file that is needed offline and not here."""
    what = f"{repo_id}/{name}" if name else repo_id
    return DownloadError(
        f"{what} is not in the cache ({hub_cache()}), and this is offline.",
        "Run once without --offline, or pass a file with --weights FILE.",
    )


@contextmanager
def clear_errors(repo_id: str, name: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into an error that says what to do.

    Raises:
        DownloadError: the hub cannot be reached, or has or gives no such thing.
        UsageError: the repository's name is impossible.
    """
    from huggingface_hub import errors

    what = f"{repo_id}/{name}" if name else repo_id
    here = f" ({os.environ['HF_ENDPOINT']})" if os.environ.get("HF_ENDPOINT") else ""
    try:
        yield
    except errors.GatedRepoError:
        raise DownloadError(
            f"{repo_id} is gated: its owners must let you in.",
            "Ask for access on its page, then log in with `hf auth login` or set HF_TOKEN.",
        ) from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(
            f"There is no repository {repo_id} on the hub{here}, or it is private.",
            "Check the name; for a private one, log in with `hf auth login` or set HF_TOKEN. "
            f"(There is no file {repo_id} here either.)",
        ) from None
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled) or error.__cause__ is None:
            raise not_cached(repo_id, name) from None
        raise _unreachable(what, here, error.__cause__) from None
    except errors.EntryNotFoundError:
        raise DownloadError(
            f"The repository {repo_id} has no file {name}.",
            f"See https://huggingface.co/{repo_id}/tree/main for what it has.",
        ) from None
    except errors.HFValidationError as error:
        raise UsageError(
            f"'{repo_id}' is no repository: {error}", "Repositories are owner/name."
        ) from None
    except errors.OfflineModeIsEnabled:
        raise not_cached(repo_id, name) from None
    except Exception as error:
        _forget_connections()
        raise _unreachable(what, here, error) from None


def _forget_connections() -> None:
    """Let the next download begin with a new connection: this one's may be half dead."""
    import huggingface_hub

    close = getattr(huggingface_hub, "close_session", None)  # from huggingface_hub 1 on
    if close is not None:
        close()


def _unreachable(what: str, here: str, error: BaseException) -> DownloadError:
    first = str(error).strip().splitlines()
    reason = first[0].rstrip(".") if first else type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        reason = f"{error.strerror}: {error.filename}"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return DownloadError(
        f"{what} could not be downloaded{here}: {reason}.",
        "Check the network, the room on the disk, and HF_ENDPOINT if a mirror is set; or "
        "download the file elsewhere and pass it with --weights FILE.",
    )

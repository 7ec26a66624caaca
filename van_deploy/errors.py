"""Every error a user can meet, and the exit code each one ends the command with.

::

    VanDeployError
    ├── GateFailed            1   a check ran and its gate was not met
    ├── UsageError            2   the request itself makes no sense
    ├── MissingDependency     3   something is missing from the environment
    ├── ConversionError       4   a conversion or a build failed
    └── InputError            5   bad weights, images, recipe or bundle
        ├── CheckpointError
        ├── DownloadError
        ├── ImageError
        ├── RecipeError
        └── BundleError
            └── SignatureError

An error carries three sentences: what failed (with what was given) and what to
do next. Anything that is not a :class:`VanDeployError` is a fault of this
program and keeps its traceback.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class VanDeployError(Exception):
    """Base of every error that is not a bug in this program.

    Args:
        message: what failed and what was given, one or two sentences.
        remedy: what to do next, one sentence in the imperative.
    """

    exit_code = 4

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        """Return the message followed by the remedy, if there is one."""
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class GateFailed(VanDeployError):
    """A check ran to its end and its gate was not met."""

    exit_code = 1


class UsageError(VanDeployError):
    """The request is contradictory or names something that does not exist."""

    exit_code = 2


class MissingDependency(VanDeployError):
    """A package, driver or device that the request needs is not here."""

    exit_code = 3


class ConversionError(VanDeployError):
    """A conversion or a build failed, or its result was refused."""

    exit_code = 4


class InputError(VanDeployError):
    """Something the user handed over cannot be used."""

    exit_code = 5


class CheckpointError(InputError):
    """A checkpoint cannot be read, is not a VAN, or is damaged."""


class DownloadError(InputError):
    """Weights could not be fetched, or are not the ones that were promised."""


class ImageError(InputError):
    """An image or a folder of images cannot be used."""


class RecipeError(InputError):
    """A recipe or a calibration manifest is wrong; names the file and the key."""


class BundleError(InputError):
    """A bundle is missing, damaged, or does not match its manifest."""


class SignatureError(BundleError):
    """A bundle is not signed, not by the key that was asked for, or not as it was signed."""


@contextlib.contextmanager
def require_extra(what: str, extra: str) -> Iterator[None]:
    """Tell an import that fails in the block as an extra to install.

    Args:
        what: needs it, at the beginning of a sentence.
        extra: of this package, such as ``serve``.

    Raises:
        MissingDependency: an import failed.
    """
    try:
        yield
    except (ImportError, RuntimeError) as error:  # tritonclient raises RuntimeError without gRPC
        raise MissingDependency(
            f"{what} needs a package that is not installed: {error}.",
            f"Install it with `pip install 'van-deploy[{extra}]'`.",
        ) from error

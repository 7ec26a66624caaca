"""Errors that are reported to the user, and the exit code of each.

::

    VanDeployError
    ├── GateFailed            1   a check ran and a limit was exceeded
    ├── UsageError            2   the request is invalid
    ├── MissingDependency     3   something is missing from the environment
    ├── ConversionError       4   a conversion or a build failed
    └── InputError            5   bad weights, images, recipe or bundle
        ├── CheckpointError
        ├── DownloadError
        ├── ImageError
        ├── RecipeError
        └── BundleError
            └── SignatureError

The message of an error says what failed and for which input, its remedy what to do next.
An exception of another class is a bug in this program and keeps its traceback.
"""

import contextlib
from collections.abc import Iterator


class VanDeployError(Exception):
    """Base of every error that is not a bug in this program.

    Args:
        message: what failed, and for which input; one or two sentences.
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
    """A check ran to its end and a limit was exceeded."""

    exit_code = 1


class UsageError(VanDeployError):
    """The request has conflicting options, or names something that does not exist."""

    exit_code = 2


class MissingDependency(VanDeployError):
    """A package, driver or device that the request needs is not available."""

    exit_code = 3


class ConversionError(VanDeployError):
    """A conversion or a build failed, or its result was refused."""

    exit_code = 4


class InputError(VanDeployError):
    """An input of the user cannot be used."""

    exit_code = 5


class CheckpointError(InputError):
    """A checkpoint cannot be read, is not a VAN, or is damaged."""


class DownloadError(InputError):
    """Weights could not be downloaded, or have another digest than expected."""


class ImageError(InputError):
    """An image or a folder of images cannot be used."""


class RecipeError(InputError):
    """A recipe or a calibration set is invalid; names the file and the key."""


class BundleError(InputError):
    """A bundle is missing, damaged, or does not match its manifest."""


class SignatureError(BundleError):
    """A bundle is not signed, is signed with another key, or was changed after signing."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, also of a library, says that memory is exhausted."""
    signs = ("can't allocate memory", "out of memory", "bad_alloc", "failed to allocate")
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


@contextlib.contextmanager
def require_extra(feature: str, extra: str) -> Iterator[None]:
    """Report a failing import in the block as an extra to install.

    Args:
        feature: what needs the extra, as the start of a sentence.
        extra: of this package, such as ``serve``; "" for one that the package itself needs.

    Raises:
        MissingDependency: an import failed.
    """
    try:
        yield
    except (ImportError, RuntimeError) as error:  # tritonclient raises RuntimeError without gRPC
        package = f"'van-deploy[{extra}]'" if extra else "van-deploy"
        raise MissingDependency(
            f"{feature} needs a package that is not installed: {error}.",
            f"Install it with `pip install {package}`.",
        ) from error

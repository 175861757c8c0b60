"""The errors of huggingface_hub, as messages that say what happened and what to do.

The library sends requests with requests, httpx or httpx2, depending on its version. The error classes of these are
recognised by their base classes, so that none of them is imported here.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence

from ..errors import CheckpointError
from .hub_ids import HubId

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MAX_NAMES = 5  # files that a message names one by one
AGAIN = "run the same command again: complete files are not downloaded again"


@contextlib.contextmanager
def explain_hub_errors(hub_id: HubId) -> Iterator[None]:
    """Turn every exception of the block into a CheckpointError that names the repository and the fix."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{hub_id}: {_explain(hub_id, _original(error))}") from error


def _explain(hub_id: HubId, error: BaseException) -> str:
    """Return what the hub or the system answered, and the fix."""
    from huggingface_hub import constants, errors

    page, status = f"{constants.ENDPOINT}/{hub_id.repo}", _http_status(error)
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated, and {_token_state()}; accept its conditions at {page} and {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such repository on {constants.ENDPOINT}, or a private one, and {_token_state()}; check the name, or "
            f"{login}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository is there, but no such branch, tag or commit; see {page}/tree/main"
    if status == 401:
        return f"{constants.ENDPOINT} refuses the token ({error_line(error)}); {login}"
    if status == 403:
        return f"{constants.ENDPOINT} forbids it, and {_token_state()} ({error_line(error)}); use one with read access"
    if _is_file_error(error):
        assert isinstance(error, OSError)
        path = os.fspath(error.filename) if error.filename else constants.HF_HUB_CACHE
        fix = "make room there, or set" if error.errno in FULL_DISK else "set"
        return f"{path!s}: {error.strerror}; {fix} HF_HOME to another folder, then {AGAIN}"
    if is_unreachable(error):
        return "; ".join(explain_unreachable(error))
    return f"it cannot be downloaded ({error_line(error)})"


def explain_unreachable(error: BaseException) -> tuple[str, str]:
    """Return why the hub does not answer, and the fix."""
    from huggingface_hub import constants, errors

    error = _original(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "huggingface_hub is offline (HF_HUB_OFFLINE is set)", "unset HF_HUB_OFFLINE to download it"
    if _http_status(error) == 429:
        return f"{constants.ENDPOINT} is asked too often ({error_line(error)})", f"wait a few minutes, then {AGAIN}"
    return f"no connection to {constants.ENDPOINT}, or a broken one ({error_line(error)})", AGAIN


def is_unreachable(error: BaseException) -> bool:
    """Return True if the hub could not be asked or did not answer, so that the cache or another attempt may help."""
    error = _original(error)
    status = _http_status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    connection_errors: tuple[type[BaseException], ...] = (OSError, *_http_error_classes())
    return isinstance(error, connection_errors) and not _is_file_error(error)


def error_line(error: BaseException) -> str:
    """Return the class of an error and the first line of its message."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text.strip()}" if text else type(error).__name__


def list_names(names: Sequence[str]) -> str:
    """Return the first names as a list for a message, and the number of the others."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _token_state() -> str:
    """Return a clause that says if a token is set."""
    from huggingface_hub import get_token

    return "the token that is set has no access to it" if get_token() else "no token is set"


def _original(error: BaseException) -> BaseException:
    """Return the error of the hub behind an error of the cache; any other error is returned as it is.

    If a request fails, huggingface_hub looks into its cache. If the cache lacks the file, the library raises
    LocalEntryNotFoundError, whose cause is the error of the request.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    return error.__cause__ or error if isinstance(error, LocalEntryNotFoundError) else error


def _is_file_error(error: BaseException) -> bool:
    """Return True if the system refused an operation on a file."""
    other_errors: tuple[type[BaseException], ...] = (ConnectionError, TimeoutError, *_http_error_classes())
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, other_errors)


def _http_error_classes() -> tuple[type[BaseException], ...]:
    """Return the base classes that the HTTP library in use gives its errors."""
    from huggingface_hub.errors import HfHubHTTPError

    other_packages = ("builtins", "huggingface_hub")
    bases: tuple[type[BaseException], ...] = HfHubHTTPError.__mro__[:-1]
    return tuple(base for base in bases if base.__module__.partition(".")[0] not in other_packages)


def _http_status(error: BaseException) -> int | None:
    """Return the status code of the hub's answer, or None for an error without an answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None

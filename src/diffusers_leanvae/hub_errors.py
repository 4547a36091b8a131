"""Errors of the Hub in plain words."""

from .checks import reason_of


# The HTTP client of huggingface_hub is another one from release to release.
_PACKAGES = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests")


def hub_reason(
    error: BaseException, place: str, revision: str | None = None, file: str | None = None, action: str = "download"
) -> str | None:
    """Say in part of a sentence why something could not be had from the Hub.

    Args:
        error: Of huggingface_hub or of its HTTP client, or one that was raised from such an error.
        place: The repository, with its kind, such as "model 'user/repo'".
        revision: That was asked for.
        file: That was asked for.
        action: What failed, for errors of no known kind.

    Returns:
        The reason, or `None` if the error has nothing to do with the Hub.
    """
    from huggingface_hub import errors

    cause: BaseException | None = error
    while cause is not None and type(cause).__module__.split(".")[0] not in _PACKAGES:
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    it = "the file" if file else "it"
    reasons: list[tuple[type[Exception], str]] = [
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE forbids to ask the Hub"),
        (errors.LocalEntryNotFoundError, f"the Hub cannot be reached, and {it} is not in its cache"),
        (errors.GatedRepoError, f"access to the {place} must be granted on its page on the Hub first"),
        (
            errors.RepositoryNotFoundError,
            f"there is no {place} on the Hub, or it is private and the token does not open it",
        ),
        (errors.RevisionNotFoundError, f"the {place} has no revision {revision!r}"),
        (
            errors.EntryNotFoundError,
            f"the {place} has no file {file!r}" if file else f"a file of the {place} is missing",
        ),
    ]
    for kind, reason in reasons:
        if isinstance(cause, kind):
            return reason
    if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code == 401:
        return "the Hub does not know the token: run `hf auth login` again, or mend HF_TOKEN"
    if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code == 403:
        return "the token does not permit it"
    return f"the {action} failed ({reason_of(cause)})"

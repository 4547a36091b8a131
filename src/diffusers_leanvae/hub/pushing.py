"""Push models, pipelines and adapters to the Hub, and find out before whether that will work."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..checks import reason_of
from ..description import list_files, parse_weights_name
from ..hub_errors import hub_reason
from .cards import CARD_NAME, CardOptions, describe_saved, render_hub_card, update_card
from .shims import make_shims


# Arguments of `save_pretrained` that `push_to_hub` hands on; diffusers takes any other and does nothing with it.
SAVE_OPTIONS = ("max_shard_size", "safe_serialization", "is_main_process", "save_function")


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    card: str | CardOptions | None = None,
    shim: bool = True,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    variant: str | None = None,
    subfolder: str | None = None,
    **options: Any,
) -> str:
    """Push an autoencoder, a transformer or a whole pipeline to the Hub, with a card, as one commit.

    Former weights of the same name and variant that would stay next to them, such as more shards, are deleted in that
    commit: diffusers might load them instead.

    Args:
        model: A model or a pipeline.
        repo_id: `user/name`; created if it does not exist.
        card: Text of its README, or what that of [`render_hub_card`] says beyond the files.
        shim: Whether to add the files of [`make_shims`]. With them `AutoModel` and `DiffusionPipeline` ask for
            `trust_remote_code=True`, whether the package is imported or not; its own classes never do.
        private: Whether a new repository is private; by default the user's settings decide.
        token: Token of the Hub, the stored one by default.
        commit_message: Message of the commit.
        revision: Branch to push to, created if it does not exist; the main one by default.
        create_pr: Whether to open a pull request instead of writing to the branch.
        variant: Name of a variant of the weights, such as `"fp16"`.
        subfolder: Folder of the repository to push to; the card of the repository then stays as it is.
        options: Further arguments of `save_pretrained`: `max_shard_size`, `safe_serialization`, `is_main_process` and
            `save_function`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: If an argument is not legal, or nothing could be pushed.
    """
    for name in options.keys() - set(SAVE_OPTIONS):
        raise ValueError(f"`options` must be of {', '.join(SAVE_OPTIONS)}, got {name}.")
    if variant is not None and not (isinstance(variant, str) and variant and not set(variant) & set("/\\")):
        raise ValueError(f"`variant` must be a part of the name of a file, such as 'fp16', got {variant!r}.")
    _check_card(card)
    subfolder = _check_subfolder(subfolder)
    if options.get("safe_serialization") is False:
        raise ValueError("`safe_serialization` must be True: weights are pushed as safetensors, got False.")
    if not create_pr:  # which needs no right to write; asked here, too, since saving may take long
        check_push(repo_id, token, "repo_id")
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, variant=variant, **options)
        return push_folder(
            folder,
            repo_id,
            card=card,
            shim=shim,
            private=private,
            token=token,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            subfolder=subfolder,
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    card: str | CardOptions | None = None,
    shim: bool = True,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> str:
    """Push the folder of a saved model, pipeline or adapter, as one commit; the folder stays as it is.

    Args:
        folder: Of `save_pretrained` or `save_lora`, or the name of a bundled model or pipeline, before which comes a
            folder of that name. A README in it goes along, with the metadata that `card` has.
        repo_id: As of [`push_to_hub`], and so are the others.
        card: Text of the README, or what it says beyond the files.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: If there is nothing of these in the folder, an argument is not legal, or nothing could be pushed.
    """
    check_repo_id("repo_id", repo_id)
    _check_card(card)
    subfolder = _check_subfolder(subfolder)
    describe_saved(folder)
    if not create_pr:
        check_push(repo_id, token, "repo_id")
    files = list_files(folder)
    contents: dict[str, Path | bytes] = {**files, **(make_shims(files) if shim else {})}
    if subfolder is None:
        contents |= _make_card(folder, files.get(CARD_NAME), repo_id, card, shim)
    start = "" if subfolder is None else f"{subfolder}/"
    contents = {start + name: content for name, content in contents.items()}
    return _upload(contents, repo_id, private, token, commit_message, revision, create_pr)


def _check_card(card: Any) -> None:
    if not isinstance(card, str | CardOptions | None):
        raise ValueError(f"`card` must be the text of a README, `CardOptions` or None, got {card!r}.")


def _check_subfolder(subfolder: str | None) -> str | None:
    """Refuse what is no folder in a repository; `None` for its top."""
    path = PurePosixPath("" if subfolder is None else str(subfolder).strip("/"))
    if ".." in path.parts or "\\" in str(path):
        raise ValueError(f"`subfolder` must be a folder in the repository such as 'vae', got {subfolder!r}.")
    return str(path) if path.parts else None


def _make_card(
    folder: str | Path, written: Path | None, repo_id: str, card: str | CardOptions | None, shim: bool
) -> dict[str, Path | bytes]:
    """Make the README, unless that in the folder stays as it is, and take the picture along that it shows."""
    if isinstance(card, str):
        return {CARD_NAME: card.encode()}
    if written is None:
        text = render_hub_card(folder, repo_id, card or CardOptions(), shim)
        made: dict[str, Path | bytes] = {CARD_NAME: text.encode()}
        return made if card is None or card.picture is None else made | {card.picture_name: card.picture}
    if card is None:
        return {}
    return {CARD_NAME: update_card(written.read_text(encoding="utf-8"), folder, repo_id, card).encode()}


def _upload(
    contents: Mapping[str, Path | bytes],
    repo_id: str,
    private: bool | None,
    token: str | None,
    commit_message: str | None,
    revision: str | None,
    create_pr: bool,
) -> str:
    """Upload files as one commit; repository and branch are created if they do not exist."""
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        former = _list_former(contents, api.list_repo_files(repo_id, revision=revision))
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in contents.items()]
            + [CommitOperationDelete(name) for name in former],
            commit_message=commit_message or "Upload with diffusers-leanvae",
            revision=revision,
            create_pr=create_pr,
        )
    except Exception as error:  # huggingface_hub lets errors of its HTTP client through
        reason = hub_reason(error, f"model {repo_id!r}", revision, action="upload")
        if reason is None:
            raise
        raise ValueError(f"`repo_id` must be one that can be pushed to, got {repo_id!r}: {reason}.") from error
    return str(commit.pr_url if create_pr else commit)


def _list_former(contents: Collection[str], names: Iterable[str]) -> list[str]:
    """List the weights in a repository that have the name and variant of pushed ones and would stay next to them."""
    pushed = {parsed[:2] for name in contents if (parsed := parse_weights_name(name)) is not None}
    return [
        name
        for name in names
        if name not in contents and (parsed := parse_weights_name(name)) is not None and parsed[:2] in pushed
    ]


def check_push(repo_id: str, token: str | None = None, name: str = "push_to_hub") -> None:
    """Find out whether something could be pushed to a repository now; nothing is created.

    A repository that exists is asked whether the token may write to it. For one that does not, its owner must be the
    user or an organisation of the user, and the token must be for writing; finer rights of a token are looked up too.

    Args:
        repo_id: `user/name`.
        token: Token of the Hub, the stored one by default.
        name: The argument, for the message.

    Raises:
        ValueError: If it could not, in one sentence that says why: the name, no connection, no login, no permission.
    """
    check_repo_id(name, repo_id)
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"`{name}` needs the Hub, which HF_HUB_OFFLINE forbids to ask, got {repo_id!r}.")
    token = token or get_token()
    if token is None:
        raise ValueError(f"`{name}` needs a login: run `hf auth login` or set HF_TOKEN, got {repo_id!r}.")
    api = HfApi(token=token)
    try:
        user = api.whoami()
        try:
            api.auth_check(repo_id, write=True)
        except RepositoryNotFoundError:  # or one that this user may not even see
            _check_owner(name, user, repo_id)
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            needed = "a valid login: run `hf auth login` again, or mend HF_TOKEN"
        elif error.response.status_code == 403:
            needed = "the permission to write there"
        else:
            needed = "a Hub that answers"
        raise ValueError(f"`{name}` needs {needed}, got {repo_id!r}: {reason_of(error)}.") from error
    except ValueError:
        raise
    except Exception as error:  # of the HTTP client, which is another one from release to release of huggingface_hub
        raise ValueError(
            f"`{name}` needs a connection to the Hub, got {repo_id!r} and none to {api.endpoint}: {reason_of(error)}."
        ) from error


def check_repo_id(name: str, repo_id: str) -> None:
    """Refuse what cannot be the name of a repository, `user/name`."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`{name}` must be `user/name`, got {repo_id!r}: {reason_of(error)}.") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"`{name}` must be `user/name`, got {repo_id!r}.")


def _check_owner(name: str, user: dict[str, Any], repo_id: str) -> None:
    """Refuse a new repository that this user, with this token, may not create. What the Hub leaves open may pass."""
    owner = repo_id.split("/")[0]
    owners = [user["name"], *(org["name"] for org in user.get("orgs", ()) if org.get("roleInOrg") != "read")]
    if owner.lower() not in map(str.lower, owners):
        raise ValueError(
            f"`{name}` must begin with one of {', '.join(map(repr, owners))}, who may be written to with this "
            f"login, got {repo_id!r}."
        )
    token = user.get("auth", {}).get("accessToken", {})
    may_write = token.get("role") != "read"
    if token.get("role") == "fineGrained":
        scopes = token.get("fineGrained", {}).get("scoped", ())
        allowed = [scope for scope in scopes if "repo.write" in scope.get("permissions", ())]
        may_write = any(str(scope.get("entity", {}).get("name")).lower() == owner.lower() for scope in allowed)
    if not may_write:
        raise ValueError(f"`{name}` needs a token that may write for {owner!r}, got {repo_id!r} and one that may not.")

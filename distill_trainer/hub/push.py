"""The upload of a run's bare student with its card, report and settings: `python -m distill_trainer.hub push`."""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distill_trainer.errors import ConfigurationError, DistillationError
from distill_trainer.hub.folder import CARD, STUDENT_FILES, card_for, check_student
from distill_trainer.parsing import SETTINGS_FILE, OneLineParser

# What an earlier push may have left that would change how this student loads, beside the files above.
FOREIGN_FILES = ("adapter_*",)
# Files that tell a model, which is another's where no push of this package has put the settings beside it.
MODEL_FILES = ("config.json", "adapter_config.json", "*.safetensors", "pytorch_model*.bin", "*.gguf")
NO_SETTINGS = (
    b"# distill_trainer pushed this student without the settings of its run: during training, or from Python.\n"
)
RETRY_WAITS = (1, 3)


def push_student(
    folder: str | Path,
    repo_id: str | None = None,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload the distilled student",
) -> str:
    """URL of the Hub repository that now holds the student, its card, report and settings, as in `folder`.

    Only `STUDENT_FILES` are sent, in one commit: a push that is cut off leaves the repository as it was. Where the
    folder has no settings, a comment stands in their place, by which the next push knows the repository. What the
    repository has under these names and this student has not is deleted, but for the card, and so are adapters, with
    which another model would load. Where the card names the folder, the pushed one names the repository.

    Args:
        folder: Output folder of a run, a checkpoint, or an export.
        repo_id: `name` or `namespace/name`, created if missing. None takes the folder's name.
        token: Token with write access. None takes `HF_TOKEN` or the one of `hf auth login`.
        private: Whether a repository created here is private. None leaves it to the account's default. True refuses
            one that exists and is public.
        revision: Branch to write, created if missing. None writes `main`.
        commit_message: First line of the commit.

    Raises:
        ConfigurationError: If the folder holds no student, the name or the token cannot work, or the repository holds
            a model that this package has not pushed.
        DistillationError: If the Hub fails or cannot be reached, after retries.
    """
    folder = Path(folder)
    check_student(folder)
    repo_id = repo_id or folder.resolve().name
    token = _found_token(token, repo_id)
    for path in (folder / CARD, folder / SETTINGS_FILE, *sorted((folder / "report").rglob("*"))):
        if path.is_file() and token.encode() in path.read_bytes():
            raise ConfigurationError(f"{path} must not hold the token, since it is published. Remove the token there.")

    again = ["python", "-m", "distill_trainer.hub", "push", str(folder), repo_id]
    again += [*(["--private"] if private else []), *(["--revision", revision] if revision else [])]
    mend = f"Push the run again: {shlex.join(again)}"
    repo_id = _asked(lambda api: _writable(api, repo_id, private, revision), repo_id, token, mend)
    return _asked(lambda api: _upload(api, folder, repo_id, private, revision, commit_message), repo_id, token, mend)


def check_access(
    repo_id: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> str:
    """`repo_id` with its namespace, if a push to it can work as far as the Hub tells before one; nothing is written.

    Args:
        repo_id: See `push_student`, and so `token`, `private` and `revision`.

    Raises:
        ConfigurationError: If the name, the token or `private` cannot work, or the repository holds another model.
        DistillationError: If the Hub fails or cannot be reached, after retries.
    """
    mend = "Try later, or train without push_to_hub and push the run afterwards."
    return _asked(lambda api: _writable(api, repo_id, private, revision), repo_id, _found_token(token, repo_id), mend)


def _found_token(token: str | None, repo_id: str) -> str:
    from huggingface_hub import get_token

    if found := token or get_token():
        return found
    raise ConfigurationError(
        f"A token must be set to push to {repo_id}, got none. Set HF_TOKEN or hub_token, or run `hf auth login`."
    )


def _asked(question: Callable[[Any], str], repo_id: str, token: str, mend: str) -> str:
    """What the Hub answers, asked again after failures that may pass."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    api, waits = HfApi(token=token, library_name="distill_trainer"), iter(RETRY_WAITS)
    while True:
        try:
            return question(api)
        except DistillationError:
            raise
        except HFValidationError as error:
            raise ConfigurationError(f"repo_id must be a valid name, got {repo_id!r}. {error}") from error
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            # huggingface_hub wraps a failed weight upload in a RuntimeError; its cause says why.
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            status = getattr(getattr(cause, "response", None), "status_code", None)
            transient = (status >= 500 or status in (408, 429)) if status else isinstance(cause, HTTPError)
            wait = next(waits, None) if transient else None
            if wait is None:
                raise _hub_error(cause, status, repo_id, mend) from error
            time.sleep(wait)


def _writable(api: Any, repo_id: str, private: bool | None, revision: str | None) -> str:
    """`repo_id` with its namespace, unless the account cannot or should not write there."""
    from huggingface_hub.utils import filter_repo_objects, validate_repo_id

    validate_repo_id(repo_id)
    account = api.whoami()
    own = [account["name"], *(org["name"] for org in account.get("orgs", ()) if org.get("roleInOrg") != "read")]
    repo_id = repo_id if "/" in repo_id else f"{own[0]}/{repo_id}"
    if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise ConfigurationError(
            f"The token must have write access to {repo_id}, got a read-only token of {own[0]}. Set HF_TOKEN or "
            "hub_token to one with write access, from https://huggingface.co/settings/tokens."
        )
    if repo_id.split("/")[0].lower() not in map(str.lower, own):
        raise ConfigurationError(
            f"The repository must be under {' or '.join(own)}, where the token may write, got {repo_id}. Give another "
            "name, or the token of an account that may write there."
        )
    public, there = _found(api, repo_id, revision)
    if private and public:
        raise ConfigurationError(
            f"{repo_id} must be private or new to push to it privately, but it exists and is public. Make it "
            "private in its settings on the Hub, or choose another name."
        )
    models = sorted(filter_repo_objects(there, allow_patterns=list(MODEL_FILES)))
    if models and SETTINGS_FILE not in there:
        raise ConfigurationError(
            f"{repo_id} must not hold a model that this package has not pushed, but it has "
            f"{models[0]} without {SETTINGS_FILE}. Choose another name, or delete it there."
        )
    return repo_id


def _found(api: Any, repo_id: str, revision: str | None) -> tuple[bool, set[str]]:
    """Whether a repository exists and is public, and the files of its branch if that exists and left `main`."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    public = False
    try:
        main = api.model_info(repo_id)
        public = not main.private
        if revision not in (None, "main", "refs/heads/main"):
            # A push that failed may have made the branch from another model, which stays on `main`.
            if api.model_info(repo_id, revision=revision).sha == main.sha:
                return public, set()
        return public, set(api.list_repo_files(repo_id, revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return public, set()


def _upload(api: Any, folder: Path, repo_id: str, private: bool | None, revision: str | None, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.utils import filter_repo_objects

    url = str(api.create_repo(repo_id, private=private, exist_ok=True))
    if revision and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    sent = list(filter_repo_objects(files, allow_patterns=list(STUDENT_FILES)))
    there = api.list_repo_files(repo_id, revision=revision)
    ours = set(filter_repo_objects(there, allow_patterns=[*STUDENT_FILES, *FOREIGN_FILES]))
    operations = [
        CommitOperationAdd(name, card_for(folder, repo_id) if name == CARD else folder / name) for name in sent
    ]
    if SETTINGS_FILE not in sent:
        operations.append(CommitOperationAdd(SETTINGS_FILE, NO_SETTINGS))
    # An old single file would win over new shards, an adapter or a template over what this student has.
    operations += [CommitOperationDelete(name) for name in sorted(ours - {*sent, CARD, SETTINGS_FILE})]
    api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return f"{url}/tree/{revision}" if revision else url


def _hub_error(cause: BaseException, status: int | None, repo_id: str, mend: str) -> DistillationError:
    reason = " ".join((getattr(cause, "server_message", None) or str(cause)).split())
    got = f"HTTP {status} ({reason})" if status else reason
    if status in (401, 403):
        return ConfigurationError(
            f"The token must have write access to {repo_id}, got {got}. Set HF_TOKEN or hub_token to one that has it."
        )
    return DistillationError(f"The Hub must accept the upload to {repo_id}, got {got.rstrip('.')}. {mend}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Ends with exit code 2 and one line on standard error if the push fails."""
    parser = OneLineParser(prog="python -m distill_trainer.hub", description="Publish a distilled student.")
    push = parser.add_subparsers(dest="action", required=True).add_parser("push", help="Upload a finished run.")
    push.add_argument("folder", metavar="RUN_DIR", help="Output folder of a run.")
    push.add_argument("repo_id", metavar="REPO", nargs="?", help="name or namespace/name; default: the folder's name.")
    push.add_argument("--private", action="store_true", default=None, help="Make a new repository private.")
    push.add_argument("--revision", metavar="BRANCH", help="Branch to write, created if missing; default: main.")
    options = parser.parse_args(arguments)
    try:
        url = push_student(options.folder, options.repo_id, private=options.private, revision=options.revision)
    except DistillationError as error:
        parser.error(str(error))
    sys.stdout.write(f"{url}\n")

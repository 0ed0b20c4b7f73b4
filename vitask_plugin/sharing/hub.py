"""A checkpoint's folder on the Hub, by huggingface_hub's own client: one commit of the files that others need."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from vitask_plugin.errors import VITaskError
from vitask_plugin.sharing.pushed import Pushed, pushed


def create(repo: str, *, private: bool | None = None, token: str | None = None) -> str:
    """The repository, made if it is not there; its whole name (`repo` may lack the owner's).

    Args:
        private: None = as it is, or a new one as the Hub or the owner has it by default.

    Raises:
        VITaskError: the Hub refuses it or cannot be reached; it is there already, and public where `private` is asked.
    """
    with _sentences(repo):
        api = HfApi(token=token)
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        public = private and not api.repo_info(name).private
    if public:
        raise VITaskError(
            f"the repository {name!r} is there already and public, so nothing is sent; make it private in its settings "
            "on the Hub, give another name, or leave out that it be private"
        )
    return name


def push(
    folder: str | Path,
    repo: str,
    *,
    say: Callable[[str], None],
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Sends the folder's files, after `say` has been given a line on each.

    Returns:
        The commit's address.

    Raises:
        VITaskError: see `pushed.pushed` and `create`.
    """
    files = pushed(folder)
    for line in listed(files, repo):
        say(line)
    repo = create(repo, private=private, token=token)
    operations = [CommitOperationAdd(one.name, str(one.content) if _is_path(one) else one.content) for one in files]
    with _sentences(repo):
        done = HfApi(token=token).create_commit(
            repo, operations, commit_message="Upload a model tuned by VITask", revision=revision
        )
    return str(done.commit_url)


def listed(files: list[Pushed], repo: str) -> Iterator[str]:
    """What goes where, for people."""
    yield f"{len(files)} files for {repo}:"
    for one in files:
        yield f"  {one.name}, {one.size:,} bytes"
        for name, (was, now) in one.replaced.items():
            yield f"    {name}: {was!r} is a place of this machine; others read {now!r}"


def _is_path(one: Pushed) -> bool:
    return isinstance(one.content, Path)


@contextlib.contextmanager
def _sentences(repo: str) -> Iterator[None]:
    """Whatever the client meets, of its own errors and those of the network, as one sentence."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise VITaskError(
            f"the Hub does not take {repo!r} ({type(error).__name__}: {why}); check the name, the network and the "
            "token (`hf auth login`, or HF_TOKEN), and send the finished folder with `vitask push`"
        ) from error

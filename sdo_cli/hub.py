"""Weight files on the hub: the one module that fetches them."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from sdo_cli.errors import EnvironmentFault
from sdo_cli.installed import sdo


@dataclass(frozen=True)
class WeightFile:
    """One file of a repository.

    Attributes:
        repo: ``owner/name`` on the hub.
        filename: inside the repository.
        size: in bytes, as published when this was written; 0 when not known.
        licence: of the weights.
        revision: branch, tag or commit; None is the default branch.
        kind: of the repository, ``model`` or ``dataset``.
    """

    repo: str
    filename: str
    size: int
    licence: str
    revision: str | None = None
    kind: str = "model"

    def __str__(self) -> str:
        return f"{self.repo}/{self.filename}"


class MissingWeights(EnvironmentFault):
    """Weights that are not on this machine and cannot be fetched now."""


def is_offline() -> bool:
    """Whether the user said that there is no network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def is_reachable() -> bool:
    """Whether the hub answers at all, within five seconds: its client would retry for minutes first."""
    from huggingface_hub.constants import ENDPOINT

    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=5)
    except HTTPError:
        # an answer, if not a friendly one
        return True
    except (OSError, ValueError):
        return False
    return True


def cached_file(file: WeightFile) -> Path | None:
    """Where the file lies on this machine, None when it does not; never asks the network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(file.repo, file.filename, revision=file.revision, repo_type=file.kind)
    return Path(found) if isinstance(found, str) else None


def find_file(file: WeightFile) -> Path:
    """The file on this machine, downloaded when it has to be.

    Raises:
        MissingWeights: not here, and offline or not reachable.
    """
    if (found := cached_file(file)) is not None:
        return found
    if is_offline():
        raise MissingWeights(
            f"{file} is not on this machine and HF_HUB_OFFLINE is set", remedy=_offline_remedy(file.kind)
        )
    return download(file)


def _offline_remedy(kind: str) -> str:
    if kind == "dataset":
        return "copy the file from a machine with a network, and name it"
    return f"run `{sdo('fetch', 'RECIPE')}` where there is a network, or give a local file in the options"


def list_files(repo: str, revision: str | None, *, kind: str) -> list[str]:
    """Paths inside a repository; of what is cached when offline.

    Raises:
        MissingWeights: in one sentence.
    """
    from huggingface_hub import HfApi, snapshot_download

    if is_offline():
        try:
            folder = Path(snapshot_download(repo, revision=revision, repo_type=kind, local_files_only=True))
        except OSError as fault:
            text = f"the {kind} {repo} is not on this machine and HF_HUB_OFFLINE is set"
            raise MissingWeights(text, remedy=_offline_remedy(kind)) from fault
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    try:
        return sorted(HfApi().list_repo_files(repo, revision=revision, repo_type=kind))
    # a network can fail in any way
    except Exception as fault:
        raise MissingWeights(why_not(f"{kind} {repo}", fault), remedy=remedy_for(fault)) from fault


def download(file: WeightFile) -> Path:
    """Fetch one file; it appears under its name only when it is whole.

    Raises:
        MissingWeights: in one sentence, whatever the hub or the network said.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(file.repo, file.filename, revision=file.revision, repo_type=file.kind))
    # a network can fail in any way
    except Exception as fault:
        raise MissingWeights(why_not(str(file), fault), remedy=remedy_for(fault)) from fault


def why_not(what: str, fault: Exception) -> str:
    """One sentence for a failed download."""
    kind = type(fault).__name__
    if kind == "GatedRepoError":
        return f"{what} is gated: its licence has to be accepted first"
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "RemoteEntryNotFoundError"):
        return f"the hub has no {what}"
    text = str(fault).strip().splitlines()
    return f"cannot download {what}: {text[0] if text else kind}"


def remedy_for(fault: Exception) -> str:
    """What to do about a failed download."""
    if type(fault).__name__ == "GatedRepoError":
        return "accept the licence on the model's page, then run `hf auth login`"
    return "check the network and the name, or copy the files from a machine that has them and name them in the recipe"

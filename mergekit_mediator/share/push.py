"""Send an artifact to the Hub in one commit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from mergekit_mediator.errors import ArtifactError, ShareError
from mergekit_mediator.models.sources import is_hub_id
from mergekit_mediator.share.card_examples import loading_from
from mergekit_mediator.share.failures import failures
from mergekit_mediator.share.public import public_files
from mergekit_mediator.share.pull import Repository
from mergekit_mediator.store.loaded_files import is_loaded, is_of_a_model
from mergekit_mediator.store.manifest import (
    CARD,
    EVALUATION,
    MANIFEST,
    PICTURES,
    Manifest,
    read_manifest,
)
from mergekit_mediator.store.verification import verify_files


@dataclass(frozen=True)
class Upload:
    """The content of a push.

    Attributes:
        manifest: the artifact's manifest.
        files: by path in the repository, a file of this machine or the content itself.
    """

    manifest: Manifest
    files: Mapping[str, Path | bytes]

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file, by path."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in sorted(self.files.items())
        }


def prepare(root: Path, repo: str | None = None) -> Upload:
    """Collect the content of a push; this needs no network.

    Args:
        root: the artifact's directory.
        repo: the repository, which the examples of the card that is sent load; None leaves them as they are.

    Raises:
        ArtifactError: the artifact does not verify.
        ShareError: a text holds a token of the Hub, or names a home directory.
    """
    manifest = read_manifest(root)
    verify_files(root, manifest)
    files = public_files(root, manifest)
    if repo is not None and CARD in files:
        card = (root / CARD).read_bytes().decode(errors="surrogateescape")
        files[CARD] = loading_from(card, repo).encode(errors="surrogateescape")
    return Upload(manifest, files)


def missing_sources(manifest: Manifest) -> list[str]:
    """List the models of a manifest that are named as repositories, and are none that the user can read.

    Raises:
        ShareError: the Hub cannot be reached.
    """
    sources = [manifest.base.source, *(expert.source for expert in manifest.experts)]
    names = dict.fromkeys(part for source in sources for part in source.split("+"))
    with failures(", ".join(names)):
        return [name for name in names if is_hub_id(name) and not HfApi().repo_exists(name)]


def push(
    upload: Upload,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
) -> str:
    """Send an artifact in one commit.

    Large files are sent first. The Hub keeps them, so that an interrupted push sends only the rest when it is
    repeated. The repository changes with the commit alone. The commit also deletes other files that loading
    the model would read, such as weights of an earlier merge, and an earlier evaluation with its pictures; all
    other files stay.

    Args:
        upload: the content; see `prepare`.
        repo: the repository, `USER/NAME`; a new one is made if there is none.
        private: make a new repository private.
        revision: the branch, which is made if there is none; None for the main branch.
        create_pr: propose the commit as a pull request.
        overwrite: replace another model.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ShareError: the Hub refuses, cannot be reached, or holds another model.
    """
    with failures(repo, revision):
        api = HfApi()
        if not create_pr:
            api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.model_info(repo, revision=revision)
        present = [file.rfilename for file in info.siblings or []]
        if not overwrite:
            _check_owner(repo, info.sha, present, upload.manifest)
        ours = (EVALUATION, *PICTURES)
        replaced = [name for name in present if is_loaded(name) or name in ours]
        stale = [name for name in replaced if name not in upload.files]
        commit: CommitInfo = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, content) for name, content in upload.files.items()),
                *map(CommitOperationDelete, stale),
            ],
            commit_message="Upload a mergekit-mediator artifact",
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )
    return str(commit.pr_url or commit.commit_url)


def _check_owner(repo: str, commit: str | None, present: list[str], manifest: Manifest) -> None:
    """Refuse a repository that holds another model.

    Raises:
        ShareError: the repository holds an artifact of another base, or a model that is no artifact.
    """
    models = [name for name in present if is_of_a_model(name) or name == MANIFEST]
    if not models:
        return
    content = f"a model ({models[0]})"
    if MANIFEST in present:
        try:
            present_base = Repository.at(repo, commit).manifest.base
        except ArtifactError:
            content = "an artifact that cannot be read"
        else:
            if present_base.files == manifest.base.files:
                return
            content = f"an artifact of another base, {present_base.source}"
    raise ShareError(f"{repo}: already holds {content}: choose another repository, or --overwrite")

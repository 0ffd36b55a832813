"""Sends an artifact to the Hub in one commit, or shows what would be sent."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from mergekit_mediator.errors import ArtifactError, ShareError
from mergekit_mediator.share.failures import failures
from mergekit_mediator.share.public import public_files
from mergekit_mediator.share.pull import Repository
from mergekit_mediator.store.loaded_files import is_loaded, is_of_a_model
from mergekit_mediator.store.manifest import MANIFEST, Manifest, read_manifest, verify_files


@dataclass(frozen=True)
class Upload:
    """What a push sends.

    Attributes:
        manifest: of the artifact.
        files: by path in the repository; files of this machine, or contents.
    """

    manifest: Manifest
    files: Mapping[str, Path | bytes]

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in sorted(self.files.items())
        }


def prepare(root: Path) -> Upload:
    """What would be sent of an artifact; needs no network.

    Raises:
        ArtifactError: the artifact does not verify.
        ShareError: a text of it holds a secret, or names a home directory.
    """
    manifest = read_manifest(root)
    verify_files(root, manifest)
    return Upload(manifest, public_files(root, manifest))


def push(
    upload: Upload,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
) -> str:
    """Send an artifact in one commit; a push that was interrupted goes on where it was, if it is run again.

    Large files are sent first, and the Hub keeps those that it has. Nothing can be seen in the
    repository before the commit, which also deletes what loading the model would read though it is not
    of this artifact. Other files of the repository stay.

    Args:
        upload: of `prepare`.
        repo: `USER/NAME`; made where there is none.
        private: whether a new repository is private.
        revision: the branch; made where there is none. None for the main one.
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
        stale = [name for name in present if is_loaded(name) and name not in upload.files]
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
        ShareError: it holds an artifact of another base, or a model that is no artifact.
    """
    models = [name for name in present if is_of_a_model(name) or name == MANIFEST]
    if not models:
        return
    what = f"a model ({models[0]})"
    if MANIFEST in present:
        try:
            theirs = Repository.at(repo, commit).manifest
        except ArtifactError:
            what = "an artifact that cannot be read"
        else:
            if theirs.base.files == manifest.base.files:
                return
            what = f"an artifact of another base, {theirs.base.source}"
    raise ShareError(f"{repo}: already holds {what}: choose another repository, or --overwrite")

"""The experts' files of an artifact; each is opened when a caller first asks for it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from mergekit_mediator.store.expert_file import ExpertFile, open_expert
from mergekit_mediator.store.manifest import Manifest


class ExpertFiles(Mapping[str, ExpertFile]):
    """The files by the experts' names, in the artifact's order."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        shapes: Mapping[str, tuple[int, ...]],
        fetch: Callable[[str], None] | None = None,
    ) -> None:
        """Open all files now, unless they are fetched one by one.

        Args:
            root: the artifact's directory.
            manifest: the artifact's manifest.
            shapes: the shapes of the dense checkpoint's weights by name; see `ExpertHeader`.
            fetch: brings a file, by its path in the artifact, before it is opened; None if all files are
                there.

        Raises:
            ArtifactError: a file that is there cannot be read.
        """
        self._root, self._shapes, self._fetch = root, shapes, fetch
        self._entries = {entry.name: entry for entry in manifest.experts}
        self._of_mean = manifest.parameters.get("reference", "mean") == "mean"
        self._by_slopes = "slopes" in manifest.parameters
        forms = manifest.parameters.get("forms")
        # random signs are relative to the dense expert
        self._of_signs = isinstance(forms, dict) and all(
            forms.get(name) == "random_sign" for name in self._entries
        )
        self._files: dict[str, ExpertFile] = {}
        if fetch is None:
            for name in self._entries:
                self[name]

    def __getitem__(self, name: str) -> ExpertFile:
        if name not in self._files:
            entry = self._entries[name]
            if self._fetch is not None:
                self._fetch(f"mediator/{entry.file}")
            self._files[name] = open_expert(self._root, entry, self._shapes)
        return self._files[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def needed(self, names: Iterable[str]) -> list[str]:
        """List the experts whose files a mixture needs, and open the files of the mixture's experts.

        If experts are stored relative to the base and the dense expert is their mean, a mixture takes the
        shares of all experts out of the dense expert. It needs all files then.

        Args:
            names: the experts of the mixture.
        """
        chosen = list(names)
        by_mean = self._of_mean and not self._of_signs
        if self._fetch is None or (by_mean and any(map(self._is_relative, chosen))):
            return list(self._entries)
        return chosen

    def _is_relative(self, name: str) -> bool:
        """Whether experts may be stored relative to the base, as far as one file tells."""
        weights = self[name].weights.values()
        return self._by_slopes or not weights or any(d.factors is not None for d in weights)

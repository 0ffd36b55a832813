"""The models of a merge with their tensors, through mergekit's loaders."""

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import GatherTensors, LoaderCache
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer, TokenizerInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_mediator.errors import InputError, first_line
from mergekit_mediator.merge.headers import read_headers
from mergekit_mediator.merge.inputs import Headers, Inputs, shape_error
from mergekit_mediator.merge.planner import PlannedWeight

# What the loaders of all file formats raise where a checkpoint is missing or damaged.
_UNREADABLE = (
    OSError,
    TypeError,
    RuntimeError,
    LookupError,
    ValueError,
    EOFError,
    UnpicklingError,
    SafetensorError,
)
# Of mapped files, so much may be in memory before they are closed and opened anew.
MAPPED_BYTES = 1 << 27


class OpenInputs(Inputs):
    """The models of a merge, opened: entering downloads them and merges adapters as needed.

    Attributes:
        tokenizer: that the configuration asks for, once it was built.
    """

    def __init__(self, merge_config: MergeConfiguration, options: MergeOptions) -> None:
        """See `Inputs`."""
        super().__init__(merge_config, options)
        self.tokenizer: TokenizerInfo | None = None
        self._mapping, self._aligning = threading.Lock(), threading.Lock()
        self._mapped = 0
        self._written: list[LazyTensorLoader] = []
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def _close(self) -> None:
        super()._close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _read_headers(self) -> Headers:
        cache = LoaderCache()
        cache.setup(self.options)
        headers: Headers = {}
        for model in self.models:
            cache.loaders.pop(model, None)  # the files may have changed since an earlier merge
            try:
                index = cache.get(model).index
            except SafetensorError as error:  # of the only file that is opened here
                raise InputError(
                    f"model {model}: model.safetensors is truncated, or no safetensors file: "
                    f"{first_line(error)}"
                ) from error
            except _UNREADABLE as error:
                raise InputError(f"model {model}: cannot be loaded: {first_line(error)}") from error
            if index.is_safetensors:
                files = sorted(set(index.tensor_paths.values()))
                headers[model] = read_headers(Path(index.base_path), files)
                absent = [n for n in index.tensor_paths if n not in headers[model]]
                if absent:
                    raise InputError(f"model {model}: {absent[0]} is in the index but in no file")
        return headers

    def load(
        self, weight: PlannedWeight, model: ModelReference, like: Tensor | None = None
    ) -> Tensor:
        """One model's tensor, aligned to one vocabulary. Safe to call from several threads.

        Args:
            weight: which one.
            model: whose.
            like: the base's, whose shape it must have.

        Raises:
            InputError: it cannot be read, the model lacks it, or it is of another shape.
        """
        try:
            tensor = self._load(weight, model)
        except _UNREADABLE as error:
            raise InputError(f"{weight.info.name}: cannot be read: {first_line(error)}") from error
        if tensor is None:
            raise InputError(f"{weight.info.name}: missing from {model}, but not from the others")
        if like is not None and tensor.shape != like.shape:
            raise shape_error(weight.info, model, tuple(tensor.shape), tuple(like.shape))
        return tensor

    def _load(self, weight: PlannedWeight, model: ModelReference) -> Tensor | None:
        if not isinstance(weight.inputs, GatherTensors):
            return self._load_aligned(weight, model)
        of_model = ImmutableMap(data={model: weight.names[model]})
        (task,) = weight.inputs.model_copy(update={"weight_info": of_model}).arguments().values()
        tensor: Tensor | None = task.execute()
        if tensor is not None:
            self._note_mapped(tensor)
        return tensor

    def _note_mapped(self, tensor: Tensor) -> None:
        """A mapped file stays in memory as far as it was read, until it is closed."""
        with self._mapping:
            self._mapped += tensor.nbytes
            if self._mapped > MAPPED_BYTES:
                self._mapped = 0
                for loader in (*LoaderCache().loaders.values(), *self._written):
                    if loader.index.is_safetensors:
                        loader.flush()

    def _load_aligned(self, weight: PlannedWeight, model: ModelReference) -> Tensor | None:
        """mergekit aligns the vocabularies of all models at once: done once, and kept on disk."""
        with self._aligning:
            if self._scratch is None:
                self._scratch = tempfile.TemporaryDirectory()
            path = Path(self._scratch.name, f"{weight.info.name}.safetensors")
            if not path.exists():
                tensors = {str(m): t.contiguous() for m, t in self._run(weight.inputs).items()}
                save_file(tensors, path)
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(str(model)) if str(model) in file.keys() else None  # noqa: SIM118

    def reader(self, directory: Path) -> Callable[[str], Tensor]:
        """Gives the weights of a checkpoint that was written here, by name. Safe to call from several threads."""
        loader = LazyTensorLoader.from_disk(str(directory))
        self._written.append(loader)

        def read(name: str) -> Tensor:
            tensor: Tensor = loader.get_tensor(name)
            self._note_mapped(tensor)
            return tensor

        return read

    def build_tokenizer(self) -> TokenizerInfo | None:
        """The tokenizer that the configuration asks for, or None if it asks for none."""
        return self._run(self._tokenizer_task) if self._tokenizer_task else None

    def base_directory(self) -> Path:
        """Where the base model's files are on this machine."""
        return Path(LoaderCache().get(self.base).index.base_path)

    def _run(self, task: Task[Any]) -> Any:
        if isinstance(task, BuildTokenizer):
            if self.tokenizer is None:
                self.tokenizer = task.execute()
            return self.tokenizer
        return task.execute(**{name: self._run(t) for name, t in task.arguments().items()})

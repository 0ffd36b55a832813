"""The models of a merge with their weights, which mergekit's loaders read."""

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

from mergekit_mediator.errors import InputError, MediatorError, first_line
from mergekit_mediator.merge.adapters.loader import open_adapted
from mergekit_mediator.merge.headers import read_headers
from mergekit_mediator.merge.inputs import Headers, Inputs, shape_error
from mergekit_mediator.merge.planner import PlannedWeight

# The loaders of all file formats raise these errors if a checkpoint is missing or damaged.
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
# At most so many bytes of mapped files are in memory: then the files are closed and opened anew.
MAPPED_BYTES = 1 << 27


class OpenInputs(Inputs):
    """The models of a merge with their weights. Entering downloads models as needed.

    An adapter is merged into each weight that is read, see `adapters.loader.open_adapted`.

    Attributes:
        tokenizer: the tokenizer that the configuration asks for; None until it is built.
    """

    def __init__(self, merge_config: MergeConfiguration, options: MergeOptions) -> None:
        """Resolve the configuration, see `Inputs`."""
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
            cache.loaders.pop(model, None)  # its files may have changed since an earlier merge
            try:
                if model.lora is not None:
                    cache.loaders[model] = open_adapted(model, self.options, self._adapted_dtype)
                index = cache.get(model).index
            except MediatorError:
                raise
            except SafetensorError as error:  # the loader opens a file only if it is the only one
                raise InputError(
                    f"model {model}: model.safetensors is truncated, or no safetensors file: "
                    f"{first_line(error)}: download it anew"
                ) from error
            except _UNREADABLE as error:
                raise InputError(
                    f"model {model}: cannot be loaded: {first_line(error)}: replace its files"
                ) from error
            if index.is_safetensors:
                files = sorted(set(index.tensor_paths.values()))
                headers[model] = read_headers(Path(index.base_path), files)
                missing = [n for n in index.tensor_paths if n not in headers[model]]
                if missing:
                    raise InputError(
                        f"model {model}: the index names {missing[0]}, but no file has it: download "
                        "the model anew"
                    )
        return headers

    @property
    def _adapted_dtype(self) -> str | None:
        """The dtype of the weights of adapters; None for that of the base.

        A rate would spend bits on what rounding to 16 bits adds to the change of an adapter. Where no dtype of the output
        is given it is that of the widest input, which must not become wider.
        """
        exact = self.config.needs_costs and self.out_dtype is not None
        return "float32" if exact else None

    def load(
        self, weight: PlannedWeight, model: ModelReference, reference: Tensor | None = None
    ) -> Tensor:
        """Load a weight of one model, with its rows aligned to the common vocabulary. It is thread-safe.

        Args:
            weight: the weight.
            model: the model.
            reference: a tensor whose shape the weight must have.

        Raises:
            InputError: the weight cannot be read, the model lacks it, or its shape differs.
        """
        try:
            tensor = self._load(weight, model)
        except _UNREADABLE as error:
            raise InputError(f"{weight.info.name}: cannot be read: {first_line(error)}") from error
        if tensor is None:
            raise InputError(
                f"{weight.info.name}: {model} lacks this weight, which other models have: experts must be "
                "fine-tunes of the base"
            )
        if reference is not None and tensor.shape != reference.shape:
            raise shape_error(weight.info, model, tuple(tensor.shape), tuple(reference.shape))
        return tensor

    def _load(self, weight: PlannedWeight, model: ModelReference) -> Tensor | None:
        if not isinstance(weight.inputs, GatherTensors):
            return self._load_aligned(weight, model)
        info = ImmutableMap(data={model: weight.names[model]})
        (task,) = weight.inputs.model_copy(update={"weight_info": info}).arguments().values()
        tensor: Tensor | None = task.execute()
        if tensor is not None:
            self._note_mapped(tensor)
        return tensor

    def _note_mapped(self, tensor: Tensor) -> None:
        """Close all mapped files after `MAPPED_BYTES`: a mapped file keeps in memory the parts that were read."""
        with self._mapping:
            self._mapped += tensor.nbytes
            if self._mapped > MAPPED_BYTES:
                self._mapped = 0
                for loader in (*LoaderCache().loaders.values(), *self._written):
                    if loader.index.is_safetensors:
                        loader.flush()

    def _load_aligned(self, weight: PlannedWeight, model: ModelReference) -> Tensor | None:
        """Align the vocabularies of all models, which mergekit does at once, and keep the results on disk."""
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
        """Open the checkpoint of a merge.

        Returns:
            A function that reads a weight by name. It is thread-safe.
        """
        loader = LazyTensorLoader.from_disk(str(directory))
        self._written.append(loader)

        def read(name: str) -> Tensor:
            tensor: Tensor = loader.get_tensor(name)
            self._note_mapped(tensor)
            return tensor

        return read

    def build_tokenizer(self) -> TokenizerInfo | None:
        """Build the tokenizer that the configuration asks for; return None if it asks for none."""
        return self._run(self._tokenizer_task) if self._tokenizer_task else None

    def base_directory(self) -> Path:
        """Find the local directory of the base model's files."""
        return Path(LoaderCache().get(self.base).index.base_path)

    def _run(self, task: Task[Any]) -> Any:
        if isinstance(task, BuildTokenizer):
            if self.tokenizer is None:
                self.tokenizer = task.execute()
            return self.tokenizer
        return task.execute(**{name: self._run(t) for name, t in task.arguments().items()})

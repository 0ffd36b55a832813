"""The models of a merge: their configurations, headers and tensors, through mergekit's loaders."""

import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import GatherTensors, LoaderCache
from mergekit.merge import _model_out_config
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary, TokenizerInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_mediator.errors import ConfigError, InputError, MediatorError, first_line
from mergekit_mediator.merge.architecture import common_architecture
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.merge.headers import TensorHeader, fetch_headers, read_headers
from mergekit_mediator.merge.layers import importance
from mergekit_mediator.merge.planner import PlannedWeight, Planner

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
Headers = dict[ModelReference, dict[str, TensorHeader]]


class Inputs:
    """The models of a merge and the weights that they have in common."""

    def __init__(self, merge_config: MergeConfiguration, options: MergeOptions) -> None:
        """Resolve the configuration; reads model configurations, no weights.

        Raises:
            ConfigError: see `MediatorConfig.from_merge_config`.
            InputError: a model cannot be found, or has another architecture than the base.
        """
        self.config = MediatorConfig.from_merge_config(merge_config)
        self.base = self.config.base_model
        self.experts: tuple[ModelReference, ...] = tuple(self.config.experts)
        self.models = (self.base, *self.experts)
        self.options = options
        # mergekit would convert every input at load; the arithmetic here is float32 in any case
        self.merge_config = merge_config.model_copy(update={"dtype": None}, deep=True)
        self.out_dtype: str | None = merge_config.out_dtype or merge_config.dtype
        self.architecture = common_architecture(self.base, self.experts, options)
        self.out_config = _model_out_config(
            merge_config, self.architecture, trust_remote_code=options.trust_remote_code
        )
        self.tokenizer: TokenizerInfo | None = None
        self._tokenizer_task: BuildTokenizer | None = None
        self._headers: Headers = {}
        self._mapping, self._aligning = threading.Lock(), threading.Lock()
        self._mapped = 0
        self._written: list[LazyTensorLoader] = []
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def open(self) -> None:
        """Open all models with mergekit's loaders, which download and merge adapters as needed.

        Raises:
            InputError: a model cannot be loaded.
        """
        cache = LoaderCache()
        cache.setup(self.options)
        headers = self._headers = {}
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

    def peek(self) -> None:
        """The headers of all models, without loading, downloading or merging any weight.

        An adapter changes no shape, so its base model stands for it.
        """
        headers = self._headers = {}
        for model in self.models:
            path = Path(model.model.path)
            if path.is_dir():
                files = sorted(p.name for p in path.glob("*.safetensors"))
                if not files:
                    raise InputError(f"model {model}: no *.safetensors file in {path}")
                headers[model] = read_headers(path, files)
            else:
                headers[model] = fetch_headers(model.model.path, model.model.revision)
            LoaderCache().loaders[model] = _HeaderLoader(headers[model])

    def close(self) -> None:
        """Let go of the models' files, and of what was aligned."""
        for model in self.models:
            LoaderCache().loaders.pop(model, None)
        if self._scratch is not None:
            self._scratch.cleanup()

    def weights(self) -> list[PlannedWeight]:
        """All weights, in the model's order, checked against the headers.

        Raises:
            ConfigError: all experts have weight 0 somewhere, or slices that do not fit this method.
            InputError: a weight that is missing somewhere, or of different shapes.
        """
        planner = Planner(
            self.merge_config,
            self.architecture,
            self.options,
            self.out_config,
            self.models,
            self.experts,
        )
        try:
            planner._plan()
        except MediatorError:
            raise
        except (ValueError, RuntimeError) as error:  # mergekit's own complaints about the config
            raise ConfigError(first_line(error)) from error
        self._tokenizer_task = planner._tokenizer_task
        for weight in planner.planned:
            self._check_shapes(weight)
        matters = importance(weight.layer for weight in planner.planned)
        return [replace(w, importance=matters[w.layer]) for w in planner.planned]

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
            raise _shape_error(weight.info, model, tuple(tensor.shape), tuple(like.shape))
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

    def header(self, weight: PlannedWeight, model: ModelReference) -> TensorHeader | None:
        """A weight's header in one model; None where a checkpoint has no safetensors header."""
        return _find(weight.names[model], self._headers.get(model, {}))

    def input_bytes(
        self, weight: PlannedWeight, models: Sequence[ModelReference] | None = None
    ) -> int:
        """The bytes that one weight takes in some models together, or in all of them."""
        found = (self.header(weight, m) for m in (self.models if models is None else models))
        return sum(header.bytes for header in found if header)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream; 0 where the configuration does not say."""
        text = self.out_config.get_text_config()
        return int(getattr(text, "hidden_size", 0) or 0)

    def base_directory(self) -> Path:
        """Where the base model's files are on this machine."""
        return Path(LoaderCache().get(self.base).index.base_path)

    def _run(self, task: Task[Any]) -> Any:
        if isinstance(task, BuildTokenizer):
            if self.tokenizer is None:
                self.tokenizer = task.execute()
            return self.tokenizer
        return task.execute(**{name: self._run(t) for name, t in task.arguments().items()})

    def _check_shapes(self, weight: PlannedWeight) -> None:
        aligned = isinstance(weight.inputs, PermutedVocabulary) or (
            self.options.unsafe_truncate_embeddings and weight.info.vocabulary_axis is not None
        )
        shapes = {}
        for model in weight.names:
            header = self.header(weight, model)
            if header is not None:
                shapes[model] = header.shape
        expected = shapes.get(self.base)
        for model, shape in shapes.items():
            if expected is not None and shape != expected and not aligned:
                raise _shape_error(weight.info, model, shape, expected)


class _HeaderLoader:
    """Stands in for mergekit's loader where only names are asked for."""

    def __init__(self, headers: dict[str, TensorHeader]) -> None:
        self.index = self
        self.tensor_paths = {name: header.file for name, header in headers.items()}


def _find(info: WeightInfo, headers: dict[str, TensorHeader]) -> TensorHeader | None:
    names = (info.name, *(info.aliases or ()), *(info.tied_names or ()))
    return next((headers[name] for name in names if name in headers), None)


def _shape_error(
    info: WeightInfo, model: ModelReference, shape: tuple[int, ...], expected: tuple[int, ...]
) -> InputError:
    message = f"{info.name}: shape {list(shape)} in {model}, but {list(expected)} in the base"
    if info.vocabulary_axis is not None:
        message += ": add `tokenizer: {source: base}` (or union) to align the vocabularies"
    return InputError(message)

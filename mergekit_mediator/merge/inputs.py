"""The models of a merge: their configurations and headers, without their weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import _model_out_config
from mergekit.options import MergeOptions
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary

from mergekit_mediator.errors import ConfigError, InputError, MediatorError, first_line
from mergekit_mediator.merge.adapters.config import read_adapter_config
from mergekit_mediator.merge.architecture import common_architecture
from mergekit_mediator.merge.config import MediatorConfig
from mergekit_mediator.merge.headers import TensorHeader, fetch_headers, read_headers
from mergekit_mediator.merge.planner import PlannedWeight, Planner

Headers = dict[ModelReference, dict[str, TensorHeader]]
Self = TypeVar("Self", bound="Inputs")


class Inputs:
    """The models of a merge and the weights that they share; use a subclass.

    It is a context manager: entering reads the headers, leaving closes the models' files.

    Attributes:
        config: the parameters of the merge.
        base: the base model.
        experts: the experts in the order of the configuration.
        models: the base and the experts.
        options: mergekit's options.
        merge_config: mergekit's configuration without `dtype`.
        out_dtype: the name of the output dtype; None stands for the widest dtype of the inputs.
        architecture: mergekit's definition of the architecture.
        out_config: the model configuration of the dense expert.
    """

    def __init__(self, merge_config: MergeConfiguration, options: MergeOptions) -> None:
        """Resolve the configuration; read the models' configurations, but no weights.

        Args:
            merge_config: a configuration with `merge_method: mediator`.
            options: mergekit's options.

        Raises:
            ConfigError: see `MediatorConfig.from_merge_config`.
            InputError: a model cannot be found, or has another architecture than the base.
        """
        self.config = self._parameters(merge_config)
        self.base = self.config.base_model
        self.experts: tuple[ModelReference, ...] = tuple(self.config.experts)
        self.models = (self.base, *self.experts)
        self.options = options
        # mergekit would convert every input when it loads it; the passes compute in float32 in any case
        self.merge_config = merge_config.model_copy(update={"dtype": None}, deep=True)
        self.out_dtype: str | None = merge_config.out_dtype or merge_config.dtype
        self.architecture = common_architecture(self.base, self.experts, options)
        self.out_config = _model_out_config(
            merge_config, self.architecture, trust_remote_code=options.trust_remote_code
        )
        self._tokenizer_task: BuildTokenizer | None = None
        self._headers: Headers = {}

    @staticmethod
    def _parameters(merge_config: MergeConfiguration) -> MediatorConfig:
        return MediatorConfig.from_merge_config(merge_config)

    def __enter__(self: Self) -> Self:
        """Read the headers of all models.

        Raises:
            InputError: a model cannot be loaded, or a header cannot be read.
        """
        try:
            self._headers = self._read_headers()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _read_headers(self) -> Headers:
        raise TypeError("`Inputs` reads no headers: use HeaderInputs or OpenInputs")

    def _close(self) -> None:
        for model in self.models:
            LoaderCache().loaders.pop(model, None)

    def weights(self) -> list[PlannedWeight]:
        """Plan all weights in the model's order, and check their shapes by the headers.

        Raises:
            ConfigError: all experts have `weight` 0 for a tensor, or this method cannot merge the slices.
            InputError: the shapes of a weight differ between models.
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
        except (ValueError, RuntimeError) as error:  # mergekit refuses the configuration
            raise ConfigError(first_line(error)) from error
        self._tokenizer_task = planner._tokenizer_task
        for weight in planner.planned:
            self._check_shapes(weight)
        return planner.planned

    def header(self, weight: PlannedWeight, model: ModelReference) -> TensorHeader | None:
        """Find the header of a weight in one model; None if its checkpoint has no such safetensors header."""
        return _find(weight.names[model], self._headers.get(model, {}))

    def input_bytes(
        self, weight: PlannedWeight, models: Sequence[ModelReference] | None = None
    ) -> int:
        """Sum the bytes of one weight over models, by default over all."""
        headers = (self.header(weight, m) for m in (self.models if models is None else models))
        return sum(header.bytes for header in headers if header)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream; 0 if the configuration does not state it."""
        text = self.out_config.get_text_config()
        return int(getattr(text, "hidden_size", 0) or 0)

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
                raise shape_error(weight.info, model, shape, expected)


class HeaderInputs(Inputs):
    """The models of a merge with their headers alone. No weight is downloaded, and no adapter is merged.

    An adapter changes no shape, so the headers of its base model serve for both.
    """

    def _read_headers(self) -> Headers:
        headers: Headers = {}
        for model in self.models:
            if model.lora is not None:
                read_adapter_config(model)
            path = Path(model.model.path)
            if path.is_dir():
                files = sorted(p.name for p in path.glob("*.safetensors"))
                if not files:
                    raise InputError(
                        f"model {model}: *.safetensors files required, but {path} has none: convert "
                        "the model first"
                    )
                headers[model] = read_headers(path, files)
            else:
                headers[model] = fetch_headers(model.model.path, model.model.revision)
            LoaderCache().loaders[model] = _HeaderLoader(headers[model])
        return headers


class _HeaderLoader:
    """A substitute for mergekit's loader, which knows the names of tensors alone."""

    def __init__(self, headers: dict[str, TensorHeader]) -> None:
        self.index = self
        self.tensor_paths = {name: header.file for name, header in headers.items()}


def _find(info: WeightInfo, headers: dict[str, TensorHeader]) -> TensorHeader | None:
    names = (info.name, *(info.aliases or ()), *(info.tied_names or ()))
    return next((headers[name] for name in names if name in headers), None)


def shape_error(
    info: WeightInfo, model: ModelReference, shape: tuple[int, ...], expected: tuple[int, ...]
) -> InputError:
    """Make the error for a tensor whose shape differs from the base's."""
    message = f"{info.name}: shape {list(shape)} in {model}, but {list(expected)} in the base"
    if info.vocabulary_axis is not None:
        message += ": add `tokenizer: {source: base}` (or union) to align the vocabularies"
    else:
        message += ": experts must be fine-tunes of the base"
    return InputError(message)

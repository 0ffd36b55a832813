"""The places of a checkpoint's weights in a loaded model: parameters, or slices of fused parameters."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from mergekit_mediator.errors import MixtureError

# transformers fuses the expert matrices of mixture-of-experts blocks when it loads a checkpoint.
_FUSED = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def locate_weights(
    model: nn.Module, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Find each weight of a checkpoint in a model.

    Args:
        model: a transformers model with the weights that its loader made.
        names: the names of weights in the checkpoint.
        shapes: by name, the shape in the checkpoint, which the model's weight must have.

    Returns:
        By name, the model's own tensor, contiguous and writable in place.

    Raises:
        MixtureError: the model lacks a weight, or holds it quantised, offloaded, not contiguous or in
            another shape: the loader has converted it in a way that this package does not know.
    """
    parameters = {name: p.data for name, p in model.named_parameters()}
    parameters.update({name: b.data for name, b in model.named_buffers()})
    prefix = getattr(model, "base_model_prefix", "")
    storage = {}
    for name in names:
        weight = _find(name, parameters, prefix)
        if weight is None:
            raise MixtureError(
                f"{name}: {type(model).__name__} has no such weight, as its loader has converted it: "
                "load the model with another version of transformers"
            )
        if type(weight) is not Tensor:  # some quantised weights have a floating-point dtype
            raise MixtureError(
                f"{name}: an ordinary weight required, got {type(weight).__name__}: load the model "
                "without quantization"
            )
        if weight.is_meta:
            raise MixtureError(
                f"{name}: a weight in memory required, got one without storage: load the model without "
                "offloading it, on one device or several"
            )
        if not weight.is_contiguous():
            raise MixtureError(
                f"{name}: a contiguous weight required, got strides {weight.stride()}: call "
                "`.contiguous()` on it before the model is attached"
            )
        if not weight.is_floating_point() or tuple(weight.shape) != tuple(shapes[name]):
            raise MixtureError(
                f"{name}: a floating-point weight of shape {list(shapes[name])} required, got "
                f"{weight.dtype} {list(weight.shape)}: load the model without quantization"
            )
        storage[name] = weight
    return storage


def fingerprint(model: nn.Module) -> list[tuple[int, int]]:
    """Return the address and the version of every parameter of a model.

    A parameter that was moved or cast has another address. A parameter that was written has another version;
    one of inference mode has none, and -1 stands for it.
    """
    marks, modules = [], [model]
    while modules:  # three times as fast as `model.parameters()`, and every request waits for it
        module = modules.pop()
        modules += [child for child in module._modules.values() if child is not None]
        marks += [
            (p.data_ptr(), -1 if p.is_inference() else p._version)
            for p in module._parameters.values()
            if p is not None
        ]
    return marks


def _find(name: str, parameters: Mapping[str, Tensor], prefix: str) -> Tensor | None:
    module, _, parameter = name.rpartition(".")
    # PEFT wraps a module to which it adds an adapter
    for path in (name, f"{module}.base_layer.{parameter}"):
        for candidate in (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")):
            if candidate in parameters:
                return parameters[candidate]
    fused = _FUSED.fullmatch(name)
    if fused is None:
        return None
    experts, index, projection = fused[1], int(fused[2]), fused[3]
    matrix = "down_proj" if projection == "down_proj" else "gate_up_proj"
    weight = _find(f"{experts}.{matrix}", parameters, prefix)
    if weight is None or weight.ndim != 3 or index >= len(weight):
        return None
    if projection == "down_proj":
        return weight[index]
    half = weight.shape[1] // 2
    return weight[index, :half] if projection == "gate_proj" else weight[index, half:]

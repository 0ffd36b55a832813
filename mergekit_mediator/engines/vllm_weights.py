"""A vLLM worker extension that puts one expert at a time into the weights, exactly as it is stored.

For offline batches by expert, norms and biases included:

    llm = LLM(OUT, worker_extension_cls="mergekit_mediator.engines.vllm_weights.ExpertWeights")
    llm.collective_rpc("enter_expert", args=(OUT, "math"))
    llm.generate(prompts_of_math)
    llm.collective_rpc("leave_expert")
    llm.reset_prefix_cache()

Keys and values in a prefix cache come from the weights before, so reset the prefix cache whenever an expert enters
or leaves. vLLM's own loader maps names, packed weights and the slices of parallel workers.
"""

from typing import Any

from mergekit_mediator.errors import EngineError
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.weight_patch import WeightPatch, weight_patches
from mergekit_mediator.share.pull import fetch_artifact


class ExpertWeights:
    """Methods that every vLLM worker gets; `LLM.collective_rpc` calls them by name."""

    model_runner: Any
    _mediator_patches: tuple[WeightPatch, ...] = ()

    def enter_expert(self, model: str, expert: str) -> int:
        """Put an expert in place.

        Args:
            model: the artifact that the engine serves: a directory or a repository on the Hub.
            expert: the expert's name.

        Returns:
            The number of weights that the expert changes.

        Raises:
            EngineError: an expert is in place, or the engine has packed its weights.
            ArtifactError: the artifact does not match its manifest.
            ShareError: the repository cannot be read.
            ExportError: the expert is unknown.
        """
        if self._mediator_patches:
            raise EngineError("an expert is in place: leave it first")
        if self._mediator_is_packed():
            raise EngineError(
                "this engine has packed its weights, as vLLM does on processors, and they cannot be "
                "changed: serve the experts as adapters there"
            )
        root, _ = fetch_artifact(model)
        patches = tuple(weight_patches(StoredExperts(root), {expert: 1.0}))
        self._mediator_patches = (
            patches  # before loading: an expert that enters by half can still leave
        )
        load_patches(self.model_runner.model, patches)
        return len(patches)

    def leave_expert(self) -> int:
        """Put the dense expert back, bit for bit; return the number of changed weights."""
        patches = self._mediator_patches
        load_patches(self.model_runner.model, patches, dense=True)
        self._mediator_patches = ()
        return len(patches)

    def _mediator_is_packed(self) -> bool:
        """Tell whether vLLM has packed the weights: a packed weight is empty."""
        return any(weight.numel() == 0 for weight in self.model_runner.model.parameters())


def load_patches(model: Any, patches: tuple[WeightPatch, ...], dense: bool = False) -> None:
    """Write patches through a model's own loader.

    Args:
        model: vLLM's model.
        patches: an expert's patches.
        dense: write the dense expert's values instead of the expert's.
    """
    from vllm.model_executor.model_loader import checkpoint_weight_patch as vllm

    vllm.load_checkpoint_weight_patches(
        model,
        [
            vllm.CheckpointWeightPatch(
                patch.weight,
                patch.shape,
                patch.values.dtype,
                patch.dense if dense else patch.values,
                patch.positions,
            )
            for patch in patches
        ],
    )

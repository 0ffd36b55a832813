"""A vLLM worker extension that puts one expert at a time into the weights, exactly as it is stored.

For offline batches by expert, norms and biases included:

    llm = LLM(OUT, worker_extension_cls="mergekit_mediator.engines.vllm_weights.ExpertWeights")
    llm.collective_rpc("enter_expert", args=(OUT, "math"))
    llm.generate(prompts_of_math)
    llm.collective_rpc("leave_expert")
    llm.reset_prefix_cache()

Keys and values that were computed before are those of other weights, so prefix caches are to be reset whenever
an expert enters or leaves. vLLM's loader maps names, packed weights and slices of parallel workers.
"""

from pathlib import Path
from typing import Any

from mergekit_mediator.errors import EngineError
from mergekit_mediator.export.experts import StoredExperts
from mergekit_mediator.export.weight_patch import WeightPatch, weight_patches
from mergekit_mediator.models.loading import local_directory
from mergekit_mediator.store.manifest import verify_files


class ExpertWeights:
    """Methods that every vLLM worker gets; `LLM.collective_rpc` calls them by name."""

    model_runner: Any
    _mediator_patches: tuple[WeightPatch, ...] = ()

    def enter_expert(self, model: str, expert: str) -> int:
        """Put an expert in place; gives how many weights it changes.

        Args:
            model: the artifact that the engine serves: a directory or a repository on the Hub.
            expert: its name.

        Raises:
            EngineError: an expert is in place, or the engine's weights are packed and cannot be changed.
            ArtifactError: the artifact does not match its manifest.
            ExportError: an unknown expert.
        """
        if self._mediator_patches:
            raise EngineError("an expert is in place: leave it first")
        if self._mediator_is_packed():
            raise EngineError(
                "this engine has packed its weights, as vLLM does on processors, and they cannot be "
                "changed: serve the experts as adapters there"
            )
        root: Path = local_directory(model, None)
        experts = StoredExperts(root)
        verify_files(root, experts.manifest)
        patches = tuple(weight_patches(experts, {expert: 1.0}))
        load_patches(self.model_runner.model, patches)
        self._mediator_patches = patches
        return len(patches)

    def leave_expert(self) -> int:
        """Put the dense expert back, bit for bit; gives how many weights were changed."""
        patches, self._mediator_patches = self._mediator_patches, ()
        load_patches(self.model_runner.model, patches, dense=True)
        return len(patches)

    def _mediator_is_packed(self) -> bool:
        return any(weight.numel() == 0 for weight in self.model_runner.model.parameters())


def load_patches(model: Any, patches: tuple[WeightPatch, ...], dense: bool = False) -> None:
    """Write patches through a model's own loader.

    Args:
        model: of vLLM.
        patches: of an expert.
        dense: write the dense expert's values instead.
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

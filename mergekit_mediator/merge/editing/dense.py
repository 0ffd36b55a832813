"""Changes of the dense expert's checkpoint, shard by shard."""

from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_mediator.delta.mixing import mix_
from mergekit_mediator.merge.editing.workspace import Workspace
from mergekit_mediator.store import durable


def take_share_out(work: Workspace, name: str) -> list[str]:
    """Subtract an expert's share from the dense weights: W ← W − w_t τ_t, with the τ_t that is stored.

    The mixture W + Σ_s (p_s − w_s Σ_t p_t) τ_s of other experts, with Σ_t p_t = 1, thereby stays without this
    expert's file, up to the rounding of W. One shard is in memory at a time.

    Args:
        work: the artifact.
        name: the expert.

    Returns:
        The names of the changed weights; empty if the expert has no share in any weight.
    """
    file = work.files[name]
    shares = {weight: d.share for weight, d in file.weights.items() if d.share}
    for path in sorted(work.root.glob("*.safetensors")) if shares else ():
        with safe_open(path, framework="pt") as shard:
            metadata, names = shard.metadata(), set(shard.keys())
            if names.isdisjoint(shares):
                continue
            weights = {weight: shard.get_tensor(weight) for weight in names}
        for weight in names & set(shares):
            stored = file.read(weight)
            weights[weight] = weights[weight].clone()
            mix_(weights[weight], [(-shares[weight], stored)])
        partial = path.with_name(path.name + ".partial")
        save_file(weights, partial, metadata)
        durable.replace(partial, path)
    return list(shares)

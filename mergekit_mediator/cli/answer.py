"""Text in, text out: each prompt's mixture and answer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_mediator.serve.model import MediatorModel


def answer(
    model: MediatorModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    mixture: Mapping[str, float] | None = None,
    router: Any = None,
) -> list[dict[str, Any]]:
    """Answer prompts by greedy decoding.

    Args:
        model: with a tokenizer.
        prompts: one or more texts.
        max_new_tokens: for each answer.
        mixture: this one for all prompts, instead of routing.
        router: the router's name, or None for the default one.

    Returns:
        For each prompt `prompt`, `mixture`, `entropy` in nats and the out-of-distribution score `ood` (None
        without routing, or where the router cannot tell), `answer`.
    """
    results = []
    for prompt in prompts:
        entropy, ood, chosen = None, None, dict(mixture or {})
        ids, mask = model.tokenize([prompt])
        if mixture is None:
            decision = model.route(ids, mask, router=router)
            weights = model.mixtures(decision, router)[0]
            entropy, score = float(decision.entropy[0]), float(decision.ood[0])
            ood = None if math.isnan(score) else score
            chosen = {e: p for e, p in zip(model.experts, weights.tolist(), strict=True) if p > 0}
        output = model.generate(
            ids, mask, mixture=chosen, max_new_tokens=max_new_tokens, do_sample=False
        )
        text = model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        results.append(
            {
                "prompt": prompt,
                "mixture": chosen,
                "entropy": entropy,
                "ood": ood,
                "answer": text,
            }
        )
    return results

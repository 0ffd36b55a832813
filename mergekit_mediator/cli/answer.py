"""Answer prompts in text, and show each prompt's mixture."""

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
        model: the model; it has a tokenizer.
        prompts: one or more texts.
        max_new_tokens: the most tokens of an answer.
        mixture: the mixture of all prompts; None routes each prompt.
        router: the router's name; None is the default one.

    Returns:
        For each prompt `prompt`, `mixture` by expert, `entropy` in nats and the out-of-distribution score `ood`
        (None each without routing; `ood` is None too if the router has no such score), and `answer`.

    Raises:
        RoutingError: a prompt cannot be routed; see `MediatorModel.route`.
        MixtureError: the mixture names an unknown expert, or a weight is not allowed.
    """
    results = []
    for prompt in prompts:
        entropy, ood, weights = None, None, dict(mixture or {})
        ids, mask = model.tokenize([prompt])
        if mixture is None:
            decision = model.route(ids, mask, router=router)
            row = model.mixtures(decision, router)[0].tolist()
            entropy, score = float(decision.entropy[0]), float(decision.ood[0])
            ood = None if math.isnan(score) else score
            weights = {e: p for e, p in zip(model.experts, row, strict=True) if p > 0}
        output = model.generate(
            ids, mask, mixture=weights, max_new_tokens=max_new_tokens, do_sample=False
        )
        text = model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        results.append(
            {
                "prompt": prompt,
                "mixture": weights,
                "entropy": entropy,
                "ood": ood,
                "answer": text,
            }
        )
    return results

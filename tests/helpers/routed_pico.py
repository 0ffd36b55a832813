"""A merged pico family as a routed model, and requests for it; see the fixtures `model` and `batch`."""

from mergekit_mediator import MediatorModel

GREEDY = {"max_new_tokens": 6, "do_sample": False}
MIXTURES = ["math", "code", {"math": 0.3, "chat": 0.7}, "dense", "math"]


def build(root, family, **settings):
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_mediator.merge.run import run

    config = MergeConfiguration.model_validate(family.config(route="all", **settings))
    run(config, str(root), MergeOptions(quiet=True))
    return MediatorModel.from_pretrained(root)

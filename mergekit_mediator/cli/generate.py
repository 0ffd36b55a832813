"""The command `generate`: answer prompts with an artifact."""

import json
from typing import Literal

import click

from mergekit_mediator.cli import options


@click.command()
@click.argument("out")
@click.argument("prompts", nargs=-1, required=True)
@click.option("--expert", "experts", multiple=True, help="NAME or NAME=WEIGHT, instead of routing.")
@click.option("--router", help="Route by this router instead of the default one.")
@click.option(
    "--policy",
    type=click.Choice(["hard", "soft", "auto"]),
    default="auto",
    show_default=True,
    help="Use one expert, a blend, or a blend only if the router is unsure.",
)
@click.option(
    "--ood-action",
    type=click.Choice(["blend", "dense", "fallback", "refuse"]),
    default="blend",
    show_default=True,
    help="The action for prompts that the calibrated router finds out of distribution.",
)
@click.option("--fallback", help="The expert of --ood-action fallback, or dense.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="The most tokens of an answer.",
)
@options.trust_remote_code
@options.as_json
def generate(
    out: str,
    prompts: tuple[str, ...],
    experts: tuple[str, ...],
    router: str | None,
    policy: Literal["hard", "soft", "auto"],
    ood_action: Literal["blend", "dense", "fallback", "refuse"],
    fallback: str | None,
    max_new_tokens: int,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Answer PROMPTS with the artifact in OUT, a directory or a repository on the Hub.

    Example: mergekit-mediator generate OUT "What is 12 + 30?" "Reverse: a b c"
    """
    from mergekit_mediator.cli.answer import answer
    from mergekit_mediator.serve.model import MediatorModel

    if (ood_action == "fallback") != (fallback is not None):
        raise click.UsageError("--ood-action fallback and --fallback NAME go together")
    model = MediatorModel.from_pretrained(out, trust_remote_code=trust_remote_code)
    model.policy, model.ood_action, model.fallback = policy, ood_action, fallback
    mixture = options.mixture(experts)
    results = answer(model, prompts, max_new_tokens, mixture=mixture, router=router)
    if as_json:
        click.echo(json.dumps(results, indent=1))
        return
    for result in results:
        weights = ", ".join(f"{name} {p:.2f}" for name, p in result["mixture"].items()) or "dense"
        note = "" if result["entropy"] is None else f", entropy {result['entropy']:.2f} nats"
        click.echo(f"[{weights}{note}] {result['answer']}")

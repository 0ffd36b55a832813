"""The card of an exported adapter: how to load it, and how far it is from the expert."""

from dataclasses import asdict

from mergekit_mediator.export.figures import ExportedExpert
from mergekit_mediator.models.sources import is_hub_id, public_name

_CARD = """---
{front}library_name: peft
tags:
- mergekit-mediator
---

# {name}

The expert `{name}` of a merge by mergekit-mediator, as a {form} adapter of `{base}`.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")
```

| figure | value |
| --- | --- |
| rank | {rank} |
{choice}| changed modules | {modules} |
| squared change that the rank leaves out | {error:.4%} |
| changed weights that the adapter lacks | {dropped} |
| their part of the whole squared change | {part:.4%} |
{answers}{lacking}"""
_ANSWERS = """\
| KL(expert ‖ adapter) of the expert's answers, nats a token | {divergence:.3g} |
| tokens of these answers that the adapter chooses, too | {same:.1%} |
"""


def adapter_card(figures: ExportedExpert, form: str, base: str) -> str:
    """Write the card of an adapter.

    Args:
        figures: the adapter's figures.
        form: PEFT's name of the adapter's kind.
        base: the model that the adapter is added to; a directory appears by its last part.

    Returns:
        Markdown, with the front matter of the Hub.
    """
    names = "\n".join(f"- `{name}`" for name in figures.dropped)
    return _CARD.format(
        front=f"base_model: {base}\n" if is_hub_id(base) else "",
        name=figures.name,
        form=form,
        base=public_name(base),
        rank=figures.rank,
        choice=f"| chosen by `--rank auto` | {figures.choice} |\n" if figures.choice else "",
        modules=", ".join(figures.modules),
        error=figures.error,
        dropped=len(figures.dropped),
        part=figures.dropped_part,
        answers=_ANSWERS.format(**asdict(figures.answers)) if figures.answers else "",
        lacking=f"\nThe adapter lacks the change of these weights:\n\n{names}\n" if names else "",
    )

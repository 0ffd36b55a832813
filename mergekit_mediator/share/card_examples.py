"""The examples of a model card, which load the artifact from the repository that it is in."""

import re

# The lines that the card of a merge has for Python, remote code and vLLM, around the artifact's name.
_EXAMPLES = re.compile(
    r'^(model = (?:MediatorModel|AutoModelForCausalLM)\.from_pretrained\(")[^"\n]+("(?:, trust_remote_code=True)?\)\r?)$'
    r"|^(VLLM_PLUGINS=mediator vllm serve )\S+( --enable-lora[^\n]*)$",
    re.MULTILINE,
)


def loading_from(card: str, repo: str) -> str:
    """Let the examples of a card load the artifact from a repository, `USER/NAME`."""

    def renamed(match: re.Match[str]) -> str:
        before, after = (match[1], match[2]) if match[1] else (match[3], match[4])
        return f"{before}{repo}{after}"

    return _EXAMPLES.sub(renamed, card)

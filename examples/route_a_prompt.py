"""Route prompts through an artifact: print each one's decision and answer.

python examples/route_a_prompt.py OUT "12 + 30 =" "Reverse: a b c"
python examples/route_a_prompt.py OUT "12 + 30 =" --expert math
"""

import argparse

from mergekit_mediator import MediatorModel


def main() -> None:
    parser = argparse.ArgumentParser(description="Route prompts through an artifact.")
    parser.add_argument("artifact", help="a directory, or a repository on the Hub")
    parser.add_argument("prompts", nargs="+", help="one or more prompts")
    parser.add_argument("--expert", help="use this expert instead of routing")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()

    model = MediatorModel.from_pretrained(arguments.artifact)
    for prompt in arguments.prompts:
        ids, mask = model.tokenize(
            [prompt]
        )  # [1, length], through the chat template if there is one
        print(f"prompt:   {prompt}")
        if arguments.expert is None:
            decision = model.route(ids, mask)
            print(f"decision: {described(decision.experts, decision.weights[0].tolist())}")
            print(f"entropy:  {decision.entropy[0]:.3f} nats")
        tokens = model.generate(
            ids,
            mask,
            mixture=arguments.expert,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
        )
        answer = model.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"answer:   {answer}\n")


def described(experts: tuple[str, ...], weights: list[float]) -> str:
    """The experts with their probabilities, the most probable one first."""
    pairs = sorted(zip(experts, weights, strict=True), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {weight:.2f}" for name, weight in pairs)


if __name__ == "__main__":
    main()

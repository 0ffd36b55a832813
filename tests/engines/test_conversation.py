import pytest

from mergekit_mediator.engines.conversation import routables
from mergekit_mediator.errors import PromptError


def user(content):
    return {"role": "user", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"messages": [user("2 + 2?")]}, ["2 + 2?"]),
        ({"messages": [SYSTEM, user("2 + 2?")]}, ["2 + 2?"]),
        ({"messages": [user([{"type": "text", "text": "a"}, {"type": "image_url"}])]}, ["a"]),
        ({"prompt": "once"}, ["once"]),
        ({"prompt": ["a", "b"]}, ["a", "b"]),
        ({"prompt": [1, 2, 3]}, [(1, 2, 3)]),
        ({"prompt": [[1, 2], [3]]}, [(1, 2), (3,)]),
        ({"input": "hello"}, ["hello"]),
        ({"token_ids": [1, 2, 3], "sampling_params": {}}, [(1, 2, 3)]),
        ({"input": [user("hello")], "instructions": "Be brief."}, ["hello"]),
    ],
)
def test_a_request_is_routed_by_its_prompts(body, expected):
    assert routables(body) == expected


def test_every_turn_of_a_conversation_is_routed_by_the_same_opening():
    turns = [SYSTEM, user("2 + 2?")]
    first = routables({"messages": turns})
    later = [*turns, {"role": "assistant", "content": "4"}, user("Write a poem.")]
    assert routables({"messages": later}) == first


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "`messages`, `prompt`, `input` or `token_ids` is required"),
        ({"token_ids": []}, "token_ids: a text or a list with an entry is required"),
        ({"messages": "hi"}, "messages: a list of messages is required, got str"),
        ({"messages": [SYSTEM]}, "messages: a message of role `user` is required"),
        ({"messages": [user(" ")]}, "the first user's turn: no text to route by: name a model"),
        ({"messages": [user(None)]}, "no text to route by"),
        ({"prompt": ""}, "prompt: no text to route by"),
        (
            {"prompt": "a\ud800"},
            "prompt: text in Unicode is required, got half of a surrogate pair",
        ),
        ({"prompt": 3}, "prompt: a text or a list with an entry is required, got int"),
        ({"prompt": []}, "prompt: a text or a list with an entry is required"),
        ({"prompt": ["a", 3]}, "prompt: a list of texts or of lists of token ids is required"),
    ],
)
def test_requests_without_a_prompt_are_refused(body, message):
    with pytest.raises(PromptError, match=message):
        routables(body)

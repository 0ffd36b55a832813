"""Decoder blocks that run one by one, on every family that the tests merge."""

import pico
import pytest
import torch

from mergekit_mediator.errors import ArtifactError
from mergekit_mediator.models.blocks import (
    decoder_blocks,
    input_products,
    read_text,
    run_block,
    weights_of,
)
from mergekit_mediator.models.locate import locate_weights

every_family = pytest.mark.parametrize("make", pico.ARCHITECTURES.values(), ids=pico.ARCHITECTURES)
TOKENS = [1, 9, 17, 4, 30, 22, 8]


@pytest.fixture
def model(make):
    torch.manual_seed(0)
    return make().eval()


@every_family
def test_blocks_one_by_one_give_the_hidden_states_of_the_whole_model(model):
    wanted = model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
    hidden, calls = read_text(model, TOKENS)
    assert len(calls) == len(decoder_blocks(model)) == 3
    for number, block in enumerate(decoder_blocks(model)):
        torch.testing.assert_close(hidden, wanted[number])
        hidden = run_block(block, hidden, calls[number])
    assert not any(block._forward_pre_hooks for block in decoder_blocks(model))


@every_family
def test_the_weights_of_the_blocks_are_all_but_embeddings_head_and_norm(model):
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    places = locate_weights(model, shapes, shapes)
    inside = [name for block in decoder_blocks(model) for name in weights_of(block, places)]
    assert len(inside) == len(set(inside))
    outside = set(places) - set(inside)
    assert 2 <= len(outside) <= 4
    assert not any(".0." in name for name in outside)


def test_the_products_of_inputs_are_means_over_all_tokens():
    layer = torch.nn.Linear(3, 2)
    first, second = torch.randn(1, 4, 3), torch.randn(2, 1, 3)
    with input_products({"a": layer, "unused": torch.nn.Linear(5, 5)}) as products:
        layer(first)
        layer(second)
    rows = torch.cat([first[0], second[:, 0]])
    assert list(products) == ["a"]
    torch.testing.assert_close(products["a"], rows.T @ rows / 6)


def test_a_model_without_a_list_of_blocks_is_refused():
    model = pico.llama()
    model.config.num_hidden_layers = 7
    with pytest.raises(ArtifactError, match="a list of 7 decoder blocks required"):
        decoder_blocks(model)

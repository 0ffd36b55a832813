from mergekit_mediator.export.figures import counted


def test_weights_of_all_blocks_are_named_once_with_their_number():
    names = [
        f"model.layers.{i}.self_attn.{m}.bias" for i in range(12) for m in ("q_proj", "k_proj")
    ]
    assert counted([*names, "model.norm.weight"]) == [
        "model.layers.*.self_attn.q_proj.bias (12)",
        "model.layers.*.self_attn.k_proj.bias (12)",
        "model.norm.weight",
    ]


def test_the_number_of_an_expert_inside_a_block_is_a_place_too():
    names = [f"h.{i}.mlp.experts.{e}.scale" for i in range(2) for e in range(3)]
    assert counted(names) == ["h.*.mlp.experts.*.scale (6)"]

"""The resolver without vLLM: which names have an adapter, and how many."""

import pytest

from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.engines.vllm_resolver import ResolveExperts
from mergekit_mediator.errors import EngineError, MediatorError, MixtureError
from mergekit_mediator.export.adapter import read_peft


@pytest.fixture
def resolver(tmp_path):
    """Makes a resolver with a cache of its own."""

    def make(**settings):
        return ResolveExperts(ServiceSettings(cache=tmp_path / "cache", **settings))

    return make


def test_names_of_experts_blends_and_dense_have_adapters(resolver, artifact):
    one = resolver()
    names = ("math", "dense", "math=0.6,code=0.4")
    paths = {name: one.path(str(artifact), name) for name in names}
    assert [paths[name].name for name in names] == ["math", "dense", "math=0.625,code=0.375"]
    ranks = {name: read_peft(path).rank for name, path in paths.items()}
    assert ranks == {"math": 9, "dense": 1, "math=0.6,code=0.4": 16}


def test_adapters_have_the_rank_that_is_set_or_vllm_s_default(resolver, artifact):
    assert read_peft(resolver(rank=4).path(str(artifact), "math")).rank == 4
    assert resolver().path(str(artifact), "math").parent.name.endswith("-rank-16")


def test_other_names_are_left_to_other_resolvers(resolver, artifact):
    assert resolver().path(str(artifact), "someone-else") is None


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("auto", EngineError, "knows the name and not the prompt, and cannot route: serve with"),
        ("law=1", MixtureError, "unknown expert 'law'"),
        ("math=x", MixtureError, "must be a number"),
    ],
)
def test_names_that_no_adapter_can_have_are_told_and_the_next_one_works(
    resolver, artifact, name, error, message
):
    one = resolver()
    with pytest.raises(error, match=message):
        one.path(str(artifact), name)
    assert one.path(str(artifact), "math").name == "math"


def test_no_client_fills_the_engine_with_blends(resolver, artifact):
    one = resolver(blends=2)
    for name in ("math=0.5", "math=0.50", "math=0.5"):
        assert one.path(str(artifact), name).name == "math=0.5"
    with pytest.raises(EngineError, match="at most 2 names of blends are resolved"):
        one.path(str(artifact), "math=0.25")
    assert one.path(str(artifact), "code").name == "code"


def test_the_artifact_may_be_another_folder_than_the_model_that_is_served(
    resolver, artifact, tmp_path
):
    assert resolver(artifact=str(artifact)).path(str(tmp_path), "math").name == "math"
    with pytest.raises(MediatorError, match="manifest"):
        resolver().path(str(tmp_path), "math")

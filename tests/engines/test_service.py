import asyncio
import math
from contextlib import AsyncExitStack

import pytest
from fake_engine import EXPERTS, FakeEngine

from mergekit_mediator.engines.names import name_of
from mergekit_mediator.engines.service import RequestError
from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.errors import EngineError, ExportError, MixtureError, SettingError
from mergekit_mediator.route.decision import Thresholds


@pytest.fixture
def fake():
    return FakeEngine()


def service(fake, **settings):
    return fake.service(**settings)


def ask(service, model, body=None):
    async def run():
        async with service.resolved(model, body or {"prompt": "2 + 2?"}) as answer:
            return answer

    return asyncio.run(run())


def test_a_named_expert_answers_without_routing(fake):
    answer = ask(service(fake), "code")
    assert (answer.name, answer.figures) == ("code", {})


def test_the_engine_s_own_name_of_the_dense_expert_is_dense(fake):
    assert ask(service(fake), "served").name == ask(service(fake), "dense").name == "dense"
    assert fake.log == ["+dense"]


def test_other_names_are_left_to_the_engine(fake):
    assert ask(service(fake), "another-model") is None


def test_a_sure_request_goes_to_one_expert_and_says_how_sure(fake):
    answer = ask(service(fake), "auto")
    assert answer.name == "math"
    assert answer.figures["entropy"] < 0.01
    assert answer.as_json()["mixture"] == {"math": 1.0}


def test_an_unsure_request_goes_to_a_blend_of_rounded_weights(fake):
    fake.scores = [1.0, 0.9, -9.0]
    assert ask(service(fake), "auto").name == "math=0.5,code=0.5"
    assert fake.loaded == {"math=0.5,code=0.5"}


def test_several_prompts_of_one_request_share_their_mean(fake):
    fake.scores = [1.0, 0.9, -9.0]
    answer = ask(service(fake, policy="soft"), "auto", {"prompt": ["a", "b"]})
    assert answer.name == "math=0.5,code=0.5"


def test_far_requests_get_the_action_that_is_set(fake):
    fake.ood = 9.0
    assert ask(service(fake, ood_action="dense"), "auto").name == "dense"
    assert ask(service(fake, ood_action="fallback", fallback="chat"), "auto").name == "chat"
    with pytest.raises(RequestError, match="is out of distribution: score 9 is above") as refusal:
        ask(service(fake, ood_action="refuse"), "auto")
    assert refusal.value.status == 400
    assert refusal.value.body()["error"]["type"] == "BadRequestError"
    assert ask(service(fake, ood_action="blend"), "auto").name == "dense"  # too far for any expert


def test_a_request_without_text_gets_the_fallback_if_there_is_one(fake):
    assert ask(service(fake, fallback="chat"), "auto", {"prompt": " "}).name == "chat"
    assert ask(service(fake, fallback="dense"), "auto", {"input": []}).name == "dense"


def test_settings_that_no_request_could_be_answered_with_are_refused_at_the_start(fake):
    with pytest.raises(MixtureError, match="unknown expert 'law'"):
        service(fake, fallback="law")
    fake.thresholds = Thresholds(0.5, None)
    with pytest.raises(
        SettingError, match=r"refuse needs a router with a threshold .*fake has none"
    ):
        service(fake, ood_action="refuse")
    assert ask(service(fake, ood_action="refuse", ood_threshold=1.0), "auto").name == "math"


def test_a_router_without_a_distance_says_none(fake):
    fake.ood = math.nan
    assert "ood" not in ask(service(fake), "auto").figures


@pytest.mark.parametrize(
    ("model", "body", "status", "message"),
    [
        ("law=1", None, 404, "unknown expert 'law'"),
        ("math=x", None, 400, "must be a number"),
        ("unknown expert=x", None, 400, "must be a number"),
        ("auto", {"prompt": ""}, 400, "no text to route by"),
        ("auto", {}, 400, "no prompt to route by"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused_and_the_next_works(
    fake, model, body, status, message
):
    one = service(fake)
    with pytest.raises(RequestError, match=message) as refusal:
        ask(one, model, {"x": 1} if body == {} else body)
    assert refusal.value.status == status
    assert ask(one, "math").name == "math"


def test_an_adapter_that_the_engine_cannot_be_given_is_said_and_the_next_request_works(fake):
    one = service(fake)
    fake.error = ExportError("cache: cannot be written: No space left on device")
    for model in ("math", "math=0.5,code=0.5"):
        with pytest.raises(RequestError, match="No space left on device") as refusal:
            ask(one, model)
        assert refusal.value.status == 503
    fake.error = None
    assert ask(one, "math=0.5,code=0.5").name == "math=0.5,code=0.5"


def test_blends_beyond_the_limit_leave_the_least_recently_used_first(fake):
    one = service(fake, blends=2)
    for eighths in (1, 2, 1, 3):
        ask(one, f"math={eighths / 8},code={1 - eighths / 8}")
    assert fake.log == [
        "+math=0.125,code=0.875",
        "+math=0.25,code=0.75",
        "-math=0.25,code=0.75",
        "+math=0.375,code=0.625",
    ]


def test_a_thousand_named_blends_never_keep_more_than_the_limit(fake):
    one = service(fake, blends=3, grid=64)
    for i in range(1, 1000):
        ask(one, f"math={i / 1000},code={1 - i / 1000}")
        assert len(fake.loaded - set(EXPERTS)) <= 3


def test_a_blend_in_use_stays_and_a_client_waits_its_turn(fake):
    one = service(fake, blends=1)

    async def run():
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(one.resolved("math=0.5,code=0.5", {}))
            with pytest.raises(RequestError, match="1 blends are in use") as refusal:
                await stack.enter_async_context(one.resolved("math=0.25,code=0.75", {}))
            assert refusal.value.status == 429
            fake.scores = [1.0, 0.99, 0.98]  # a routed request is answered by its likeliest expert
            answer = await stack.enter_async_context(one.resolved("auto", {"prompt": "x"}))
            assert answer.name == "math"
        async with one.resolved("math=0.25,code=0.75", {}) as answer:
            assert answer.name == "math=0.25,code=0.75"

    asyncio.run(run())


def test_without_blends_the_likeliest_expert_answers_and_a_named_blend_is_refused(fake):
    fake.scores = [1.0, 0.9, -9.0]
    one = service(fake, blends=0)
    assert ask(one, "auto").name == "math"
    with pytest.raises(RequestError, match="at most 0 may be alive") as refusal:
        ask(one, "math=0.5,code=0.5")
    assert refusal.value.status == 429


def test_a_blend_whose_request_is_cancelled_while_it_loads_counts_and_leaves_later(fake):
    one = service(fake, blends=1)

    async def add(mixture):  # the engine has the adapter when the request is cancelled
        fake.loaded.add(name_of(mixture))
        await asyncio.sleep(1)

    async def run():
        fake.add, take = add, fake.add
        request = asyncio.create_task(one.resolved("math=0.5,code=0.5", {}).__aenter__())
        await asyncio.sleep(0.01)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        fake.add = take
        async with one.resolved("math=0.25,code=0.75", {}):
            assert fake.loaded == {"math=0.25,code=0.75"}

    asyncio.run(run())


def test_a_blend_that_the_engine_cannot_remove_is_a_refusal_and_the_next_request_works(fake):
    one = service(fake, blends=1)
    ask(one, "math=0.5,code=0.5")

    async def remove(mixture):
        raise EngineError("the engine has ended")

    fake.remove = remove
    with pytest.raises(RequestError, match="the engine has ended") as refusal:
        ask(one, "math=0.25,code=0.75")
    assert refusal.value.status == 503
    del fake.remove
    assert ask(one, "math=0.25,code=0.75").name == "math=0.25,code=0.75"


def test_many_requests_at_once_load_each_adapter_once(fake):
    one = service(fake, blends=4)

    async def request(i):
        async with one.resolved(f"math={i % 4 / 8},code={1 - i % 4 / 8}", {}) as answer:
            await asyncio.sleep(0)
            return answer.name

    async def run():
        return await asyncio.gather(*(request(i) for i in range(200)))

    assert len(set(asyncio.run(run()))) == 4
    assert len([entry for entry in fake.log if entry.startswith("+")]) == 4


def test_settings_come_from_the_environment():
    settings = ServiceSettings.from_environment(
        {"MEDIATOR_POLICY": "soft", "MEDIATOR_GRID": "4", "MEDIATOR_SAY": "none", "HOME": "/"}
    )
    assert (settings.policy, settings.grid, settings.say) == ("soft", 4, ())
    assert settings.answering().policy == "soft"
    for text, rank in (("auto", None), ("32", 32)):
        assert ServiceSettings.from_environment({"MEDIATOR_RANK": text}).rank == rank


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"MEDIATOR_GRIDD": "4"},
            "MEDIATOR_GRIDD: there is no such setting: the settings are MEDIATOR_ARTIFACT, MEDIATOR_ROUTER, ",
        ),
        ({"MEDIATOR_GRID": "0"}, "MEDIATOR_GRID: .* greater than or equal to 1, got '0'"),
        ({"MEDIATOR_POLICY": "sotf"}, "policy: input should be 'hard', 'soft' or 'auto'"),
        ({"MEDIATOR_SAY": "loud"}, "MEDIATOR_SAY"),
    ],
)
def test_a_setting_that_is_wrong_is_named(environment, message):
    with pytest.raises(SettingError, match=message):
        ServiceSettings.from_environment(environment)

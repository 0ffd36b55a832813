"""An engine and a router for tests of services: adapters are noted, scores are told."""

import asyncio

import torch

from mergekit_mediator.engines.names import name_of
from mergekit_mediator.engines.service import Service
from mergekit_mediator.engines.settings import ServiceSettings
from mergekit_mediator.route.decision import Thresholds, decide_from_scores

EXPERTS = ("math", "code", "chat")


class FakeEngine:
    """Notes its adapters; its router gives the scores that it is told."""

    name, thresholds, dense_names = "fake", Thresholds(0.5, 1.0), frozenset({"served"})

    def __init__(self):
        self.loaded, self.log, self.scores, self.ood = set(), [], [9.0, 0.0, 0.0], 0.0
        self.error = None  # raised instead of taking an adapter

    async def decide(self, prompts, route_on):
        scores = torch.tensor([self.scores] * len(prompts))
        return decide_from_scores(scores, EXPERTS, ood=torch.full((len(prompts),), self.ood))

    async def add(self, mixture):
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if name_of(mixture) not in self.loaded:
            self.log.append(f"+{name_of(mixture)}")
        self.loaded.add(name_of(mixture))

    async def remove(self, mixture):
        self.log.append(f"-{name_of(mixture)}")
        self.loaded.remove(name_of(mixture))

    def engine_name(self, mixture):
        return name_of(mixture)

    def close(self):
        self.log.append("closed")

    def service(self, **settings):
        return Service(EXPERTS, self, self, ServiceSettings(**settings))

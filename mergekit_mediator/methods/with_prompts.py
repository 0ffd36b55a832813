"""All merge methods that need prompts, in one place: what is listed here is registered."""

from mergekit_mediator.methods.expert_merging import ExpertMerging
from mergekit_mediator.methods.fisher import Fisher
from mergekit_mediator.methods.prompt_method import PromptMethod
from mergekit_mediator.methods.rcp import Rcp
from mergekit_mediator.methods.regmean_pp import RegmeanPp

WITH_PROMPTS: tuple[type[PromptMethod], ...] = (ExpertMerging, Fisher, Rcp, RegmeanPp)

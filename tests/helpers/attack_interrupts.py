"""Interrupts requests at random moments, and looks for what that leaves in the model.

    python tests/helpers/attack_interrupts.py [FORM ...] [--shots 3000] [--seed 0] [--times 1]

A shot is survived if the weights are the dense expert's bit for bit when the interrupt reaches the caller,
no hook is left, no mixture counts as in place, torch has its threads, and the next request is answered
right. After a shot that is not survived, the model is loaded anew.
"""

import argparse
import faulthandler
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pico
import torch
from families import make_family
from routed_pico import build

from mergekit_mediator import MediatorModel

IDS = torch.randint(4, 60, (2, 3), generator=torch.Generator().manual_seed(1))
MIXTURES = ({"math": 1.0}, {"code": 1.0}, {"math": 0.3, "chat": 0.7})
# 4.9 million routed weights: as many as several threads put in place without being told to.
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 128, "num_hidden_layers": 5}
# By form: the changes of the pico model, and whether two threads put mixtures in place. In `mixture`,
# `threads` and `wide` nothing is computed inside, so that nearly every shot hits while weights are written.
FORMS: dict[str, tuple[dict[str, Any], bool]] = {
    "mixture": ({}, False),
    "threads": ({}, True),
    "wide": (WIDE, True),
    "merge": ({}, False),
    "rows": ({}, False),
    "routed": ({}, False),
}


class Target:
    """A routed model, and how it is when nothing has happened to it."""

    def __init__(self, root: Path, form: str) -> None:
        self.model, self.form = MediatorModel.from_pretrained(root), form
        changes, self.parallel = FORMS[form]
        if self.parallel and not changes:
            self.model._mixer.placer.parallel_from = 1
        torch.set_num_threads(1 + self.parallel)
        self.weights = {n: w.clone() for n, w in self.model.model.state_dict().items()}
        self.places = {n: p.data_ptr() for n, p in self.model.model.named_parameters()}
        self.answers = [self.answer(mixture) for mixture in MIXTURES]
        times = []
        for mixture in MIXTURES * 3:
            start = time.perf_counter()
            self.request(mixture)
            times.append(time.perf_counter() - start)
        self.seconds = sorted(times)[len(times) // 2]

    def request(self, mixture: dict[str, float]) -> None:
        if self.form == "rows":
            self.model.forward(IDS, mixture=[mixture, {"code": 0.4, "math": 0.6}], apply="rows")
        elif self.form == "merge":
            self.model.forward(IDS, mixture=mixture, apply="merge")
        elif self.form == "routed":
            self.model.generate(IDS, max_new_tokens=2, do_sample=False)
        else:
            with self.model.mixture(mixture):
                pass

    def answer(self, mixture: dict[str, float]) -> torch.Tensor:
        form = "rows" if self.form == "rows" else "merge"
        return self.model.forward(IDS, mixture=mixture, apply=form).logits

    def left(self) -> str:
        """What a request has left in the model; empty if nothing."""
        model, mixer = self.model.model, self.model._mixer
        if _is_held(mixer.lock):
            return "the lock is held"
        if mixer.rows is not None:
            return "a mixture counts as in place"
        if torch.get_num_threads() != 1 + self.parallel:
            return "torch lacks threads"
        if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
            return "hooks are left"
        if {n: p.data_ptr() for n, p in model.named_parameters()} != self.places:
            return "parameters are others"
        after = model.state_dict()
        if not all(torch.equal(self.weights[n], after[n]) for n in self.weights):
            return "weights are not restored"
        return ""

    def wrong(self, chosen: int) -> str:
        """How the next request fails; empty if it is answered right."""
        try:
            if not torch.equal(self.answer(MIXTURES[chosen]), self.answers[chosen]):
                return "the next answer is wrong"
        except Exception as error:  # noqa: BLE001 - each is a shot that is not survived
            return f"the next request fails: {type(error).__name__}: {error}"
        return self.left()


def _is_held(lock: Any) -> bool:
    """Whether the lock is this thread's: another thread cannot take it."""
    free: list[bool] = []

    def take() -> None:
        free.append(lock.acquire(blocking=False))
        if free[0]:
            lock.release()

    other = threading.Thread(target=take)
    other.start()
    other.join()
    return not free[0]


def shoot(target: Target, draw: random.Random, times: int = 1) -> str:
    """Interrupt a request some times; gives how it fails, empty if it is survived."""
    left = 0
    after = draw.uniform(0, 1.5 * target.seconds)

    def interrupt(*_: object) -> None:
        nonlocal left
        if left:
            left -= 1
            if left:
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 2e-4))
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    try:
        while True:
            if not left:  # or a library has swallowed the interrupts
                left = times
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, after))
            target.request(draw.choice(MIXTURES))
    except KeyboardInterrupt:
        left = 0
        return target.left() or target.wrong(draw.randrange(len(MIXTURES)))
    except Exception as error:  # noqa: BLE001 - each is a shot that is not survived
        return f"{type(error).__name__} instead of the interrupt: {error}"
    finally:
        left = 0
        signal.setitimer(signal.ITIMER_REAL, 0)


def attack(form: str, shots: int, seed: int, times: int = 1) -> Counter[str]:
    """The failures, by kind, of shots at a model that is built for it."""
    threads, failures, draw = torch.get_num_threads(), Counter[str](), random.Random(seed)
    handler, report = signal.getsignal(signal.SIGALRM), sys.unraisablehook
    sys.unraisablehook = (
        bool  # of C: a hook of Python's may itself be hit, which pytest makes a failure
    )
    with tempfile.TemporaryDirectory() as root, torch.no_grad():
        family = make_family(Path(root), lambda: pico.llama(**FORMS[form][0]))
        build(Path(root) / "out", family, density=0.2)
        target = Target(Path(root) / "out", form)
        try:
            for _ in range(shots):
                faulthandler.dump_traceback_later(120, exit=True)  # a thread waits for ever
                found = shoot(target, draw, times)
                if found:
                    failures[found] += 1
                    target = Target(Path(root) / "out", form)
        finally:
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, handler)
            sys.unraisablehook = report
            torch.set_num_threads(threads)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("forms", nargs="*", help=", ".join(FORMS))
    parser.add_argument("--shots", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int, default=1, help="interrupts that follow each other")
    args = parser.parse_args()
    for form in args.forms or FORMS:
        failures = attack(form, args.shots, args.seed, args.times)
        survived = args.shots - failures.total()
        print(f"{form}: tried {args.shots}, survived {survived}", dict(failures), flush=True)


if __name__ == "__main__":
    main()

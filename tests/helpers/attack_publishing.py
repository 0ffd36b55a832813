"""Attack publishing and calibrating: stop them anywhere, and let several of them meet.

    python tests/helpers/attack_publishing.py [--seed N] [--stride N] [--random N] [--meetings N] [--json FILE]

Prints, for each attack, how often it was tried and how often all of this held afterwards: the output is
the old model or the new one, whole and verified (or, where files are moved one by one, loads as none), the
user's files are there as they were, a rerun succeeds without cleaning, and nothing else is left.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pico
import torch
from faults import ERRORS, contents, faults, in_child, is_leftover
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from outputs import Output, by, model_of
from transformers.utils import logging

from mergekit_mediator import MediatorModel
from mergekit_mediator.errors import MediatorError
from mergekit_mediator.merge.run import run
from mergekit_mediator.models.loading import load_plain, load_tokenizer
from mergekit_mediator.route.calibrate import calibrate_artifact
from mergekit_mediator.store.manifest import ROUTER, read_manifest
from mergekit_mediator.store.verification import verify_files

STOPPED = [
    ("exchange", "new"),
    ("exchange", "mine"),
    ("exchange", "artifact"),
    ("exchange", "plain"),
    ("exchange", "link"),
    ("in place", "artifact"),
    ("in place", "plain"),
    ("inside", "empty"),
    ("inside", "artifact"),
]


class Attacks:
    """All attacks on one family of pico models in one directory."""

    def __init__(self, root: Path, options: argparse.Namespace) -> None:
        self.root, self.options = root, options
        self.random = random.Random(options.seed)
        self.rows: list[dict[str, object]] = []
        paths = pico.save_family(root / "family")
        self.base = paths.pop("base")
        self.experts = paths
        self.old = root / "old" / "out"
        self.merge(self.old, 0.25)
        self.data = {}
        for i, name in enumerate(self.experts):
            self.data[name] = root / f"{name}.jsonl"
            prompts = [{"prompt": f"w{20 * i + n} w{i}"} for n in range(6)]
            self.data[name].write_text("\n".join(map(json.dumps, prompts)))

    def merge(self, out: Path, density: float = 0.5) -> None:
        config = {
            "merge_method": "mediator",
            "base_model": str(self.base),
            "models": [
                {"model": str(path), "parameters": {"expert": name}}
                for name, path in self.experts.items()
            ],
            "parameters": {"route": "all", "density": density},
        }
        quiet = MergeOptions(quiet=True)
        run(MergeConfiguration.model_validate(config), str(out), quiet, overwrite=True)

    def calibrate(self, out: Path) -> None:
        manifest = read_manifest(out)
        verify_files(out, manifest)
        calibrate_artifact(
            out,
            load_plain(out),
            load_tokenizer(out),
            self.data,
            kind="embedding",
            manifest=manifest,
        )

    def count(self, name: str, trials: Iterator[Callable[[], None]]) -> None:
        """Make the trials of one attack; one that raises has not survived."""
        tried = survived = 0
        for trial in trials:
            tried += 1
            try:
                trial()
                survived += 1
            except Exception as error:  # noqa: BLE001 whatever it is, it is counted and shown
                print(
                    f"  {name}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True
                )
        self.rows.append({"name": name, "tried": tried, "survived": survived})
        print(f"{name}: tried {tried}, survived {survived}", flush=True)

    def stopped_merges(self, way: str, kind: str) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.root))
        output = Output(folder, kind, self.old, self.base)
        with by(way, output):
            begun = time.monotonic()
            with faults() as steps:
                self.merge(output.path)
            seconds = time.monotonic() - begun
            new = shutil.copytree(output.path, folder / "new", symlinks=True)

            def trial(stop: Callable[[], object], states: tuple[str, ...]) -> None:
                output.restore()
                failed = stop()
                state = output.state(new)
                expected(state in (states if failed else ("new",)), f"the output is {state}")
                self.merge(output.path)
                expected(output.state(new) == "new", "a rerun does not give the new model")
                expected(output.leftovers() == [], f"left: {output.leftovers()}")

            def merged() -> None:
                self.merge(output.path)

            def killed_twice(step: int, action: Callable[[], None]) -> bool:
                """Killed at a step, then while that is undone: its first steps are those of the next merge."""
                return killed_at(step, action) and killed_at(self.random.randint(1, 40), action)

            whole = ("old", "new")
            killed = whole if way == "exchange" else (*whole, "neither")
            at = range(1, steps.taken + 1, self.options.stride)
            name = f"merge, {way}, {kind}"
            self.count(
                f"{name}: killed at a step",
                (lambda n=n: trial(lambda: killed_at(n, merged), killed) for n in at),
            )
            self.count(
                f"{name}: killed at a time",
                (
                    lambda: trial(
                        lambda: killed_after(self.random.uniform(0, seconds), merged), killed
                    )
                    for _ in range(self.options.random)
                ),
            )
            if way != "exchange":
                self.count(
                    f"{name}: killed twice",
                    (lambda n=n: trial(lambda: killed_twice(n, merged), killed) for n in at),
                )
            for fault in ERRORS:
                self.count(
                    f"{name}: {fault} at a step",
                    (lambda n=n, f=fault: trial(lambda: fails_at(n, f, merged), whole) for n in at),
                )
        shutil.rmtree(folder)

    def stopped_calibrations(self, again: bool) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.root))
        out = shutil.copytree(self.old, folder / "work" / "out")
        if again:
            short = {name: path.with_suffix(".short") for name, path in self.data.items()}
            for name, path in short.items():
                path.write_text("\n".join(self.data[name].read_text().split("\n")[1:]))
            self.data, whole = short, self.data
            self.calibrate(out)
            self.data = whole
        saved = shutil.copytree(out, folder / "saved")
        before = contents(out)
        begun = time.monotonic()
        with faults() as steps:
            self.calibrate(out)
        seconds = time.monotonic() - begun
        after = contents(out)

        def trial(stop: Callable[[], object]) -> None:
            shutil.rmtree(out)
            shutil.copytree(saved, out)
            failed = stop()
            valid(out)
            router = read_manifest(out).router
            states = [
                json.loads(state["mediator/manifest.json"][1])["router"]
                for state in (before, after)
            ]
            expected(router in (states if failed else states[1:]), "the router is another one")
            self.calibrate(out)
            expected(contents(out) == after, "a rerun does not give the new artifact")
            left = list(filter(is_leftover, os.listdir(out.parent)))
            expected(not left, f"left: {left}")
            expected(read_manifest(out).router_file == ROUTER, "the router has another name")

        def calibrated() -> None:
            self.calibrate(out)

        at = range(1, steps.taken + 1)
        name = f"calibrate, {'again' if again else 'the first time'}"
        self.count(
            f"{name}: killed at a step",
            (lambda n=n: trial(lambda: killed_at(n, calibrated)) for n in at),
        )
        self.count(
            f"{name}: killed at a time",
            (
                lambda: trial(lambda: killed_after(self.random.uniform(0, seconds), calibrated))
                for _ in range(self.options.random)
            ),
        )
        for fault in ERRORS:
            for lasting in (False, True):
                self.count(
                    f"{name}: {fault} at a step{' and from there on' * lasting}",
                    (
                        lambda n=n, f=fault, x=lasting: trial(lambda: fails_at(n, f, calibrated, x))
                        for n in at
                    ),
                )
        shutil.rmtree(folder)

    def meetings(self) -> None:
        """Two merges at once; a merge and a calibration; process ids that come again."""
        folder = Path(tempfile.mkdtemp(dir=self.root))
        out = folder / "work" / "out"
        references = []
        for density in (0.5, 0.75):
            self.merge(out, density)
            references.append(model_of(out))
            shutil.rmtree(out)

        def two_merges(kind: str) -> None:
            shutil.rmtree(out.parent)
            out.parent.mkdir()
            if kind == "over an artifact":
                shutil.copytree(self.old, out)
            codes = together(
                lambda: self.merge(out, 0.5),
                lambda: self.merge(out, 0.75),
                self.random.uniform(0, 0.1),
            )
            expected(sorted(codes) in ([0, 0], [0, 1]), f"exit statuses {codes}")
            verify_files(out, read_manifest(out))
            done = [r for r, code in zip(references, codes, strict=True) if code == 0]
            expected(model_of(out) in done, "the output is none of those that ended well")
            self.clean(out)

        def merge_and_calibrate() -> None:
            shutil.rmtree(out.parent)
            shutil.copytree(self.old, out)
            offset = self.random.uniform(-0.3, 0.3)
            codes = together(lambda: self.calibrate(out), lambda: self.merge(out), offset)
            expected(set(codes) <= {0, 1} and 0 in codes, f"exit statuses {codes}")
            valid(out)
            if codes[1] == 0:
                expected(
                    read_manifest(out).parameters["density"] == 0.5,
                    "the merge that ended well is lost",
                )
            self.clean(out)

        def recycled() -> None:
            shutil.rmtree(out.parent)
            out.parent.mkdir()
            stock, os.getpid = os.getpid, lambda: 7
            try:
                code = in_child(
                    lambda: (
                        signal.setitimer(signal.ITIMER_REAL, self.random.uniform(0.001, 0.3)),
                        self.merge(out),
                    )
                )
                expected(code in (0, -signal.SIGALRM), f"exit status {code}")
                self.merge(out)
            finally:
                os.getpid = stock
            expected(model_of(out) == references[0], "a rerun does not give the new model")
            self.clean(out)

        times = range(self.options.meetings)
        for kind in ("into a new output", "over an artifact"):
            self.count(f"two merges at once {kind}", (lambda k=kind: two_merges(k) for _ in times))
        self.count("a merge during a calibration", (merge_and_calibrate for _ in times))
        self.count("killed, and the process id comes again", (recycled for _ in times))
        shutil.rmtree(folder)

    @staticmethod
    def clean(out: Path) -> None:
        expected(os.listdir(out.parent) == ["out"], f"left: {os.listdir(out.parent)}")


def expected(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


def valid(out: Path) -> None:
    """Check that an artifact verifies, loads and routes."""
    manifest = read_manifest(out)
    verify_files(out, manifest)
    MediatorModel.from_pretrained(out).route(torch.tensor([[5, 6, 7]]))


def killed_at(step: int, action: Callable[[], None]) -> bool:
    """Whether the process was killed at a step, rather than done before."""

    def stopped() -> None:
        with faults(step, "kill"):
            action()

    code = in_child(stopped)
    expected(code in (0, -signal.SIGKILL), f"exit status {code}")
    return code != 0


def killed_after(seconds: float, action: Callable[[], None]) -> bool:
    """Whether the process was killed after a time, rather than done before."""
    child = os.fork()
    if child == 0:
        action()
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def fails_at(step: int, fault: str, action: Callable[[], None], lasting: bool = False) -> bool:
    """Whether an action fails, in one line of this package's own, if a step of it does."""
    with faults(step, fault, lasting):
        try:
            action()
        except MediatorError as error:
            expected("\n" not in str(error), "the error has several lines")
            return True
    return False


def together(first: Callable[[], None], second: Callable[[], None], offset: float) -> list[int]:
    """The exit statuses of two processes, of which the second begins later, or sooner, by some seconds."""
    children = []
    for action, wait in ((first, max(0, -offset)), (second, max(0, offset))):
        child = os.fork()
        if child == 0:
            time.sleep(wait)
            os._exit(in_child(action) & 0xFF)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stride", type=int, default=1, help="of the steps at which merges are stopped"
    )
    parser.add_argument(
        "--random", type=int, default=50, help="kills at a random time, of each kind"
    )
    parser.add_argument("--meetings", type=int, default=50, help="of two processes, of each kind")
    parser.add_argument(
        "--only", default="", help="attacks whose name holds this: merge, calibrate, meet"
    )
    parser.add_argument("--json", type=Path, help="write the counts there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as root:
        attacks = Attacks(Path(root), options)
        if options.only in "calibrate":
            for again in (False, True):
                attacks.stopped_calibrations(again)
        if options.only in "meet":
            attacks.meetings()
        if options.only in "merge":
            for way, kind in STOPPED:
                attacks.stopped_merges(way, kind)
        if options.json is not None:
            options.json.write_text(json.dumps({"rows": attacks.rows}, indent=1) + "\n")
    lost = sum(int(row["tried"]) - int(row["survived"]) for row in attacks.rows)
    print(f"in all: tried {sum(int(row['tried']) for row in attacks.rows)}, lost {lost}")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()

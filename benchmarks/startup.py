"""What the start-up hook adds to an interpreter that never merges.

    python benchmarks/startup.py [--runs 30]

Three virtual environments with nothing in them, or the package's wheel as pip installs it; `python -c pass`
is timed in turn in each, so that the figures hold on a machine whose speed drifts. Processor time is
given beside wall time, since it says more where other work is going on.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from statistics import median

import record

ROOT = Path(__file__).parents[1]
CASES = {
    "absent": ("absent", None),
    "switched_off": ("present", "0"),
    "installed": ("present", None),
}


def build_wheel(out: Path) -> Path:
    """The package's wheel, from a copy of its sources."""
    program = (
        "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    )
    source = out / "source"
    names = ["pyproject.toml", "setup.cfg", "README.md", "LICENSE", "mergekit_mediator"]
    source.mkdir()
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(source)], check=True)
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, '.'); " + program, str(out)]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    return out / built.stdout.splitlines()[-1]


def environment(directory: Path, wheel: Path | None) -> Path:
    """A virtual environment without pip; gives its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    python = directory / "bin" / "python"
    if wheel is not None:
        program = "import sysconfig; print(sysconfig.get_path('purelib'))"
        found = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(found.stdout.strip())
    return python


def start(python: Path, switch: str | None) -> tuple[float, float]:
    """Wall and processor milliseconds of one interpreter that does nothing."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MERGEKIT_"))}
    if switch is not None:
        variables["MERGEKIT_MEDIATOR_AUTOLOAD"] = switch
    began = time.perf_counter()
    process = os.posix_spawn(python, [str(python), "-c", "pass"], variables)
    _, status, usage = os.wait4(process, 0)
    wall = time.perf_counter() - began
    if status:
        raise SystemExit(f"{python} failed")
    return 1000 * wall, 1000 * (usage.ru_utime + usage.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as directory:
        wheel = build_wheel(Path(directory))
        pythons = {
            "absent": environment(Path(directory, "a"), None),
            "present": environment(Path(directory, "b"), wheel),
        }
        times: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
        for run in range(-3, runs):  # the first fill the caches, and compile the package
            for case, (which, switch) in CASES.items():
                measured = start(pythons[which], switch)
                if run >= 0:
                    times[case].append(measured)
    figures = {
        f"{case}_{kind}_ms": round(median(t[i] for t in measured), 3)
        for case, measured in times.items()
        for i, kind in enumerate(("wall", "cpu"))
    }
    for case in ("switched_off", "installed"):
        for i, kind in enumerate(("wall", "cpu")):
            pairs = zip(times[case], times["absent"], strict=True)
            figures[f"{case}_adds_{kind}_ms"] = round(median(a[i] - b[i] for a, b in pairs), 3)
    record.write("startup", {"runs": runs, "statistic": "median", **figures})


if __name__ == "__main__":
    main()

"""Tests and benchmarks that need a GPU, in two runs that fit a GPU machine reached for fifteen minutes.

    python bench/gpu.py prepare                       on a CPU machine with the GPU machine's Python, torch and Triton:
    makes .kit/ python bench/gpu.py run1 --out FOLDER             on the GPU machine, .kit/ carried along if there is
    one python bench/gpu.py run2 --out FOLDER [TEST…]     after it; TEST: tests to repeat, as pytest names them
    python bench/gpu.py collect FOLDER…               anywhere: bench/results/kernels-<card>.json, and what the tests
    said

run1, at most 480 s: build, tests marked gpu, three GRPO steps of the 3B shape by phase, then the kernels against their
peers. run2, at most 330 s: tests to repeat, rollout, learner, TRL's step if TRL is installed, counters of the row
kernel. What is found lies in FOLDER as soon as it is: rows.jsonl, and a log for each part. A part that overruns its
limit is ended, and the next begins. --dry does all of it at small shapes on a CPU.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import journal
import kit
from machine import results_file

ROOT = Path(__file__).parent.parent
LIMITS = {"run1": 480, "run2": 330}  # s
PROCESSES = 5  # of tests
FAST = ["--seconds", "2", "--rounds", "2", "--limit", "40"]
ONCE = ["--seconds", "0", "--rounds", "1", "--limit", "90"]


@dataclass(frozen=True)
class Part:
    """limit_s: after which it is ended. rows: whether it is a `python bench/`, which another process can go on with."""

    name: str
    limit_s: float
    command: tuple
    rows: bool = False


def parts(run, python, rows, dry, tests) -> list:
    """Of a run, by value."""
    built = Part("build", 90, (python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", "."))

    def bench(name, limit_s, *options):
        small = ("--dry",) if dry else ()
        return Part(name, limit_s, (python, "bench/", *options, "--keep", str(rows), "--resume", *small), rows=True)

    def tested(limit_s, which):
        options = ("-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "gpu_tests", "-n", "1" if dry else str(PROCESSES))
        return Part("tests", limit_s, (python, "-m", "pytest", *options, *which))

    if run == "run1":
        return [
            built,
            tested(170, marked()),
            bench("step", 150, "step", *ONCE),
            bench("kernels", 130, "sampling", "decode", "delta", "render", "loss", *FAST),
        ]
    return [
        *([] if kit.is_built() else [built]),
        *([tested(90, tests)] if tests else []),
        bench("models", 170, "rollout", "learner", "trl", *ONCE),
        Part("counters", 60, (python, "bench/counters.py", "--keep", str(rows), *(("--dry",) if dry else ()))),
    ]


def marked() -> list:
    """Files that hold tests marked gpu: others may need packages that are not there."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "\n@pytest.mark.gpu" in path.read_text("utf-8")]


def carry_out(part, limit_s, rows, log) -> str:
    """Run it, what it prints to the screen and to the log, and again after a row that took its process down; how it
    ended."""
    end, status = time.monotonic() + limit_s, "not run: no time was left"
    while end - time.monotonic() > 0:
        code, late = attend(part.command, end - time.monotonic(), log)
        status = ended(code, late, limit_s)
        left = journal.lost(rows)
        for bench, what, against in left:
            journal.add(rows, row={"bench": bench, "what": what, "against": against, "goal": "", "failed": status})
        if not part.rows or late or code in (0, 1) or (code > 0 and code != 75 and not left):
            break
    return status


def attend(command, limit_s, log):
    """(exit status, whether it was ended for its time) of a command, which is ended with all that it started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    late = threading.Event()

    def stop():
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit_s, stop)
    timer.start()
    try:
        with open(log, "a", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                print(line[:300].rstrip(), flush=True)
        return process.wait(), late.is_set()
    finally:
        timer.cancel()


def ended(code, late, limit_s) -> str:
    if late:
        return f"ended after its {limit_s:.0f} s"
    if code < 0:
        return f"its process died of {signal.Signals(-code).name}"
    return {0: "done", 75: "the device answered no more"}.get(code, f"exit status {code}")


def run(options):
    began, out = time.monotonic(), options.out
    out.mkdir(parents=True, exist_ok=True)
    rows = (out / "rows.jsonl").resolve()
    os.environ.update(kit.environment(rows, options.dry))
    total = options.limit or LIMITS[options.run]
    if not options.dry:
        journal.add(rows, card=say_card())
    kit.unpack(sys.executable)
    for part in parts(options.run, sys.executable, rows, options.dry, options.tests):
        spent = time.monotonic() - began
        print(f"== {spent:.0f} s: {part.name}, {kit.kernels()} kernels compiled", flush=True)
        if options.dry and part.name == "build":
            status = "not run: a dry run builds nothing"
        else:
            status = carry_out(part, min(part.limit_s, total - spent - 2), rows, out / f"{part.name}.txt")
        if part.name == "build" and status == "done":
            kit.note_build()
        took = time.monotonic() - began - spent
        journal.add(
            rows, part={"name": part.name, "seconds": round(took, 1), "limit_s": part.limit_s, "status": status}
        )
    print(f"== {time.monotonic() - began:.0f} s: end\n{summary(journal.read(rows))}", flush=True)


def say_card():
    """The card as its driver calls it; or an end, without one."""
    smi = shutil.which("nvidia-smi")
    fields = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    done = smi and subprocess.run(
        [smi, f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True
    )
    if not done or done.returncode:
        sys.exit("bench/gpu.py: no GPU here (nvidia-smi finds none); --dry tries everything at small shapes on the CPU")
    print(done.stdout.strip(), flush=True)
    return done.stdout.strip()


def tests_of(lines) -> dict:
    """{test: (outcome, reason)}, by the last time; one that was listed and not heard of is "not run"."""
    found = {}
    for line in lines:
        for test in line.get("tests", ()):
            found.setdefault(test, ("not run", ""))
        if "test" in line:
            found[line["test"]] = (line["outcome"], line["reason"])
    return found


def summary(lines) -> str:
    """A run in a few lines: its parts, the tests that didn't pass, the rows that failed."""
    text = [
        f"{p['name']}: {p['seconds']:.0f} of {p['limit_s']} s, {p['status']}"
        for p in (x["part"] for x in lines if "part" in x)
    ]
    tests = tests_of(lines)
    if tests:
        counts = Counter(outcome for outcome, _ in tests.values())
        text.append("tests: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
    text += [
        f"  {outcome}: {test} {reason}"
        for test, (outcome, reason) in tests.items()
        if outcome not in ("passed", "skipped")
    ]
    rows = journal.gather(lines)["rows"]
    timed = sum("ours_s" in row for row in rows)
    text.append(f"rows: {len(rows)}, {timed} of them timed")
    text += [f"  failed: {row['bench']}, {row['what']}: {row['failed']}" for row in rows if "failed" in row]
    return "\n".join(text)


def collect(options):
    """The rows of several folders, the later ones' where both have one, to the results file."""
    lines = [line for folder in options.folders for line in journal.read(folder / "rows.jsonl")]
    try:
        found = journal.gather(lines)
    except ValueError as problem:
        sys.exit(f"bench/gpu.py: {problem}")
    if found.get("mode") != "cuda":
        sys.exit(
            f"bench/gpu.py: {', '.join(map(str, options.folders))} hold {found.get('mode', 'no')} rows, none of a GPU"
        )
    found["card"] = [line["card"] for line in lines if "card" in line][-1]
    tests = tests_of(lines)
    found["tests"] = {
        "passed": sum(outcome == "passed" for outcome, _ in tests.values()),
        "others": {test: f"{outcome}: {reason}" for test, (outcome, reason) in tests.items() if outcome != "passed"},
    }
    path = results_file("kernels", found)
    journal.write(path, found)
    print(f"{summary(lines)}\n{path}\nbench/tables.py writes the pages' tables")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python bench/gpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("prepare", help="make .kit/")
    for name in LIMITS:
        verb = verbs.add_parser(name)
        verb.set_defaults(run=name, tests=[])
        verb.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="where results go; $OUT unless given")
        verb.add_argument("--limit", type=float, help=f"seconds in all, {LIMITS[name]} unless given")
        verb.add_argument("--dry", action="store_true", help="at small shapes on the CPU")
        if name == "run2":
            verb.add_argument("tests", nargs="*", help="tests to repeat")
    verbs.add_parser("collect").add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    if options.verb == "prepare":
        return kit.prepare()
    if options.verb == "collect":
        return collect(options)
    if not options.out:
        parser.error("--out FOLDER, or OUT in the environment, says where results go")
    options.out = Path(options.out)
    return run(options)


if __name__ == "__main__":
    main()

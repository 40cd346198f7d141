"""Starts of runs on many images, against the build before lists were columnar: what a first and a resumed start take of
a folder, of tar archives and of parquet files, and how memory grows with their number.

The other build is taken out of the repository's history. Each start is a fork of a process that has imported what it
needs, so neither imports nor what an earlier start left count. Files are hard links to a few; all is removed
afterwards.
"""

import atexit
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import cache, partial
from pathlib import Path

from row import Row, Sides

ROOT = Path(__file__).parent.parent
BEFORE = "96c2c70"  # the last build with a Python object a file
SIZES = (10_000, 100_000, 1_000_000)
AT_ONCE = 10_000  # files a folder, members an archive

SERVER = r"""
import json, os, resource, sys, time
sys.path.insert(0, sys.argv[1])
import sslr1
from pathlib import Path
from sslr1.data.images import ImageFolder
assert Path(sslr1.__file__).is_relative_to(sys.argv[1]), sslr1.__file__

def kib(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def start(path, run, resumed):
    listing, split = run / "files.txt", {}
    if "split" in ImageFolder.hold_out.__code__.co_varnames:
        split = {"split": run / "split.json"}
    if not resumed:
        held = {"scratch": run} if split else {}
        found = ImageFolder.scan(path, **held)
        found.freeze(listing)
        if split:
            found.hold_out(0.05, **split)
        del found
    found = ImageFolder.thaw(path, listing)
    train, _ = found.hold_out(0.05, **split)
    if not split:  # which sorted its list at each start
        sorted(train, key=lambda number: -found.files[number][1])[:4]
    return len(found)

for line in sys.stdin:
    path, run, resumed = json.loads(line)
    reading, writing = os.pipe()
    if not os.fork():
        Path("/proc/self/clear_refs").write_text("5")
        before, began = kib("VmRSS"), time.process_time()
        count = start(path, Path(run), resumed)
        found = {"cpu_s": time.process_time() - began, "grown": (kib("VmHWM") - before) << 10, "count": count}
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        print(answer.read(), flush=True)
    os.wait()
"""


class Build:
    """A tree's ImageFolder, in a process of its own."""

    def __init__(self, tree):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(tree)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
        )
        self.run = Path(tempfile.mkdtemp(dir=place()))

    def start(self, path, resumed) -> dict:
        self.process.stdin.write(json.dumps([str(path), str(self.run), resumed]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@cache
def place():
    folder = Path(tempfile.mkdtemp(prefix="sslr1-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def ours():
    return Build(ROOT)


@cache
def before():
    tree = place() / "before"
    tree.mkdir()
    packed = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, capture_output=True, check=False)
    if packed.returncode:
        raise ModuleNotFoundError(name="git's history")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(tree, filter="data")
    for library in (ROOT / "sslr1").glob("_C*.so"):
        shutil.copy(library, tree / "sslr1")
    return Build(tree)


def rows(mode):
    if mode != "cpu":
        return []
    kinds = {"a folder": folder, "tar archives": archives}
    asked = itertools.product(kinds.items(), (False, True))
    return [
        *(
            Row(
                what=f"{'resumed' if resumed else 'first'} start, {SIZES[-1]:,} files in {name}",
                against=f"the build before ({BEFORE})",
                goal="4",
                make=partial(sides, make, resumed),
            )
            for (name, make), resumed in asked
        ),
        Row(
            what=f"first start, {SIZES[-1]:,} rows in parquet files",
            against="the same of as many files in a folder",
            goal="1",
            make=parquet_sides,
        ),
    ]


def sides(make, resumed) -> Sides:
    paths = [make(size) for size in SIZES]
    mine = curve(ours(), paths, resumed)
    theirs = curve(before(), paths, resumed)
    slope = {name: per_file(found) for name, found in (("ours", mine), ("before", theirs))}

    def check(one, other):
        assert one["count"] == other["count"] == SIZES[-1]

    facts = {"starts": {"curve": mine, "before": theirs, "per_file_us": slope, "path_bytes": path_bytes(ours())}}
    run = [lambda build=build: build().start(paths[-1], resumed) for build in (ours, before)]
    return Sides(ours=run[0], peer=run[1], check=check, facts=lambda _: facts)


def parquet_sides() -> Sides:
    paths, other = [parquets(size) for size in SIZES], folder(SIZES[-1])
    mine = curve(ours(), paths, False)
    facts = {"starts": {"curve": mine, "per_file_us": {"ours": per_file(mine)}, "path_bytes": path_bytes(ours())}}
    return Sides(
        ours=lambda: ours().start(paths[-1], False), peer=lambda: ours().start(other, False), facts=lambda _: facts
    )


def curve(build, paths, resumed) -> list:
    """What a start takes of each size: CPU seconds, bytes that memory grows by at most."""
    out = []
    for path in paths:
        if resumed:
            build.start(path, False)  # which leaves the list
        out.append(build.start(path, resumed))
    return out


def per_file(found) -> dict:
    """Of the part above the smallest size."""
    small, large = found[0], found[-1]
    count = large["count"] - small["count"]
    return {
        "cpu_us": 1e6 * (large["cpu_s"] - small["cpu_s"]) / count,
        "bytes": (large["grown"] - small["grown"]) / count,
    }


def path_bytes(build) -> float:
    """Of the list that was made last."""
    text = (build.run / "files.txt").read_bytes().splitlines()
    return sum(len(line.partition(b"\t")[2]) for line in text) / len(text)


@cache
def few():
    """Names of a few small images."""
    from PIL import Image
    from stream import photograph

    folder = place() / "few"
    folder.mkdir()
    for number in range(50):  # a file has 65,000 links at most
        Image.fromarray(photograph((60, 80))).save(folder / f"{number}.jpg")
    return sorted(folder.iterdir())


@cache
def folder(size):
    out, sources = place() / f"folder-{size}", few()
    for number in range(size):
        within = out / f"{number // AT_ONCE:04d}"
        if not number % AT_ONCE:
            within.mkdir(parents=True)
        os.link(sources[number % len(sources)], f"{within}/image-{number:07d}.jpg")
    return out


@cache
def archives(size):
    out, info = place() / f"archives-{size}", tarfile.TarInfo()
    out.mkdir()
    info.size = 16
    for first in range(0, size, AT_ONCE):
        with (out / f"{first // AT_ONCE:04d}.tar").open("wb") as file:
            for number in range(first, min(size, first + AT_ONCE)):
                info.name = f"image-{number:07d}.jpg"
                file.write(info.tobuf(tarfile.GNU_FORMAT) + b"x" * 16 + bytes(496))
            file.write(bytes(10240))
    return out


@cache
def parquets(size):
    import pyarrow as pa
    import pyarrow.parquet as pq

    out, per = place() / f"parquet-{size}", 100_000
    out.mkdir()
    for first in range(0, size, per):
        count = min(per, size - first)
        images = pa.array([{"bytes": b"x" * 16, "path": None}] * count)
        pq.write_table(pa.table({"image": images}), out / f"{first // per:04d}.parquet", row_group_size=100)
    return out

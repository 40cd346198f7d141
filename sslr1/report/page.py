"""report.html: what a run has learnt so far, on one page that needs no network and no server.

python -m sslr1.report RUNFOLDER [--out FILE]

It is made from config.yaml, metrics.jsonl, samples.jsonl, samples/, found.txt and bad_images.txt alone, so a run folder
can be copied anywhere first. The page is template/report.html, filled in by Jinja; charts and samples are JSON in it,
drawn by template/report.js. However long a run was, the page stays under 5 MB: series are means over stretches, samples
a bounded choice spread over the steps.
"""

import base64
import hashlib
import json
import re
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import yaml

from sslr1.errors import UserError
from sslr1.report import charts
from sslr1.runs.records import JsonLines, held_out
from sslr1.sums import plain_sum

SAMPLES = 240  # puzzles at most …
SAMPLE_BYTES = 3_500_000  # … with their pictures
TEXT = 4000  # characters of a completion that are shown, half of them its beginning and half its end
BAD = 5  # images that are named
TEMPLATE = Path(__file__).parent / "template"


def write(folder, out=None) -> Path:
    """Write a run folder's report, beside and renamed. Returns its path. Raises UserError if `folder` is no run's."""
    out = Path(out or Path(folder) / "report.html")
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text(page(folder), encoding="utf-8")
    partial.replace(out)
    return out


def page(folder) -> str:
    """The report as HTML. Raises UserError if `folder` is no run's."""
    folder = Path(folder)
    try:
        settings = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{str(folder)!r} is no run folder: its config.yaml can't be read ({error.strerror})") from None
    try:
        config = yaml.safe_load(settings)
        mixture = [name for name, part in config["puzzles"]["mixture"].items() if part > 0]
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError):
        raise UserError(
            f"{folder / 'config.yaml'}: empty, or not the configuration that a run was started with"
        ) from None
    records = JsonLines(folder / "metrics.jsonl").read()
    script = (TEMPLATE / "report.js").read_text(encoding="utf-8")
    return template("report.html").render(
        config=config,
        settings=settings,
        summary=summary(records, config),
        held_out=held_out(records, config["puzzles"]["mixture"], config["puzzles"]["levels"]),
        images=images(folder),
        events=charts.events(records),
        written=f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC",
        style=(TEMPLATE / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data={"sections": charts.sections(records, mixture), "samples": samples(folder)},
    )


@lru_cache
def template(name):
    """A page of the template folder, in which values are words, never HTML."""
    import jinja2

    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True}
    return jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATE), **options).get_template(name)


def summary(records, config) -> list:
    """(what, number, remark) for the top of the page."""
    rows = [r for r in records if "reward" in r]
    done = rows[-1]["step"] if rows else 0
    out = [("steps", f"{done:,} of {config['train']['steps']:,}", "")]
    if rows:
        part = max(1, len(rows) // 10)
        before, after = (plain_sum(r["reward"] for r in some) / part for some in (rows[:part], rows[-part:]))
        seconds = sorted(r["timing_s/step"] for r in rows)
        tokens = plain_sum(r["perf/tokens_per_second"] * r["timing_s/step"] for r in rows)
        hours, minutes = divmod(round(plain_sum(seconds) / 60), 60)
        lasted = f"{hours} h {minutes} min" if hours else f"{minutes} min"
        out += [
            ("mean reward", f"{before:.3f} → {after:.3f}", f"first and last {part} steps"),
            ("time a step", f"{seconds[len(seconds) // 2]:.3g} s", f"median; {lasted} in all"),
            ("completion tokens", f"{tokens / plain_sum(seconds):,.0f} / s", f"{tokens:,.0f} in all"),
        ]
    return out


def images(folder) -> dict | None:
    """What was not read of the run's images, in words, and how many were bad, with some of their names and reasons;
    None where there is nothing to say."""
    found, bad = (Path(folder) / name for name in ("found.txt", "bad_images.txt"))
    about = found.read_text(encoding="utf-8").strip() if found.exists() else ""
    listed = bad.read_bytes().decode("utf-8", "replace").split("\n") if bad.exists() else []
    rows = [line.rpartition("\t")[::2] for line in listed if line]
    rows = [(name, reason) for name, reason in rows if not reason.startswith("refused: ")]  # of which `about` speaks
    return {"about": about, "bad": len(rows), "examples": rows[:BAD]} if about or rows else None


def samples(folder) -> list:
    """Records of samples.jsonl with their pictures, in order: as many of each puzzle, spread evenly over the steps,
    SAMPLES in all at most, and fewer if they would take more than SAMPLE_BYTES. Only lines that are chosen are
    parsed."""
    lines = {}  # of each puzzle: where its lines begin
    path = Path(folder) / "samples.jsonl"
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = 0
        for line in file:
            named = re.match(rb'{"step": \d+, "puzzle": "(\w+)"', line)
            if named and line.endswith(b"\n"):
                lines.setdefault(named[1], []).append(start)
            start += len(line)
        share = SAMPLES // max(1, len(lines))
        while share:
            chosen = sorted(place for places in lines.values() for place in _spread(places, share))
            out = [_sample(file, place, Path(folder)) for place in chosen]
            size = len(json.dumps(out))
            if size <= SAMPLE_BYTES:
                return out
            share = min(share - 1, int(share * SAMPLE_BYTES / size))
    return []


def _spread(places, count):
    """`count` of them, evenly, the first and the last among them."""
    if len(places) <= count:
        return places
    return [places[round(i * (len(places) - 1) / max(1, count - 1))] for i in range(count)]


def _sample(file, place, folder):
    """A line of samples.jsonl as the page shows it."""
    file.seek(place)
    record = json.loads(file.readline())
    picture = folder / record["picture"]
    value = record["answer"]["value"]
    out = {key: record[key] for key in ("step", "puzzle", "level", "slot", "question", "sizes")}
    out["answer"] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    out["picture"] = None
    if picture.exists():
        out["picture"] = f"data:image/webp;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    out["completions"] = [{**c, "text": _shortened(c["text"]), "outcome": outcome(c)} for c in record["completions"]]
    return out


def _shortened(text):
    left = len(text) - TEXT
    return text if left <= 0 else f"{text[: TEXT // 2]}\n[… {left:,} characters …]\n{text[-TEXT // 2 :]}"


def outcome(completion) -> str:
    """One word for what a completion came to."""
    if completion["finish"] == "length" and not completion["reward"]:
        return "cut off"
    if not completion["format"]:
        return "no format"
    if completion["exact"]:
        return "exact"
    return "partly" if completion["accuracy"] else "wrong"

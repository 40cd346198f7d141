"""report.html: what a run has learnt so far, on one page that needs no network and no server.

python -m sslr1.report RUNFOLDER [--out FILE]

It is made from config.yaml, metrics.jsonl, samples.jsonl, samples/, found.txt and bad_images.txt alone, so a run folder
can be copied anywhere first. The page is template/report.html, filled in by Jinja; charts and samples are JSON in it,
drawn by scripts. However long a run was, the page stays under 5 MB: series are means over stretches, samples a bounded
choice spread over the steps.
"""

import time
from datetime import UTC, datetime
from pathlib import Path

import yaml

from sslr1.config import levels, shares
from sslr1.errors import UserError
from sslr1.report import charts, mends
from sslr1.report.layout import render
from sslr1.report.samples import samples
from sslr1.runs.records import JsonLines, first_called, held_out
from sslr1.sums import plain_sum

BAD = 100  # images that are named
REFRESH_S, STALE_S = 10, 3600  # a page of a run that goes on looks again so often at most, and until it is so old


def write(folder, out=None, going=False) -> Path:
    """Write a run folder's report, beside and renamed. Returns its path. going: the run goes on, so that the page loads
    itself again. Raises UserError if `folder` is no run's."""
    return replace(out or Path(folder) / "report.html", page(folder, going))


def replace(path, text) -> Path:
    """Write a page beside and rename it: who looks meanwhile sees a whole one."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def read(folder) -> tuple[dict, str, list]:
    """(config.yaml, its text, metrics.jsonl's records) of a run folder. Raises UserError if it is none."""
    folder = Path(folder)
    try:
        settings = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{str(folder)!r} is no run folder: its config.yaml can't be read ({error.strerror})") from None
    try:
        config = yaml.safe_load(settings)
        for key in ("mixture", "levels", "curriculum"):
            config["puzzles"][key]
        config["puzzles"]["mixture"].items()
        config["train"]["warmup"]["steps"]
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError):
        raise UserError(
            f"{folder / 'config.yaml'}: empty, or not the configuration that a run was started with"
        ) from None
    return config, settings, JsonLines(folder / "metrics.jsonl").read()


def page(folder, going=False) -> str:
    """The report as HTML. Raises UserError if `folder` is no run's."""
    config, settings, records = read(folder)
    shown, hardest = samples(folder)
    events = mends.events(records)
    data = {"sections": charts.sections(records, config), "samples": shown, "hardest": hardest}
    if going:
        every_s = max(REFRESH_S, config["log"]["report_every_s"])
        data["refresh"] = {"every_s": every_s, "written_s": round(time.time()), "stale_s": STALE_S}
    return render(
        "report.html",
        ("charts", "samples"),
        config=config,
        settings=settings,
        summary=summary(records, config),
        held_out=held_out(records, shares(config), levels(config)),
        first_called=first_called(config["train"]["warmup"]["steps"]),
        images=images(folder),
        events=events,
        mends=mends.mends(events, config),
        written=f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC",
        going=going,
        data=data,
    )


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
            (
                "mean reward",
                f"{before:.3f} → {after:.3f}",
                "first and last step" if part == 1 else f"first and last {part} steps",
            ),
            ("time a step", f"{seconds[len(seconds) // 2]:.3g} s", f"median; {lasted} in all"),
            ("completion tokens", f"{tokens / plain_sum(seconds):,.0f} / s", f"{tokens:,.0f} in all"),
        ]
    return out


def images(folder) -> dict | None:
    """What was not read of the run's images, in words; how many were bad, by reason, and the names and reasons of
    some; None where there is nothing to say."""
    found, bad = (Path(folder) / name for name in ("found.txt", "bad_images.txt"))
    about = found.read_text(encoding="utf-8").strip() if found.exists() else ""
    listed = bad.read_bytes().decode("utf-8", "replace").split("\n") if bad.exists() else []
    rows = [line.rpartition("\t")[::2] for line in listed if line]
    rows = [(name, reason) for name, reason in rows if not reason.startswith("refused: ")]  # of which `about` speaks
    reasons = {}
    for _, reason in rows:
        kind = "too small" if "data.min_side" in reason else reason.partition(":")[0]
        reasons[kind] = reasons.get(kind, 0) + 1
    reasons = sorted(reasons.items(), key=lambda item: -item[1])
    return {"about": about, "bad": len(rows), "reasons": reasons, "examples": rows[:BAD]} if about or rows else None

"""What of samples.jsonl and samples/ a page shows: a choice that is spread over the steps, and what was hardest."""

import base64
import json
import re
from pathlib import Path

from sslr1.sums import plain_sum

SAMPLES = 240  # puzzles at most …
SAMPLE_BYTES = 3_500_000  # … with their pictures, the hardest ones too
HARDEST = 24  # puzzles at most, of the newest LOOKED_AT of each kind in the later half of the steps
LOOKED_AT = 2000
TEXT = 4000  # characters of a completion that are shown, half of them its beginning and half its end


def samples(folder) -> tuple[list, list]:
    """(records of samples.jsonl with their pictures, in order, as many of each puzzle, spread evenly over the steps,
    SAMPLES in all at most; the HARDEST). Fewer if they would take more than SAMPLE_BYTES. Only lines that are chosen
    are parsed."""
    lines = {}  # of each puzzle: where its lines begin, and their steps
    folder = Path(folder)
    path = folder / "samples.jsonl"
    if not path.exists():
        return [], []
    with path.open("rb") as file:
        start = 0
        for line in file:
            named = re.match(rb'{"step": (\d+), "puzzle": "(\w+)"', line)
            if named and line.endswith(b"\n"):
                lines.setdefault(named[2], []).append((start, int(named[1])))
            start += len(line)
        chosen = sorted(place for own in lines.values() for place in _hardest(file, own, HARDEST // len(lines)))
        hardest = [_sample(file, place, folder) for place in chosen]
        while hardest and len(json.dumps(hardest)) > SAMPLE_BYTES / 4:
            del hardest[-1]
        room = SAMPLE_BYTES - len(json.dumps(hardest))
        share = SAMPLES // max(1, len(lines))
        while share:
            chosen = sorted(place for own in lines.values() for place, _ in _spread(own, share))
            out = [_sample(file, place, folder) for place in chosen]
            size = len(json.dumps(out))
            if size <= room:
                return out, sorted(hardest, key=lambda one: (one["right"], one["step"]))
            share = min(share - 1, int(share * room / size))
    return [], hardest


def _spread(places, count):
    """`count` of them, evenly, the first and the last among them."""
    if len(places) <= count:
        return places
    return [places[round(i * (len(places) - 1) / max(1, count - 1))] for i in range(count)]


def _hardest(file, own, count) -> list:
    """Where the `count` lines begin whose group was worst: fewest right places, then lowest reward, then newest. Before
    half of the run's steps a puzzle may be unsolved because nothing was learnt yet, so they don't count. own: a
    puzzle's (place, step)s."""
    last, rated = own[-1][1], []
    for place, step in own[-LOOKED_AT:]:
        if 2 * step >= last:
            file.seek(place)
            line = file.readline()  # within a completion's text quotation marks are escaped, so these are our keys
            right, reward = (_total(rb'"%s": ([-\d.e]+)' % key, line) for key in (b"accuracy", b"reward"))
            rated.append((right, reward, -step, place))
    return [place for *_, place in sorted(rated)[:count]]


def _total(pattern, line):
    return plain_sum(map(float, re.findall(pattern, line)))


def _sample(file, place, folder):
    """A line of samples.jsonl as the page shows it. right: mean share of right places of its completions."""
    file.seek(place)
    record = json.loads(file.readline())
    picture = folder / record["picture"]
    value = record["answer"]["value"]
    out = {key: record[key] for key in ("step", "puzzle", "level", "slot", "question", "sizes")}
    out["answer"] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    out["picture"] = None
    if picture.exists():
        out["picture"] = data_uri(picture.read_bytes())
    completions = record["completions"]
    out["right"] = plain_sum(c["accuracy"] for c in completions) / max(1, len(completions))
    out["completions"] = [{**c, "text": _shortened(c["text"]), "outcome": outcome(c)} for c in completions]
    return out


def data_uri(webp: bytes) -> str:
    """A WebP picture as it stands in a page."""
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


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

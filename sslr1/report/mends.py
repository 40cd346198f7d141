"""What a run's events are, and what to do about those that are alarms, by the run's own settings."""

from sslr1.runs.alarms import MESSAGES, advice

SECTIONS = {  # of docs/troubleshooting.md, which say more
    "entropy": "Entropy collapses or explodes",
    "lost": "Entropy collapses or explodes",
    "format": "The format is never right",
    "reward": "Only the format is learnt",
    "plateau": "Only the format is learnt",
    "gradient": "Gradients that are not finite",
}
SKIPPED = (
    "the update was skipped; ten in a row end the run, with the last checkpoint whole. Lower optim.lr, raise "
    "optim.warmup_steps, set optim.clip_norm=1 or model.dtype=float32, or go back to an earlier checkpoint"
)


def events(records) -> list:
    """What a reader should know of, in order: dicts of "step", "words", "about" (a puzzle, or a kind of alarm of the
    whole run), "alarm" and "mend" (a key of SECTIONS, None where nothing is to be mended); alarms, levels that moved,
    updates that were skipped."""
    out, before = [], {}

    def note(words, about, mend=None):
        out.append({"step": record["step"], "words": words, "about": about, "alarm": mend is not None, "mend": mend})

    for record in records:
        for key in (k for k in record if k.startswith(("curriculum/", "alarm/")) or k == "skipped_steps"):
            value, (kind, *name) = record[key], key.split("/")
            if kind == "alarm":
                note(MESSAGES[name[0]], name[0], name[0])
            elif name[1:] == ["plateau"]:
                note(f"{name[0]} earns what guessing earns", name[0], "plateau")
            elif name[1:] == ["level"] and before.get(key, value) != value:
                note(f"{name[0]} moves from level {before[key]} to level {value}", name[0])
            elif key == "skipped_steps" and value > before.get(key, 0):
                note("update skipped: its gradient was not finite", "gradient", "gradient")
        before |= record
    return out


def mends(events, settings) -> list:
    """What to do about these events in a run of these settings, each kind once: dicts of "kind", "title", "words"."""
    out = []
    for kind in dict.fromkeys(event["mend"] for event in events if event["mend"]):
        puzzles = {event["about"] for event in events if event["mend"] == kind == "plateau"}
        words = SKIPPED if kind == "gradient" else advice(kind, settings, *(puzzles if len(puzzles) == 1 else ()))
        out.append({"kind": kind, "title": SECTIONS[kind], "words": f"{words[0].upper()}{words[1:]}."})
    return out

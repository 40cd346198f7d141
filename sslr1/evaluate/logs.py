"""What an evaluation writes, a line an answer, and what it reads of another model's."""

import json
from itertools import zip_longest
from pathlib import Path

import torch

from sslr1 import distributed
from sslr1.errors import UserError


def gather(records) -> list:
    """All ranks' records in turn: the first of each, the second of each, and so on. All ranks must call it."""
    data = torch.frombuffer(bytearray(json.dumps(records).encode()), dtype=torch.uint8)
    ranks = [json.loads(part.numpy().tobytes()) for part in distributed.all_gather_rows(data[:, None])]
    return [record for turn in zip_longest(*ranks) for record in turn if record is not None]


def read_log(path, keys) -> list:
    """Records of a per-sample log that an earlier evaluation wrote, each with these keys. Raises UserError."""
    try:
        records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--baseline {path} can't be read as JSON lines: {error}") from None
    for number, r in enumerate(records, 1):
        for key in keys:
            if not isinstance(r, dict) or key not in r:
                raise UserError(f"--baseline {path}, line {number}: no {key!r}; it must be a log that --out wrote")
    return records


def baseline_of(path, asked, forms) -> list:
    """Records of another model's log of the same questions. Raises UserError where they are others."""
    records = read_log(path, ("index", "rotation", "form", "answer", "score", "chance"))
    for form in forms:
        theirs = {(r["index"], r["rotation"]): r["answer"] for r in records if r["form"] == form}
        for row in asked:
            answer = theirs.pop((row.index, row.rotation), None)
            if answer != row.answer:
                what = f"the answer {answer!r}" if answer else "nothing"
                raise UserError(
                    f"--baseline {path} has {what} in the {form} form for index {row.index!r}, rotation "
                    f"{row.rotation}, where {row.answer!r} is right: it must be a log of the same questions"
                )
        if theirs:
            raise UserError(
                f"--baseline {path} has {len(theirs)} questions more in the {form} form: it must have the same"
            )
    return records


def write(out, numbers, records) -> None:
    """`out` as JSON, and the log beside it as JSON lines."""
    out = Path(out)
    out.with_suffix(".jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    out.write_text(json.dumps(numbers, indent=2, ensure_ascii=False) + "\n", "utf-8")

r"""What models write in the box, and as an answer to a benchmark, in two tables: RIGHT and WRONG. Each is {what is
asked: texts}.

B: a choice among A to D. 270: degrees, asked clockwise. 90 left: degrees, asked counter-clockwise. 231, 2143 and 9:
tiles of a strip, of two rows and of three. prose B and prose yes: whole answers to a benchmark's question, its options
OPTIONS (or yes and no).

They are read from spellings.json, whose later ones were written when the parser was there, to see what it makes of
spellings that it was not made from.
"""

import json
from pathlib import Path

OPTIONS = ("a red car", "a blue car", "Vitamin D", "a dog")
TABLES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
RIGHT, WRONG = (
    {asked: texts + TABLES[f"later {table}"].get(asked, []) for asked, texts in TABLES[table].items()}
    for table in ("right", "wrong")
)

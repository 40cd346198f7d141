"""Fill in what these pages take from the code, between `<!-- begin: NAME -->` and `<!-- end -->`: `make docs`.

`python docs/make.py --check` writes nothing and leaves with 1 if a page is stale; `--pictures` also draws pictures/
anew. No model is needed.
"""

import argparse
import html
import re
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import glossary

from sslr1 import config, preview, puzzles
from sslr1.config.inputs import Data
from sslr1.config.kinds import ImageSource, Section
from sslr1.data import ImageStore, images, stream, walk
from sslr1.data.decode import NEAR
from sslr1.evaluate import probes
from sslr1.puzzles import batch, curriculum, prompts, reward

HERE = Path(__file__).parent
PLAIN = r"\boxed{{{}}}"
THOUGHT = r"<think>Look.</think>\boxed{{{}}}"


def table(head, rows) -> str:
    """A Markdown table; bars in cells are escaped."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells])


# --- configuration ----------------------------------------------------------------------------------------------------


def kind(annotation) -> str:
    """A field's type in words that YAML's users know."""
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join("null" if part is type(None) else kind(part) for part in get_args(annotation))
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    names[ImageSource] = "{path, weight, column}"
    if annotation in names:
        return names[annotation]
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return kind(inner[0])
    if get_origin(annotation) is dict:
        return f"{{puzzle: {kind(inner[1])}}}"
    if get_origin(annotation) is list and Union in map(get_origin, inner):
        return "list of these"
    if get_origin(annotation) in (tuple, list):
        return f"list of {len(inner)} {kind(inner[0])}s" if inner[-1] is not Ellipsis else f"list of {kind(inner[0])}s"
    raise TypeError(f"{annotation}: say in docs/make.py how this type is called")


def bounds(field) -> str:
    """What a field's checks allow, "" for all."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return ", ".join(f"{signs[key]} {getattr(m, key)}" for m in field.metadata for key in signs if hasattr(m, key))


def default(field) -> str:
    if field.is_required() or (field.default is None and field.annotation is str):
        return "**required**"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return "null" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def configuration() -> str:
    """Every section and key of the configuration."""
    parts = []

    def section(owner, path):
        rows, inner = [], []
        for name, field in owner.model_fields.items():
            key = f"{path}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                inner.append((field.annotation, key))
                continue
            free = key in config.IMMATERIAL or path in config.IMMATERIAL
            rows.append(
                (
                    f'<a id="{key}"></a>`{key}`',
                    kind(field.annotation),
                    default(field),
                    bounds(field),
                    "yes" if free else "",
                    html.escape(field.description, quote=False),
                )
            )
        parts.append(f"## {path}\n\n{table(('key', 'type', 'default', 'range', 'free', 'what'), rows)}")
        for one in inner:
            section(*one)

    for name, field in config.Config.model_fields.items():
        if get_origin(field.annotation) is dict:
            section(get_args(field.annotation)[1], f"{name}.NAME")
        else:
            section(field.annotation, name)
    return "\n\n".join(parts)


# --- metrics ----------------------------------------------------------------------------------------------------------


def metrics() -> str:
    """The glossary."""
    parts = []
    for heading, entries in glossary.GLOSSARY.items():
        rows = [(f"`{name}`", m.unit, m.meaning, m.reading, f"`sslr1.{m.source}`") for name, m in entries.items()]
        parts.append(f"## {heading}\n\n{table(('name', 'unit or range', 'what', 'good and bad', 'made by'), rows)}")
    return "\n\n".join(parts)


# --- puzzles ----------------------------------------------------------------------------------------------------------


def share(p) -> str:
    return f"{100 * p:.1f} %" if p >= 0.001 else f"1 in {round(1 / p):,}"


@lru_cache
def scenes() -> list:
    import torch

    from sslr1.data.scenes import scene

    return [torch.from_numpy(scene(i)) for i in range(16)]


def answers_of(name) -> dict:
    """{level: {what is possible: Answer}}: an answer of each kind that a puzzle's level has, from drawn puzzles."""
    found = {}
    for level in puzzles.LEVELS[name]:
        made = puzzles.make(scenes(), name, level=level, wordings=1, thinking=False)
        found[level] = {
            (len(a.value) if a.kind == "sequence" else 0, 1 / c): a for a, c in zip(made.answers, made.chance)
        }
    return found


def levels(name) -> str:
    """A puzzle's levels: answers, chance, what guessing earns, and between which accuracies the curriculum keeps it."""
    rows = []
    for level, kinds in answers_of(name).items():
        for (K, count), answer in sorted(kinds.items()):
            possible = f"{K}! = {round(count):,} orders" if K else ", ".join(map(str, answer.choices))
            chance = 1 / count
            base, what = (1 / K, " of the places") if K >= 4 else (chance, "")
            keep = [base + mean * (1 - base) for mean in (curriculum.FALL, curriculum.RISE)]
            rows.append(
                (
                    f"**{level}**" if level == puzzles.START_LEVEL[name] else level,
                    puzzles.describe(name, level),
                    possible,
                    share(chance),
                    *(f"{curriculum.chance_reward(answer, rule):.3f}" for rule in reward.RULES),
                    f"{100 * keep[0]:.1f} to {100 * keep[1]:.1f} %{what}",
                )
            )
    head = (
        "level",
        "what",
        "answers",
        "chance",
        *(f"guessing earns, `{rule}`" for rule in reward.RULES),
        "kept between",
    )
    return table(head, rows)


def questions(name) -> str:
    """A puzzle's plainest question in both forms, and its other wordings."""
    level, parts = puzzles.START_LEVEL[name], []
    for thinking in (True, False):
        made = puzzles.make(scenes()[:1], name, level=level, wordings=1, thinking=thinking, pool=scenes())
        parts.append(f"{'With' if thinking else 'Without'} `puzzles.thinking`:\n\n```\n{made.questions[0]}\n```")
    kinds = dict.fromkeys(batch.QUESTIONS[name].values())
    for templates in kinds:
        used = [str(k) for k, own in batch.QUESTIONS[name].items() if own is templates]
        title = "Every wording" + (f" of level {', '.join(used)}" if len(kinds) > 1 else "")
        lines = "\n".join("- `" + text.replace("\n", " ↵ ") + "`" for text in templates)
        parts.append(f"<details><summary>{title}</summary>\n\n{lines}\n\n</details>")
    return "\n\n".join(parts)


def probed(name) -> str:
    """A puzzle's blind solvers and the levels at which their bounds are stated."""
    own = probes.PROBES.get(name, {})
    shown = [f"{probe} ({', '.join(map(str, at)) if at else 'only reported'})" for probe, (_, at) in own.items()]
    return "Blind solvers, and at which levels they are held to chance + 5 points: " + "; ".join(shown) + "."


def endings() -> str:
    rows = [(f"`{a}`", f"`{b}`") for a, b in zip(prompts.THINKING, prompts.DIRECT)]
    return table(("with puzzles.thinking", "without"), rows)


def presets() -> str:
    rows = [
        (
            name,
            puzzles.MIXTURE[name],
            puzzles.START_LEVEL[name],
            puzzles.PAPER_MIXTURE.get(name, 0),
            puzzles.PAPER_LEVEL[name],
        )
        for name in puzzles.NAMES
    ]
    return table(("puzzle", "share, default", "level", "share, paper", "level"), rows)


def rewards() -> str:
    """Worked examples: what completions earn under each rule."""
    angle = puzzles.Answer("number", 90, (0, 90, 180, 270))
    tiles = puzzles.Answer("sequence", range(1, 10))
    four = puzzles.Answer("sequence", range(1, 5))
    strip = puzzles.Answer("sequence", range(1, 4))
    letter = puzzles.Answer("choice", "B", tuple("ABCD"))
    examples = (
        ("rotation, 90", angle, PLAIN.format(90)),
        ("rotation, 90", angle, PLAIN.format("-270°")),
        ("rotation, 90", angle, PLAIN.format(180)),
        ("rotation, 90", angle, "It is 90."),
        ("rotation, 90", angle, f"{PLAIN.format(90)} or {PLAIN.format(180)}"),
        ("a choice, B", letter, PLAIN.format("(b)")),
        ("3×3 ordering, 1…9", tiles, PLAIN.format("1,2,3,4,5,6,7,8,9")),
        ("3×3 ordering, 1…9", tiles, PLAIN.format("2,1,3,4,5,6,7,8,9")),
        ("3×3 ordering, 1…9", tiles, PLAIN.format("1 2 3 5 6 4 8 9 7")),
        ("3×3 ordering, 1…9", tiles, PLAIN.format("2,3,4,5,6,7,8,9,1")),
        ("3×3 ordering, 1…9", tiles, PLAIN.format("1,1,1,1,1,1,1,1,1")),
        ("2×2 ordering, 1…4", four, PLAIN.format("1,2,4,3")),
        ("1×3 ordering, 1…3", strip, PLAIN.format("1,3,2")),
    )
    rows = []
    for what, answer, text in examples:
        scores = {rule: puzzles.score(answer, text, rule, thinking=False) for rule in reward.RULES}
        one = scores["default"]
        rows.append(
            (
                what,
                f"`{text}`",
                "yes" if one.format_ok else "no",
                f"{one.accuracy:.3f}",
                *(f"{s.reward:.3f}" for s in scores.values()),
            )
        )
    return table(("answer", "completion", "format", "accuracy", *(f"`{rule}`" for rule in reward.RULES)), rows)


def answers() -> str:
    """What counts as which answer; each example is scored here."""
    kinds = (
        ("a letter, here B", puzzles.Answer("choice", "B", tuple("ABCD")), LETTERS),
        ("degrees, here 270, asked clockwise", puzzles.Answer("number", 270, (0, 90, 180, 270), "clockwise"), ANGLES),
        ("a list, here 2,1,4,3", puzzles.Answer("sequence", (2, 1, 4, 3)), LISTS),
    )
    rows = []
    for what, answer, groups in kinds:
        for how, right, wrong in groups:
            for text, due in [(t, 1.0) for t in right] + [(t, 0.0) for t in wrong]:
                assert puzzles.score(answer, PLAIN.format(text), thinking=False).exact == due, text
            cells = (", ".join(f"`{text}`" for text in texts).replace("\n", "⏎") for texts in (right, wrong))
            rows.append((what, how, *cells))
            what = ""
    return table(("answer", "spelling", "right", "wrong"), rows)


LETTERS = (
    (
        "alone",
        ("B", "(b)", "B.", "**B**", r"\textbf{(B)}", r"$\mathrm{B}$", "Ｂ", "「B」"),
        ("B?", "BB", "~~B~~", r"\cancel{B}"),
    ),
    (
        "after words that say so",
        ("Option B", "The answer is (B).", "选项B", "答案：B"),
        ("not B", "Option B or C", "不是B"),
    ),
    (
        "before a sign and the option's words",
        ("B. the roof", "B) a tree", "B: upper left", "B (the tree)"),
        ("B. or C", "B (not C)"),
    ),
    ("before a verdict", ("B is correct", "B is the answer"), ("B is wrong", "B and C", "B, C", "B/C")),
)
ANGLES = (
    (
        "an integer, in whole turns more or less",
        ("270", "270.0", "-90", "−90", "630", "２７０", r"\theta = 270"),
        ("270.5", "27⁰", "270²", "270 90"),
    ),
    (
        "degrees",
        ("270°", "270º", r"270^\circ", r"270^{\text{o}}", "270 deg.", "270 degrees", "270度"),
        ("270%", "270 rad", "270°C", "270'"),
    ),
    (
        "a direction",
        ("270° clockwise", "90° CCW", "90 degrees to the left", "逆时针90度"),
        ("270° CCW", "90° clockwise", "-90° CCW"),
    ),
    (
        "after words that say so",
        ("Angle: 270°", "rotated by 270 degrees"),
        ("not 270", "90 or 270", "between 90 and 270"),
    ),
)
LISTS = (
    (
        "between commas, spaces, arrows, dashes, “and”",
        ("2, 1, 4, 3", "2 1 4 3", "2、1、4、3", "2 → 1 → 4 → 3", "2-1-4-3", "2, 1, 4 and 3"),
        ("2143", "2,,1,4,3", "2;1;4;3", "2<1<4<3"),
    ),
    (
        "in brackets or a set",
        ("[2,1,4,3]", r"\left(2,1,4,3\right)", r"\{2,1,4,3\}"),
        ("[2,1,4,3] or [1,2,3,4]", "2,1,4,3,5", "2,1,4"),
    ),
    (
        "by rows",
        (
            "[[2,1],[4,3]]",
            r"2 & 1 \\ 4 & 3",
            r"\begin{bmatrix}2&1\\4&3\end{bmatrix}",
            "2 1; 4 3",
            "2,1\n4,3",
            "Row 1: 2, 1; Row 2: 4, 3",
        ),
        ("[[2,1,4],[3]]", "[[2,4],[1,3]]", "Row 2: 2, 1; Row 1: 4, 3"),
    ),
    (
        "with words",
        ("tile 2, tile 1, tile 4, tile 3", "Order: 2,1,4,3", "顺序：2，1，4，3"),
        ("not 2,1,4,3", "2,1,4,3 from right to left"),
    ),
)


def formats() -> str:
    """What the thinking form takes."""
    answer = puzzles.Answer("number", 90, (0, 90, 180, 270))
    texts = (
        THOUGHT.format(90),
        PLAIN.format(90),
        r"<think></think>\boxed{90}",
        r"Look.</think>\boxed{90}",
        r"<think>Reason in <think></think>, then \boxed{}.</think>\boxed{90}",
        r"<think>Is it \boxed{180}?</think>\boxed{90}",
        r"<think>It is \boxed{90}, but",
        r"<think>Look.</think>90",
    )
    rows = [
        (f"`{text}`", *(f"{puzzles.score(answer, text, thinking=form).reward:.1f}" for form in (True, False)))
        for text in texts
    ]
    return table(("completion, answer 90", "earns with puzzles.thinking", "without"), rows)


def curriculum_numbers() -> str:
    c = curriculum
    rows = [
        ("mean over", f"{c.HORIZON} steps, exponential; a puzzle stays at a level for at least as many"),
        ("rises, falls", f"mean gain above {c.RISE}, below {c.FALL}; gain = (exact - chance) / (1 - chance)"),
        (
            "neighbours",
            f"{100 * c.NEIGHBOURS:.0f} % of the samples are of the levels beside the main one, and don't count",
        ),
        ("alarm", f"mean reward within {c.PLATEAU} of what guessing earns for {c.PLATEAU_STEPS} steps"),
        ("takes effect", f"{c.LAG} steps later, so that puzzles can be prepared ahead"),
    ]
    return table(("what", "value"), rows)


def flat_groups() -> str:
    """How often a group has no gradient, by how often its puzzle is solved: p^G + (1 - p)^G, for rewards of two
    values."""
    ps = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
    rows = [(G, *(f"{100 * (p**G + (1 - p) ** G):.0f} %" for p in ps)) for G in (4, 8, 16, 32)]
    return table(("group_size", *(f"{100 * p:.0f} % solved" for p in ps)), rows)


# --- data -------------------------------------------------------------------------------------------------------------


def data_numbers() -> str:
    fields = Data.model_fields
    side = fields["max_side"].default
    rows = [
        (
            "files",
            ", ".join(f"`{suffix}`" for suffix in walk.SUFFIXES)
            + f", and `{walk.AVIF}` where Pillow reads it (11.3 and newer), any case, in folders of any depth",
        ),
        (
            "files of other packages",
            "; ".join(
                f"{', '.join(f'`{name}`' for name in walk.OPTIONAL[kind][0])} after `{walk.OPTIONAL[kind][1]}`"
                for kind in ("HEIF", "JXL")
            ),
        ),
        ("fewest images", images.FEWEST),
        ("too small", f"shorter side under `data.min_side`, {fields['min_side'].default} px"),
        ("reduced", f"longer side over {NEAR} × `data.max_side` = {round(NEAR * side)} px, to {side} px"),
        (
            "substitutes",
            f"{stream.SUBSTITUTES} for one slot; then the run ends with what was wrong with the first bad file",
        ),
        (
            "cache",
            f"`data.cache_mb`, {fields['cache_mb'].default} MiB a rank, the images used last; 640x480 takes "
            f"{(640 * 480 * 3 + puzzles.Picture.KEPT) / 2**20:.2f} MiB",
        ),
    ]
    return table(("what", "value"), rows)


def held_out() -> str:
    rows = []
    for n in (16, 100, 150, 2000, 20_000, 118_287):
        folder = images.ImageFolder("", [(str(i), 0) for i in range(n)])
        train, held = folder.hold_out(Data.model_fields["holdout"].default)
        rows.append((f"{n:,}", f"{len(held):,}", f"{len(train):,}"))
    return table(("images", "held out", "to train on"), rows)


BLOCKS = {
    "configuration": configuration,
    "metrics": metrics,
    "endings": endings,
    "presets": presets,
    "rewards": rewards,
    "answers": answers,
    "formats": formats,
    "curriculum": curriculum_numbers,
    "flat groups": flat_groups,
    "data": data_numbers,
    "held out": held_out,
    **{
        f"{name} {what.__name__}": (lambda name=name, what=what: what(name))
        for name in puzzles.NAMES
        for what in (levels, questions, probed)
    },
}


def fill(text: str) -> str:
    """A page with every block made anew. Raises KeyError for a block that nothing makes."""
    return re.sub(
        r"(<!-- begin: (.+?) -->\n).*?(<!-- end -->)",
        lambda m: f"{m[1]}{BLOCKS[m[2]]()}\n{m[3]}",
        text,
        flags=re.DOTALL,
    )


def stale() -> dict:
    """{page: what it should say} of the pages that say something else."""
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.md"))}
    return {path: new for path, old in pages.items() if (new := fill(old)) != old}


def draw():
    """pictures/<puzzle>.png from the photographs that scikit-image ships and procedural scenes."""
    from PIL import Image
    from skimage import data

    from sslr1.data.scenes import write_scenes

    (HERE / "pictures").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(folder, 14, 288)
        for name in ("astronaut", "coffee", "chelsea", "rocket"):
            Image.fromarray(getattr(data, name)()).save(Path(folder) / f"{name}.png")
        store = ImageStore.scan(folder)
        for name in puzzles.NAMES:
            rows = [
                (preview.caption(name, level), preview.examples(store, name, level, 1, seed=SEED))
                for level in (puzzles.START_LEVEL[name], puzzles.LEVELS[name][-1])
            ]
            preview.contact_sheet(rows).quantize(256).save(HERE / "pictures" / f"{name}.png", optimize=True)


SEED = 3  # of the pictures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is stale")
    parser.add_argument("--pictures", action="store_true", help="draw the puzzles' pictures anew, too")
    arguments = parser.parse_args()
    if arguments.pictures:
        draw()
    found = stale()
    for path, text in found.items():
        print(f"{path.name} {'is stale: run make docs' if arguments.check else 'written'}")
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
    sys.exit(int(arguments.check and bool(found)))


if __name__ == "__main__":
    main()

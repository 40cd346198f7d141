"""How long prompts can get, by arithmetic: before a model is loaded, and without a picture."""

from dataclasses import dataclass

from sslr1 import model, puzzles
from sslr1.errors import UserError
from sslr1.puzzles import prompts
from sslr1.puzzles.batch import QUESTIONS


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Tokens that a prompt of one kind of puzzle has at most: of its `canvases`, `pixels` together, one each
    `unit` x `unit` px; and of its words."""

    puzzle: str
    level: int
    canvases: int
    pixels: int
    unit: int
    words: int

    @property
    def visual(self) -> int:
        return self.pixels // self.unit**2

    @property
    def tokens(self) -> int:
        return self.visual + self.words

    def __str__(self):
        return (
            f"canvases: {self.canvases}, together up to {self.pixels:,} px or {self.visual:,} tokens of "
            f"{self.unit}x{self.unit} px; words: up to {self.words}"
        )


def kinds(config) -> list:
    """[(puzzle, level)] that training may come to."""
    c = config.puzzles
    adaptive = c.curriculum == "adaptive"
    return [(name, level) for name in c.mixture for level in (puzzles.LEVELS[name] if adaptive else [c.levels[name]])]


def bounds(examples, tokenizer, form, side) -> list:
    """Bounds of the kinds of puzzles in `series.check`'s examples, the longest first. form: how they are put; side: px
    of an image's longer side at most, None for any."""
    found = []
    for (name, level), made in examples.items():
        canvases = max(made.canvas_counts)
        pixels = puzzles.most_pixels(name, level, form.spec, side, form.composed, canvases)
        words = longest_words(QUESTIONS[name][level], made, tokenizer, form)
        found.append(
            Bound(puzzle=name, level=level, canvases=canvases, pixels=pixels, unit=form.spec.unit, words=words)
        )
    return sorted(found, key=lambda bound: -bound.tokens)


def longest_words(templates, made, tokenizer, form) -> int:
    """Tokens beside the pictures' of the longest wording of puzzles that are like one of those made."""
    asked = set()
    for puzzle in made:
        sheet = len(puzzle.plan.sizes) < len(puzzle.marks)

        def ask(choose, puzzle=puzzle, sheet=sheet):
            given = templates, puzzle.readings, puzzle.marks, choose, form.thinking, form.wordings
            return prompts.question(*given, sheet=sheet)[0]

        asked.update(prompts.every(ask))
    return max(len(model.question_ids(text, tokenizer, form.thinking)) - text.count("<image>") for text in asked)


def check_token_budget(config, longest) -> None:
    """Raises UserError, with the arithmetic, where a micro-batch can't hold the longest prompt (its Bound) with the
    longest completion."""
    most, budget = config.rollout.max_tokens, config.train.token_budget
    if longest.tokens + most > budget:
        raise UserError(
            f"train.token_budget is {budget}: a prompt of {longest.tokens} tokens ({longest.puzzle}, level "
            f"{longest.level}) and a completion of rollout.max_tokens={most} don't fit; set it to "
            f"{longest.tokens + most} or more, or lower puzzles.max_pixels or "
            f"data.max_side. What it can come to: {longest}"
        )

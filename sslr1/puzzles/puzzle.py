"""A puzzle as one value, from its address to its plan, its question and its answer; and a batch of them."""

from dataclasses import astuple, dataclass, field
from functools import cached_property

import torch

from sslr1.ops import transfer
from sslr1.ops.render import PatchSpec, render, render_patches
from sslr1.puzzles.plan import Plan
from sslr1.puzzles.prompts import LETTERS
from sslr1.puzzles.reward import Answer


@dataclass(frozen=True)
class Address:
    """What names a puzzle: `make([image], puzzle, level=…, seed=…, epoch=…, attempt=…, index=[index])` makes it again
    from the same image, pool and form."""

    puzzle: str
    level: int
    seed: int
    epoch: int
    attempt: int
    index: int

    def __str__(self):
        return "{}-{}/{}/{}/{}/{}".format(*astuple(self))


@dataclass(frozen=True, kw_only=True)
class Form:
    """How puzzles are put: for which model's pixels, thinking or direct, in how many wordings (None: all), composed or
    not."""

    spec: PatchSpec = field(default_factory=PatchSpec)
    thinking: bool = True
    wordings: int | None = None
    composed: bool = False


@dataclass(kw_only=True)
class Puzzle:
    """One puzzle. Its file draws it, `make` gives it its words and its address.

    plan: its canvases; readings: the ways in which it may be asked about, each (fields for the prompt's template,
    answer), the plainest first; chance: of a random valid answer; decidable: False where the puzzle's own test says
    that this image can't decide it; marks: the name of each canvas, of the atlas's CELLS; sheet: rows of canvas
    numbers, how a composed picture lays them out; others: Pictures it also shows, which stand after its own one (number
    0) in the plan; points: the marked points of each canvas, float64 [n, 2] of (y, x) as shares of it, in the order of
    their letters.

    question: `<image>` stands where each canvas goes; answer: a `reward.Answer`.
    """

    plan: Plan = field(repr=False)
    readings: list = field(repr=False)
    chance: float
    decidable: bool
    marks: list
    sheet: list
    others: list = field(default_factory=list, repr=False)
    points: list = field(default_factory=list, repr=False)
    address: Address | None = None
    form: Form | None = None
    picture: object = field(default=None, repr=False)
    question: str = ""
    answer: Answer | None = None

    @property
    def images(self) -> list:
        """What the plan's sources are, uint8 [H, W, 3]."""
        return [shown.pixels for shown in (self.picture, *self.others)]

    def render(self, backend="auto") -> list:
        """Its canvases, uint8 [H, W, 3] on the image's device."""
        return render(self.images, self.plan, backend)


def lettered(count, truth, **drawn) -> Puzzle:
    """A Puzzle that asks for one of `count` letters, of which number `truth` is right; drawn: its other fields. Unless
    they say otherwise its canvases are a reference and the candidates."""
    letters, half = tuple(LETTERS[:count]), (count + 1) // 2
    drawn.setdefault("marks", ["REF", *letters])
    drawn.setdefault("sheet", [[0], list(range(1, half + 1)), list(range(half + 1, count + 1))])
    return Puzzle(readings=[({"count": count}, Answer("choice", letters[truth], letters))], chance=1 / count, **drawn)


def lettered_rows(count, reference, candidate) -> list:
    """A reference and `count` candidates, laid out as `lettered` does."""
    half = (count + 1) // 2
    return [[reference], [candidate] * half, [candidate] * (count - half)]


class PuzzleBatch:
    """B puzzles put in one form: a list of `Puzzle`s, and their fields as lists."""

    def __init__(self, puzzles, form):
        self.puzzles, self.form = list(puzzles), form

    def __len__(self):
        return len(self.puzzles)

    def __iter__(self):
        return iter(self.puzzles)

    def __getitem__(self, i):
        return self.puzzles[i]

    thinking = property(lambda self: self.form.thinking)
    spec = property(lambda self: self.form.spec)
    names = property(lambda self: [puzzle.address.puzzle for puzzle in self])
    levels = property(lambda self: [puzzle.address.level for puzzle in self])
    questions = property(lambda self: [puzzle.question for puzzle in self])
    answers = property(lambda self: [puzzle.answer for puzzle in self])
    chance = property(lambda self: [puzzle.chance for puzzle in self])
    decidable = property(lambda self: [puzzle.decidable for puzzle in self])
    canvas_counts = property(lambda self: [len(puzzle.plan.sizes) for puzzle in self])

    @cached_property
    def images(self) -> list:
        """What the plan's sources are, uint8 [H, W, 3], each once though several puzzles show it."""
        return list({id(image): image for puzzle in self for image in puzzle.images}.values())

    @cached_property
    def plan(self) -> Plan:
        """All canvases, of `images`."""
        whole, numbers = Plan(), {id(image): number for number, image in enumerate(self.images)}
        for puzzle in self:
            whole.extend(puzzle.plan, [numbers[id(image)] for image in puzzle.images])
        return whole

    def render(self, backend="auto") -> list:
        """B lists of uint8 [H, W, 3] canvases on the images' device."""
        canvases = iter(render(self.images, self.plan, backend))
        return [[next(canvases) for _ in range(n)] for n in self.canvas_counts]

    def render_patches(self, spec=None, backend="auto", device=None):
        """(pixel_values, image_grid_thw) of all canvases in order; ValueError for a spec of another patch*merge.

        device: where they are rendered and stay, by default where the images are. On another one, each image goes there
        once, by one copy of them all, as uint8, and no larger than anything shows it: the one road of pictures to a
        GPU. What has been decoded there is there already.
        """
        spec = spec or self.spec
        if spec.unit != self.spec.unit:
            made = f"these puzzles were made for patch*merge = {self.spec.unit}"
            raise ValueError(f"{made}, the spec has {spec.unit}: pass it to make()")
        images, plan = self.images, self.plan
        if device is not None and images and images[0].device.type != torch.device(device).type:
            there = {id(shown.pixels): shown.on_device for puzzle in self for shown in (puzzle.picture, *puzzle.others)}
            images = [image if (copy := there[id(image)]) is None else copy for image in images]
            images, plan = plan.reduced(images)
            images = transfer.upload_together(images, device, "images")
        return render_patches(images, plan, spec, backend)

"""The stream of puzzles: slot after slot, each decided by its address, prepared one step ahead.

Slot q = step * batch + j is place q mod n of epoch q div n's keyed permutation of n training images, whatever the world
size; where sources have weights, of n places that Draws deals out among them. A slot whose image is bad, or can't
decide any puzzle, or whose puzzle has taught nothing (`again`), takes a substitute by key; other slots don't move.

A slot of a task (`sslr1.data.tasks`) shows a question of the user's own: the i-th slot of a task that there has been, i
mod n of epoch i div n's keyed permutation of its n training rows.
"""

from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from sslr1 import model, puzzles
from sslr1.data.draws import Draws
from sslr1.data.store import Pool
from sslr1.data.tasks import LEVEL
from sslr1.errors import UserError
from sslr1.ops import keys

# Images tried for one slot before the folder is taken to be unusable: while no slot has found a usable one, and after
# that. In a long run some slot meets 50 in a row that can't decide its puzzle even where a fifth of the images can.
SUBSTITUTES, PATIENCE = 50, 1000
CHUNK = 64  # held-out puzzles that are held, and answered, at once


@dataclass
class StreamBatch:
    """A rank's share of a step: its puzzles, their prompts (ids are slots j in the step), the images they came from,
    and the slots themselves, which remember how often they have drawn."""

    step: int
    puzzles: puzzles.PuzzleBatch
    prompts: list
    images: list
    slots: list

    def images_asked(self) -> tuple[int, int]:
        """(images that its slots have asked for so far, of which bad), again() included."""
        return sum(slot.attempt + 1 for slot in self.slots), sum(slot.bad for slot in self.slots)


class PuzzleStream:
    """store: ImageStore; numbers: images to train on; mixture: {puzzle or task: share}; levels: (step, slot, puzzle) ->
    level, asked in the background while the step before trains; batch: puzzles a step over all ranks, of which this
    rank takes every `world_size`-th; device: where they are rendered, and their patches stay; sources: as Draws has
    them; tasks: {name: Task}."""

    def __init__(
        self,
        store,
        numbers,
        tokenizer,
        *,
        mixture,
        levels,
        batch,
        seed,
        form,
        device=None,
        rank=0,
        world_size=1,
        sources=(),
        tasks=None,
    ):
        self.store, self.numbers, self.tokenizer = store, numbers, tokenizer
        self.mixture = {name: share for name, share in mixture.items() if share > 0}
        self.tasks = tasks or {}
        self._before = {name: [0] for name in self.tasks}  # of each step, how many slots of each come before it
        self.levels, self.batch, self.seed = levels, batch, seed
        self.form, self.device, self.pool = form, device, Pool(store, numbers)
        self.mine = range(rank, batch, world_size)
        self.draws = Draws(numbers, seed, sources)
        self._permutation = lru_cache(2)(lambda epoch: keys.generator("epoch", seed, epoch).permutation(len(numbers)))
        self._rows = lru_cache(2 * len(self.tasks))(
            lambda name, epoch: keys.generator("rows", seed, name, epoch).permutation(len(self.tasks[name].train))
        )
        self._worker = ThreadPoolExecutor(1, "puzzles")
        self._ahead = {}
        self.found = False  # a usable image, so far

    def get(self, step: int) -> StreamBatch:
        """The rank's share of a step; the next step's is begun in the background."""
        future = self._ahead.pop(step, None) or self._worker.submit(self.build, step)
        batch = future.result()
        self._ahead = {step + 1: self._worker.submit(self.build, step + 1)}
        return batch

    def close(self):
        self._worker.shutdown(cancel_futures=True)

    def names(self, step: int) -> list:
        """Puzzle of each slot of a step: the mixture's shares as exactly as the batch allows, in keyed order."""
        rng = keys.generator("mixture", self.seed, step)
        edges = list(accumulate(self.mixture.values()))
        points = (rng.permutation(self.batch) + rng.random()) / self.batch * edges[-1]
        return [list(self.mixture)[min(bisect_right(edges, point), len(edges) - 1)] for point in points]

    def build(self, step: int) -> StreamBatch:
        names = self.names(step)
        return self._fill(step, [_Slot(self, step, j, names) for j in self.mine])

    def row(self, step, name, earlier) -> tuple[int, int]:
        """(epoch, row) of a task's slot that `earlier` ones of its step come before."""
        while (known := len(self._before[name])) <= step:
            names = self.names(known - 1)
            for task, before in self._before.items():
                before.append(before[-1] + names.count(task))
        train = self.tasks[name].train
        epoch, place = divmod(self._before[name][step] + earlier, len(train))
        return epoch, train[self._rows(name, epoch)[place]]

    def again(self, batch: StreamBatch, places) -> StreamBatch:
        """Other puzzles for the slots at `places` of a batch, as a batch of their own: from other images, of the same
        kind where those allow it, with the same prompt ids. Each call draws the slots' next attempts, which are the
        same whatever the world size."""
        slots = [batch.slots[place] for place in places]
        for slot in slots:
            slot.draw_again()
        return self._worker.submit(self._fill, batch.step, slots).result()

    def _fill(self, step, slots):
        decided = {}  # slot -> its puzzle
        while open_slots := [slot for slot in slots if slot.j not in decided]:
            for slot, puzzle in self._asked([slot for slot in open_slots if slot.task]):
                if puzzle is None:
                    slot.bad += 1
                    slot.other_image()
                else:
                    decided[slot.j] = puzzle
            open_slots = [slot for slot in open_slots if not slot.task]
            for slot, image in zip(open_slots, self.store.pictures([slot.number for slot in open_slots])):
                if image is None:
                    slot.bad += 1
                    slot.other_image()
                    continue
                level = self.levels(step, slot.j, slot.name)
                puzzle = _decidable(slot.address(level), image, self.form, self.pool)
                if puzzle:
                    decided[slot.j] = puzzle
                    self.found = True
                else:
                    slot.other_puzzle()
        made = puzzles.PuzzleBatch([decided[slot.j] for slot in slots], self.form)
        prompts = model.prompts(made, self.tokenizer, device=self.device)
        for prompt, slot in zip(prompts, slots):
            prompt.id = slot.j
        return StreamBatch(step, made, prompts, [slot.number for slot in slots], slots)

    def _asked(self, slots):
        """(slot, its Puzzle or None) of slots of tasks, a task at a time."""
        for name in dict.fromkeys(slot.name for slot in slots):
            own = [slot for slot in slots if slot.name == name]
            yield from zip(own, self.tasks[name].puzzles([slot.address(LEVEL) for slot in own], self.form))


class _Slot:
    def __init__(self, stream, step, j, names):
        name = names[j]
        self.stream, self.j, self.q, self.attempt = stream, j, step * stream.batch + j, 0
        self.bad = 0  # of its attempt + 1 images so far
        self.drawn_from = 0  # its attempt when it was last drawn
        self.first, self.name, self.tried = name, name, {name}
        self.task = stream.tasks.get(name)
        if self.task:
            self.epoch, self.number = stream.row(step, name, names[:j].count(name))
            return
        epoch, place = divmod(self.q, len(stream.numbers))
        self.epoch, self.number = stream.draws.at(epoch, stream._permutation(epoch)[place])

    def address(self, level):
        return puzzles.Address(self.name, level, self.stream.seed, self.epoch, self.attempt, self.number)

    def other_puzzle(self):
        left = [name for name in self.stream.mixture if name not in self.tried and name not in self.stream.tasks]
        if not left:
            return self.other_image()
        self.name = left[keys.fold("fallback", self.stream.seed, self.q, self.attempt, len(left)) % len(left)]
        self.tried.add(self.name)

    def draw_again(self):
        self.drawn_from = self.attempt + 1
        self.other_image()

    def other_image(self):
        self.attempt += 1
        tries = self.attempt - self.drawn_from
        if self.task:
            if tries > SUBSTITUTES:
                first = next(iter(self.task.bad.items()))
                example = f"{self.task.named(first[0])}: {first[1]}"
                raise UserError(f"no usable row after {tries - 1} tries in {self.task.key}, e.g. {example}")
            self.number = self.task.substitute(self.stream.seed, self.epoch, self.q, self.attempt)
            return
        if tries > (PATIENCE if self.stream.found else SUBSTITUTES):
            store = self.stream.store
            wanted = " or ".join(name for name in self.stream.mixture if name not in self.stream.tasks)
            where = repr(str(store.folder.root))
            raise UserError(f"no usable image after {tries - 1} tries in {where} for {wanted}{store.complaint()}")
        key = keys.fold("substitute", self.stream.seed, self.epoch, self.q, self.attempt)
        _, self.number = self.stream.draws.at(self.epoch, key % len(self.stream.draws))
        self.name, self.tried = self.first, {self.first}


def _decidable(address, image, form, pool):
    """The puzzle of an address; None where its image, or what the pool has to set against it, can't decide one."""
    try:
        puzzle = puzzles.puzzle_at(address, image, form, pool)
    except puzzles.PoolError:
        return None
    return puzzle if puzzle.decidable else None


def choose_held_out(store, numbers, name, level, count, *, seed, form) -> list:
    """The addresses of `count` puzzles of one kind from held-out images.

    They are the same ones whenever asked: images are gone through in turn, in epoch after epoch; bad images and
    undecidable puzzles are passed over. Single answers come in turn too (a puzzle is drawn again, by key, until its
    answer is the one whose turn it is), so that a constant answer scores chance and no more. Thinking or not, they are
    the same. Raises UserError if too few can be made.
    """
    seed, pool, chosen = keys.fold("evaluation", seed), Pool(store, numbers), []
    for i in range(20 * count):
        number, epoch = numbers[i % len(numbers)], i // len(numbers)
        (image,) = store.pictures([number])
        if image is not None:
            tried = (puzzles.Address(name, level, seed, epoch, attempt, number) for attempt in range(64))
            address = _wanted(tried, image, len(chosen), form, pool)
            chosen += [address] if address else []
        if len(chosen) == count:
            return chosen
    made = f"only {len(chosen)} of {count} {name} puzzles could be made"
    raise UserError(f"{made} from {len(numbers)} held-out images{store.complaint()}")


def ask_held_out(task, addresses, *, form):
    """The questions of a task at these addresses, as PuzzleBatches of at most CHUNK, made as they are asked for;
    without those that can't be read any more."""
    for start in range(0, len(addresses), CHUNK):
        whole = [puzzle for puzzle in task.puzzles(addresses[start : start + CHUNK], form) if puzzle is not None]
        if whole:
            yield puzzles.PuzzleBatch(whole, form)


def _wanted(addresses, image, turn, form, pool):
    """The first address whose puzzle is decidable and has the answer whose turn it is; None if there is none before one
    that isn't decidable."""
    for address in addresses:
        puzzle = _decidable(address, image, form, pool)
        if puzzle is None:
            return None
        choices = puzzle.answer.choices
        if not choices or puzzle.answer.value == choices[turn % len(choices)]:
            return address
    return None


def make_held_out(store, numbers, addresses, *, form):
    """The puzzles at these addresses, as PuzzleBatches of at most CHUNK, made as they are asked for; without those
    whose image can't be read any more."""
    pool = Pool(store, numbers)
    for start in range(0, len(addresses), CHUNK):
        some = addresses[start : start + CHUNK]
        images = store.pictures([address.index for address in some])
        whole = [(address, image) for address, image in zip(some, images) if image is not None]
        if whole:
            yield puzzles.PuzzleBatch([puzzles.puzzle_at(address, image, form, pool) for address, image in whole], form)

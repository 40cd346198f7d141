"""Which prompt is where: the host's side of a rollout, in numbers. It knows no tensors."""

from collections import deque
from dataclasses import dataclass


@dataclass
class Place:
    """Buffers for one group. prompt: number of the prompt whose samples decode there, None where it is free; steps: how
    many more they take at most; live: how many of them go on, as of the last look."""

    prompt: int | None = None
    steps: int = 0
    live: int = 0


class Scheduler:
    """Waiting prompts go to free places, in their order, while their samples find room among the rows of a step.

    lengths: each prompt's tokens; shape: a `Shape`; prefill_tokens: of prompts that run in one packed row at most, of
    which a row holds one at least.
    """

    def __init__(self, lengths, shape, prefill_tokens):
        self.lengths, self.shape, self.prefill_tokens = lengths, shape, prefill_tokens
        self.waiting = deque(range(len(lengths)))
        self.places = [Place() for _ in range(shape.places)]

    @property
    def live(self) -> list:
        return [place.live for place in self.places]

    @property
    def busy(self) -> bool:
        return any(place.prompt is not None for place in self.places)

    def release(self) -> dict:
        """{place: prompt} of the groups whose samples have all ended. Their places are free again."""
        done = {p: place.prompt for p, place in enumerate(self.places) if place.prompt is not None and not place.live}
        for p in done:
            self.places[p] = Place()
        return done

    def admit(self) -> list:
        """{place: prompt} for each packed row that is to be prefilled now."""
        G, packed = self.shape.group_size, []
        room = (self.shape.rows - sum(self.live)) // G
        for p in [p for p, place in enumerate(self.places) if place.prompt is None][:room]:
            if not self.waiting:
                break
            prompt = self.waiting.popleft()
            self.places[p] = Place(prompt, self.shape.max_tokens - 1, G)  # the prefill draws the first token
            if not packed or sum(self.lengths[n] for n in [*packed[-1].values(), prompt]) > self.prefill_tokens:
                packed.append({})
            packed[-1][p] = prompt
        return packed

    def advance(self, most) -> int:
        """How many steps to decode before the next look: at most `most`, and no more than a group can still take."""
        steps = min(most, max(place.steps for place in self.places))
        for place in self.places:
            place.steps = max(0, place.steps - steps)
        return steps

    def look(self, live) -> None:
        """live: how many samples of each place go on."""
        for place, n in zip(self.places, live):
            place.live = n

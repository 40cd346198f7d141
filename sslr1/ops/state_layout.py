"""Where recurrent layers find their way in a packed row of groups: which row comes before which, and which state a
sequence starts from."""

from copy import copy
from typing import NamedTuple

import torch

from sslr1.ops import transfer

CHUNK = 64  # tokens whose products the chunked delta rule takes together
CONTEXT = 3  # rows before its own that a convolution of width 4 sees


class Chunks(NamedTuple):
    """Sequences cut into chunks of one width C, the last of each filled up: chunk 0 of every sequence, then chunk 1 of
    those that have one, and so on. The longest sequences come first, so that each step is the first few of the one
    before.

    rows int64 [n, C]: the packed row of each slot, T where there is none; steps int64 [most chunks], always on the CPU:
    sequences that have a chunk of that number; following, preceding int64 [n]: the sequence's next chunk and the one
    before, -1 where there is none; lasts int64 [sequences]: the last chunk of each that chunk 0, 1, … begins.
    """

    rows: torch.Tensor
    steps: torch.Tensor
    following: torch.Tensor
    preceding: torch.Tensor
    lasts: torch.Tensor


class StateLayout:
    """For recurrent layers what `Layout` is for attention: made once a micro-batch, handed to every layer as it is.

    groups: list of (prompt length, completion lengths) of a packed row, each `[prompt | c1 … cG]`. A prompt starts from
    nothing, a completion from where its prompt ends; completions may be empty. Raises ValueError for a group without a
    prompt.

    tokens: T. prompts, completions: `Chunks`; completions without tokens are in none. starts int64 [completions]: the
    chunk of the prompts that each of their completions, in the chunks' order, starts behind; ends int64 [groups]: the
    last chunk of each prompt. spots int64 [3, T]: where each token lies among the slots of both, prompts' first: its
    chunk's first slot, its place in the chunk, the chunk's width.

    prompt_rows, completion_rows int64: the packed rows of either; places int64 [T]: where each row lies among both,
    prompts' first; prompt_bounds, completion_bounds int64 [n + 1]: where each sequence starts among its kind, and the
    end; host_bounds: both, always on the CPU; owners int64 [completions]: the group of each, in packed order.

    spans int64 [sequences, 4], always on the CPU: first row, tokens, whether it is a prompt, and which of the prompts
    it is in the order of their chunks; in packed order.

    context int64 [3, T]: the rows one, two and three before each, -1 where there is none. The same the other way round:
    row t is one of the three before rows followers[0, a:b], and followers[1, a:b] before each, where a and b are
    follower_bounds[t : t + 2]; int64. tails int64 [groups, 3]: each prompt's last rows, in order, -1 where it is
    shorter.
    """

    def __init__(self, groups):
        self.groups = [(int(prompt), tuple(int(c) for c in completions)) for prompt, completions in groups]
        prompts, completions, owners, before, row = [], [], [], [], 0
        for number, (prompt, lengths) in enumerate(self.groups):
            if prompt < 1:
                raise ValueError(f"a group's prompt has {prompt} tokens; it needs one at least")
            prompts.append((row, prompt))
            before += [-1, *range(row, row + prompt - 1)]
            row += prompt
            end = row - 1
            for length in filter(None, lengths):
                completions.append((row, length))
                owners.append(number)
                before += [end, *range(row, row + length - 1)]
                row += length
        self.tokens = row
        self.prompt_rows, self.prompt_bounds = _rows_and_bounds(prompts)
        self.completion_rows, self.completion_bounds = _rows_and_bounds(completions)
        self.host_bounds = self.prompt_bounds, self.completion_bounds  # a tuple, which stays on the CPU
        self.places = torch.cat([self.prompt_rows, self.completion_rows]).argsort()
        self.owners = torch.tensor(owners, dtype=torch.int64)
        self.prompts, prompt_spots, self.ends, place = _chunks(prompts, row)
        self.completions, spots, _, completion_place = _chunks(completions, row)
        self.starts = self.ends[self.owners[completion_place.argsort()]]
        spans = [(*span, 1, at) for span, at in zip(prompts, place.tolist())] + [(*span, 0, 0) for span in completions]
        self.spans = torch.tensor(sorted(spans), dtype=torch.int64)
        spots[0] += self.prompts.rows.numel()
        self.spots = torch.empty(3, row, dtype=torch.int64)
        self.spots[:, self.prompt_rows], self.spots[:, self.completion_rows] = prompt_spots, spots
        one = torch.tensor([*before, -1])  # so that before "none" comes none
        context = [one]
        for _ in range(CONTEXT - 1):
            context.append(one[context[-1]])
        self.context = torch.stack(context)[:, :-1].contiguous()
        far, followers = (self.context >= 0).nonzero().unbind(1)
        before = self.context[far, followers]
        order = before.argsort(stable=True)
        self.followers = torch.stack([followers, far + 1])[:, order]
        self.follower_bounds = torch.searchsorted(before[order], torch.arange(row + 1))
        last = torch.tensor([start + length - 1 for start, length in prompts], dtype=torch.int64)
        ends = [last[:, None], *(context[i][last][:, None] for i in range(CONTEXT - 1))]
        self.tails = torch.cat(ends[::-1], 1)

    def to(self, device):
        """The same with its tensors on `device`, but for those that are always on the CPU."""
        moved = copy(self)
        tensors = {(name,): x for name, x in vars(self).items() if isinstance(x, torch.Tensor) and name != "spans"}
        for kind in ("prompts", "completions"):
            chunks = getattr(self, kind)
            tensors |= {(kind, field): x for field, x in chunks._asdict().items() if field != "steps"}
        there = dict(zip(tensors, transfer.upload_together(tensors.values(), device, "tables")))
        for (name, *field), x in there.items():
            setattr(moved, name, getattr(moved, name)._replace(**{field[0]: x}) if field else x)
        return moved


def _rows_and_bounds(spans):
    rows = [torch.arange(start, start + length) for start, length in spans]
    bounds = torch.tensor([0, *(length for _, length in spans)]).cumsum(0)
    return torch.cat([torch.zeros(0, dtype=torch.int64), *rows]), bounds


def _chunks(spans, none):
    """spans: (first row, length) of each sequence, in packed order; none: the row of slots without one. Returns
    `Chunks`, its tokens' spots [3, tokens], each sequence's last chunk, and its place among the longest
    first."""
    # Where all are short, a narrower chunk: products within one cost its width's square.
    width = min(CHUNK, -(-max((length for _, length in spans), default=1) // 16) * 16)
    starts, lengths = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2).unbind(1)
    counts = -(-lengths // width)
    place = counts.argsort(descending=True, stable=True).argsort()
    steps = (counts > torch.arange(int(counts.max()) if spans else 0)[:, None]).sum(1)
    firsts = torch.cat([steps.new_zeros(1), steps.cumsum(0)])  # chunks before each step's
    sequence = torch.arange(len(spans)).repeat_interleave(lengths)  # of each token
    position = torch.arange(len(sequence)) - (lengths.cumsum(0) - lengths)[sequence]
    first, within = (firsts[position // width] + place[sequence]) * width, position % width
    rows = torch.full((int(firsts[-1]) * width,), none)
    rows[first + within] = starts[sequence] + position
    spots = torch.stack([first, within, torch.full_like(first, width)])
    chunk = torch.arange(int(firsts[-1]))
    step = torch.arange(len(steps)).repeat_interleave(steps)
    preceding = torch.where(step > 0, chunk - steps[step - 1], -1)
    following = torch.full_like(chunk, -1)
    following[preceding[step > 0]] = chunk[step > 0]
    ends = firsts[counts - 1] + place
    lasts = torch.empty_like(ends)
    lasts[place] = ends
    return Chunks(rows.view(-1, width), steps, following, preceding, lasts), spots, ends, place

"""Groups dealt to ranks so that each has about the same work. Rollouts differ in length, and a step takes as long as
its slowest rank; so groups, or some of a group's completions, move to other ranks before the learner packs them.

Pictures travel as the bytes that they show, an eighth of float32's patches, and become the same patches again."""

from dataclasses import dataclass

import torch

from sslr1 import distributed, ops
from sslr1.model.packing import Group, Prompt, Sample
from sslr1.ops import transfer
from sslr1.sums import plain_sum

SLACK = 0.05  # the most loaded rank may be this share above the mean
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Piece:
    """Completions `samples` (a range) of the step's group `group`, on `rank`."""

    group: int
    samples: range
    rank: int


def deal(prompts, completions, home, ranks) -> list:
    """Pieces that cover every group, with the most loaded rank within SLACK of the mean where possible.

    prompts: cost of each group's prompt; completions: costs of its completions; home: the rank that has it. Groups
    move, or swap places, as little as it takes; where whole groups can't do it, one is split, and its prompt then costs
    twice.
    """
    pieces = [Piece(g, range(len(own)), home[g]) for g, own in enumerate(completions)]

    def cost(piece):
        return prompts[piece.group] + plain_sum(completions[piece.group][s] for s in piece.samples)

    def relieve(high, low):
        """Make the larger of two ranks' loads smaller by a move, a swap or a cut; False if none does."""
        giving = [i for i, p in enumerate(pieces) if p.rank == high]
        taking = [None, *(i for i, p in enumerate(pieces) if p.rank == low)]

        def larger(moved):
            return max(loads[high] - moved, loads[low] + moved)

        swaps = [(larger(costs[i] - (0.0 if j is None else costs[j])), i, j) for i in giving for j in taking]
        swapped, i, j = min(swaps, key=lambda swap: swap[0])
        cuts = []
        for k in giving:
            piece, moved = pieces[k], 0.0
            for s in reversed(piece.samples[1:]):
                moved += completions[piece.group][s]
                cuts.append((max(loads[high] - moved, loads[low] + prompts[piece.group] + moved), k, s))
        cut, enough = min(cuts, default=None), 0.995 * loads[high]
        if cut and swapped > limit and cut[0] < min(swapped, enough):
            _, k, s = cut
            whole = pieces[k].samples
            pieces[k].samples = range(whole.start, s)
            pieces.append(Piece(pieces[k].group, range(s, whole.stop), low))
        elif swapped < enough:
            pieces[i].rank = low
            if j is not None:
                pieces[j].rank = high
        else:
            return False
        return True

    for _ in range(8 * len(pieces)):
        costs = [cost(piece) for piece in pieces]
        loads = [plain_sum(c for p, c in zip(pieces, costs) if p.rank == rank) for rank in range(ranks)]
        limit = (1 + SLACK) * plain_sum(loads) / ranks
        *others, high = sorted(range(ranks), key=loads.__getitem__)
        if loads[high] <= limit or not any(relieve(high, low) for low in others):
            break
    return sorted(pieces, key=lambda p: (p.group, p.samples.start))


def even_out(groups, rows, cost, world, spec=None):
    """(groups, rows) of this rank after dealing: rows is a tensor [P, K] of which a group takes its own along. A group
    that is only in part here keeps its length, with empty samples for those elsewhere. spec: the PatchSpec of all
    prompts. All ranks must call it."""
    if world.size == 1:
        return groups, rows
    own = [_sizes(group) for group in groups]
    tables = distributed.all_gather_rows(torch.tensor(own, dtype=torch.int64).view(len(groups), -1))
    home = [rank for rank, table in enumerate(tables) for _ in table]
    sizes = torch.cat(tables).tolist()
    rows = torch.cat(distributed.all_gather_rows(rows.cpu()))
    prompts = [cost.prompt(length, patches, images) for length, patches, images, *_ in sizes]
    completions = [[cost.completion(length, n) for n in lengths] for length, _, _, _, *lengths in sizes]
    pieces = deal(prompts, completions, home, world.size)

    first, kept, sends, receives = home.index(world.rank) if world.rank in home else 0, [], [], []
    for number, piece in enumerate(pieces):
        here, there = home[piece.group], piece.rank
        if world.rank not in (here, there):
            continue
        group = groups[piece.group - first] if here == world.rank else None
        if there != here:
            parcels = _empty(sizes[piece.group], piece.samples, spec)
            if group:
                parcels = _parcels(group, piece.samples, spec)
            way, other = (sends, there) if group else (receives, here)
            way.extend((other, len(parcels) * number + k, x) for k, x in enumerate(parcels))
        if there == world.rank:
            kept.append((piece, group, None if group else parcels))
    distributed.swap(sends, receives)
    dealt = [
        _part(group, piece.samples) if group else _unpacked(sizes[piece.group], piece.samples, parcels, world, spec)
        for piece, group, parcels in kept
    ]
    return dealt, rows[[piece.group for piece, *_ in kept]]


def _sizes(group):
    """Tokens, patches and images of a group's prompt, its patches' dtype, tokens of its completions."""
    prompt = group.prompt
    parts = (prompt.input_ids, prompt.pixel_values, prompt.image_grid_thw)
    return [
        *map(len, parts),
        DTYPES.index(prompt.pixel_values.dtype),
        *(len(sample.tokens) for sample in group.samples),
    ]


def _part(group, samples):
    """A group with `samples` alone; its prompt has all that it had."""
    none = Sample(torch.zeros(0, dtype=torch.int64), torch.zeros(0), "", "")
    return Group(group.prompt, [sample if s in samples else none for s, sample in enumerate(group.samples)])


def _parcels(group, samples, spec):
    """What travels: input ids, grids, the patches' bytes, and tokens and log-probs of the completions one after the
    other."""
    chosen, prompt = [group.samples[s] for s in samples], group.prompt
    tokens, logprobs = (torch.cat([getattr(s, name) for s in chosen]) for name in ("tokens", "logprobs"))
    shown = ops.patch_bytes(prompt.pixel_values, spec)
    return [x.cpu().contiguous() for x in (prompt.input_ids, prompt.image_grid_thw, shown, tokens, logprobs.float())]


def _empty(sizes, samples, spec):
    length, patches, images, _, *lengths = sizes
    tokens = sum(lengths[s] for s in samples)
    shapes = ((length,), (images, 3), (patches, 3 * spec.patch**2), (tokens,), (tokens,))
    dtypes = (torch.int64, torch.int64, torch.uint8, torch.int64, torch.float32)
    return [torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes)]


def _unpacked(sizes, samples, parcels, world, spec):
    """The group of what another rank's `_parcels` sent, with patches on this one's device."""
    input_ids, image_grid_thw, shown, tokens, logprobs = parcels
    *_, dtype = sizes[:4]
    pixel_values = ops.patches_of(transfer.upload(shown, world.device, "moved"), spec, DTYPES[dtype])
    lengths = [n if s in samples else 0 for s, n in enumerate(sizes[4:])]
    parts = zip(tokens.split(lengths), logprobs.split(lengths))
    return Group(Prompt(input_ids, pixel_values, image_grid_thw), [Sample(t, p, "", "") for t, p in parts])

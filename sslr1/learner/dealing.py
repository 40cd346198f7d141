"""Groups dealt to ranks so that each has about the same work. Rollouts differ in length, and a step takes as long as
its slowest rank; so groups, or some of a group's completions, move to other ranks before the learner packs them."""

from dataclasses import dataclass

import torch

from sslr1 import distributed
from sslr1.model.packing import Group, Prompt, Sample
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


def even_out(groups, rows, cost, world):
    """(groups, rows) of this rank after dealing: rows is a tensor [P, K] of which a group takes its own along. A group
    that is only in part here keeps its length, with empty samples for those elsewhere. All ranks must call it."""
    if world.size == 1:
        return groups, rows
    own = [_sizes(group) for group in groups]
    tables = distributed.all_gather_rows(torch.tensor(own, dtype=torch.int64).view(len(groups), -1))
    home = [rank for rank, table in enumerate(tables) for _ in table]
    sizes = torch.cat(tables).tolist()
    rows = torch.cat(distributed.all_gather_rows(rows.cpu()))
    prompts = [cost.prompt(length, patches, images) for length, patches, images, *_ in sizes]
    completions = [[cost.completion(length, n) for n in lengths] for length, _, _, _, _, *lengths in sizes]
    pieces = deal(prompts, completions, home, world.size)

    first, kept, sends, receives = home.index(world.rank) if world.rank in home else 0, [], [], []
    for number, piece in enumerate(pieces):
        here, there = home[piece.group], piece.rank
        if world.rank not in (here, there):
            continue
        tensors = _tensors(groups[piece.group - first], piece.samples) if here == world.rank else None
        if there != here:
            parcels = tensors or _empty(sizes[piece.group], piece.samples)
            (sends if tensors else receives).extend(
                (there if tensors else here, len(parcels) * number + k, x) for k, x in enumerate(parcels)
            )
            tensors = parcels
        if there == world.rank:
            kept.append((piece, tensors))
    distributed.swap(sends, receives)
    return [_group(sizes[p.group], p.samples, *tensors) for p, tensors in kept], rows[[p.group for p, _ in kept]]


def _sizes(group):
    """Tokens, patches and images of a group's prompt, its patches' width and dtype, tokens of its completions."""
    pixels = group.prompt.pixel_values
    return [
        len(group.prompt.input_ids),
        len(pixels),
        len(group.prompt.image_grid_thw),
        pixels.shape[1],
        DTYPES.index(pixels.dtype),
        *(len(sample.tokens) for sample in group.samples),
    ]


def _tensors(group, samples):
    """What travels: input ids, grids, patches, and tokens and log-probs of the completions one after the other."""
    chosen = [group.samples[s] for s in samples]
    tokens, logprobs = (torch.cat([getattr(s, name) for s in chosen]) for name in ("tokens", "logprobs"))
    prompt = group.prompt
    parts = (prompt.input_ids, prompt.image_grid_thw, prompt.pixel_values, tokens, logprobs.float())
    return [x.cpu().contiguous() for x in parts]


def _empty(sizes, samples):
    length, patches, images, width, dtype, *lengths = sizes
    tokens = sum(lengths[s] for s in samples)
    shapes = ((length,), (images, 3), (patches, width), (tokens,), (tokens,))
    dtypes = (torch.int64, torch.int64, DTYPES[dtype], torch.int64, torch.float32)
    return [torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes)]


def _group(sizes, samples, input_ids, image_grid_thw, pixel_values, tokens, logprobs):
    lengths = [n if s in samples else 0 for s, n in enumerate(sizes[5:])]
    parts = zip(tokens.split(lengths), logprobs.split(lengths))
    return Group(Prompt(input_ids, pixel_values, image_grid_thw), [Sample(t, p, "", "") for t, p in parts])

"""Prompts, samples and groups, and their packing: `[prompt | c1 … cG]` one after the other in a single row."""

from dataclasses import dataclass, field

import numpy as np
import torch

from sslr1 import ops
from sslr1.errors import UserError
from sslr1.model.gated_delta_net import linear_layers
from sslr1.ops import transfer

IMAGE_PAD = "<|image_pad|>"
THINK = "<think>"
TEMPLATE = "give the model folder the chat template of the original vision-language model (chat_template.jinja)"


@dataclass
class Prompt:
    """input_ids int64 [L], one placeholder id per visual token; pixel_values [n, patch dim]; image_grid_thw int64 [M,
    3]; id: the prompt's global number in its step, by which its draws are keyed.

    What follows from these is made once, by the first who needs it, and kept: positions int64 [3, L], on the CPU;
    tables: `shared_prefix.vision_tables` of its images, on the model's device, where pixel_values then are, too; seen:
    what a frozen vision tower makes of them, (visual tokens [n, D], features of earlier blocks [n, D] …), if
    `shared_prefix.keep_seen` was asked to.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    id: int = 0
    positions: torch.Tensor | None = field(default=None, repr=False, compare=False)
    tables: dict | None = field(default=None, repr=False, compare=False)
    seen: tuple | None = field(default=None, repr=False, compare=False)


@dataclass
class Sample:
    """tokens int64 [C] with the stop token; logprobs float32 [C] under the sampler; text without stop, pad and vision
    tokens; finish "stop" or "length"."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    text: str
    finish: str


@dataclass
class Group:
    prompt: Prompt
    samples: list = field(default_factory=list)


@dataclass(kw_only=True)
class Packed:
    """One micro-batch. T packed tokens, N completion tokens.

    input_ids int64 [T]; position_ids int64 [3, T]; prompts: the Prompts in order, which hold the pictures;
    image_grid_thw: theirs, which stays on the CPU, where its numbers can be read at no wait; layout: an
    `ops.Layout`, whose `groups` are (prompt length, completion lengths); state_layout: the same for recurrent layers,
    None where the model has none; image_rows int64: the rows that hold visual
    tokens; predictors int64 [N]: the row whose state predicts each completion token (for a completion's first token its
    prompt's last row); tokens int64 [N]; sequence int64 [N]: number of the completion, group * G + sample.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    prompts: list
    image_grid_thw: torch.Tensor
    layout: ops.Layout
    image_rows: torch.Tensor
    predictors: torch.Tensor
    tokens: torch.Tensor
    sequence: torch.Tensor
    state_layout: ops.StateLayout | None = None

    def to(self, device):
        """The same on `device`; its prompts' pictures go there when they are first looked at."""
        own = {k: x for k, x in vars(self).items() if isinstance(x, torch.Tensor) and k != "image_grid_thw"}
        own.update(zip(own, transfer.upload_together(own.values(), device, "ids")))
        layouts = {"layout": self.layout.to(device), "state_layout": self.state_layout and self.state_layout.to(device)}
        return Packed(**{**vars(self), **own, **layouts})


def prompts(batch, tokenizer, first_id=0, device=None) -> list:
    """Prompts of a `puzzles.make` batch: each question with its canvases, rendered on `device` (default: the images'),
    where the patches stay."""
    pixel_values, grid_thw = batch.render_patches(device=device)
    out, canvas, row = [], 0, 0
    for b, (question, count) in enumerate(zip(batch.questions, batch.canvas_counts, strict=True)):
        grids = grid_thw[canvas : canvas + count]
        rows = int(grids.prod(1).sum())
        pixels = pixel_values[row : row + rows]
        out.append(prompt(question, pixels, grids, tokenizer, batch.spec.merge, batch.thinking, first_id + b))
        canvas, row = canvas + count, row + rows
    return out


def prompt(question, pixel_values, image_grid_thw, tokenizer, merge, thinking=True, id=0) -> Prompt:
    """One prompt: chat template applied, each `<image>` of the question replaced by its image's visual tokens.
    ValueError where marks and images are not equally many."""
    ids = np.asarray(question_ids(question, tokenizer, thinking))
    is_image = ids == tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    if is_image.sum() != len(image_grid_thw):
        raise ValueError(f"a question with places for {is_image.sum()} images was given {len(image_grid_thw)}")
    repeats = np.ones(len(ids), np.int64)
    repeats[is_image] = (image_grid_thw.prod(1) // merge**2).numpy()
    return Prompt(torch.from_numpy(np.repeat(ids, repeats)), pixel_values, image_grid_thw, id)


def question_ids(question, tokenizer, thinking=True) -> list:
    """Token ids of a prompt with one for each picture."""
    pieces = question.split("<image>")
    content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for piece in pieces[1:]:
        content.append({"type": "image"})
        if piece:
            content.append({"type": "text", "text": piece})
    return tokenizer(_chat(tokenizer, content, thinking), add_special_tokens=False)["input_ids"]


def _chat(tokenizer, content, thinking) -> str:
    """The chat template with the question in it, up to where the answer begins. Templates with a switch for thinking
    call it `enable_thinking` (Qwen's do); others don't look at it. Raises UserError for a template that can't take such
    a message."""
    messages = [{"role": "user", "content": content}]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # whatever Jinja, the template and what it calls raise
        raise UserError(
            "the model's chat template can't render a question with pictures "
            f"({' '.join(f'{type(error).__name__}: {error}'.split())}): {TEMPLATE}"
        ) from None


def opening(tokenizer, thinking, asked="puzzles.thinking is false", mend="set puzzles.thinking=true") -> str:
    """What the chat template has written of every completion already: "<think>" if its generation prompt ends by
    opening that block, else "". Raises UserError for a template that opens it although there is to be no thinking
    (asked, mend: what says so there, and what to do instead), or that has no place for a question's words and
    pictures."""
    content = [{"type": "text", "text": "Look:"}, {"type": "image"}, {"type": "text", "text": "which?"}]
    text = _chat(tokenizer, content, thinking)
    places, words = text.count(IMAGE_PAD), all(text.count(part.get("text", "")) for part in content)
    if places != 1 or not words:
        raise UserError(
            f"the model's chat template renders a question with one picture with {places} {IMAGE_PAD}"
            f"{'' if words else ' and without all of its words'}: {TEMPLATE}"
        )
    if not text.rstrip().endswith(THINK):
        return ""
    if not thinking:
        raise UserError(
            f"{asked}, but the model's chat template opens {THINK} whatever enable_thinking says: {mend}, or give the "
            "model folder a chat template that doesn't"
        )
    return THINK


def mrope_positions(input_ids, image_grid_thw, image_token_id, merge) -> torch.Tensor:
    """Positions of a prompt as Qwen's models count them, int64 [3, L] (time, height, width): text counts up on all
    three; an image's tokens share the time at which it starts and add their row and column; text goes on after its
    longer side."""
    ids = input_ids.numpy()
    out = np.empty((3, len(ids)), np.int64)
    is_image = ids == image_token_id
    place, position = 0, 0
    starts = np.flatnonzero(is_image & ~np.concatenate([[False], is_image[:-1]]))
    grids = image_grid_thw.tolist()
    cursor = iter(grids)
    for start in starts:
        text = start - place
        out[:, place:start] = position + np.arange(text)
        position += text
        place = start
        while place < len(ids) and is_image[place]:
            t, h, w = next(cursor)
            h, w = h // merge, w // merge
            count = t * h * w
            cell = np.arange(count)
            out[0, place : place + count] = position + cell // (h * w)
            out[1, place : place + count] = position + cell // w % h
            out[2, place : place + count] = position + cell % w
            place += count
            position += max(h, w)
    out[:, place:] = position + np.arange(len(ids) - place)
    return torch.from_numpy(out)


def pack_options(config) -> dict:
    """What `pack` takes of a model's configuration."""
    merge, recurrent = config.vision_config.spatial_merge_size, bool(linear_layers(config.text_config))
    return {"image_token_id": config.image_token_id, "merge": merge, "recurrent": recurrent}


def pack(groups, *, image_token_id, merge, recurrent=False, group_size=None, parts=None) -> Packed:
    """Pack whole groups, or of each only the samples in `parts` (a range a group), into one row.

    recurrent: whether the model has recurrent layers, which take a layout of their own; group_size: G of the whole
    step, which fixes completion numbers (default: the first group's).
    """
    group_size = group_size if group_size is not None else max(1, len(groups[0].samples))
    ids, positions, layout, predictors, tokens, sequence = [], [], [], [], [], []
    row = 0
    for place, group in enumerate(groups):
        prompt = group.prompt
        L = len(prompt.input_ids)
        if prompt.positions is None:
            prompt.positions = mrope_positions(prompt.input_ids, prompt.image_grid_thw, image_token_id, merge)
        at = prompt.positions
        ids.append(prompt.input_ids)
        positions.append(at)
        first = int(at.max()) + 1
        last_row, row = row + L - 1, row + L
        lengths = []
        for s in parts[place] if parts is not None else range(len(group.samples)):
            sample = group.samples[s].tokens
            C = len(sample)
            if C == 0:
                continue
            lengths.append(C)
            ids.append(sample)
            positions.append((first + torch.arange(C)).expand(3, C))
            predictors.append(torch.cat([torch.tensor([last_row]), torch.arange(row, row + C - 1)]))
            tokens.append(sample)
            sequence.append(torch.full((C,), place * group_size + s))
            row += C
        layout.append((L, tuple(lengths)))
    none = [torch.zeros(0, dtype=torch.int64)]
    ids = torch.cat(ids)
    return Packed(
        input_ids=ids,
        position_ids=torch.cat(positions, 1),
        prompts=[group.prompt for group in groups],
        image_grid_thw=torch.cat([group.prompt.image_grid_thw for group in groups]),
        layout=ops.Layout(layout),
        state_layout=ops.StateLayout(layout) if recurrent else None,
        image_rows=(ids == image_token_id).nonzero()[:, 0],
        predictors=torch.cat(predictors or none),
        tokens=torch.cat(tokens or none),
        sequence=torch.cat(sequence or none),
    )


def split(groups, token_budget, count=None) -> list:
    """Cut a rank's groups into micro-batches of at most `token_budget` packed tokens: a list of lists of
    (group number, range of samples). A group above the budget is split by completions and repeats its prompt.

    count: exactly so many micro-batches (a rank's number must equal the others'); the largest are halved until they
    are. Raises UserError where a prompt and one completion exceed the budget, or `count` can't be reached.
    """
    pieces = []
    for number, group in enumerate(groups):
        L, lengths = len(group.prompt.input_ids), [len(s.tokens) for s in group.samples]
        start = 0
        while start < len(lengths):
            total, end = L, start
            while end < len(lengths) and total + lengths[end] <= token_budget:
                total += lengths[end]
                end += 1
            if end == start:
                raise UserError(
                    f"train.token_budget is {token_budget}: a prompt of {L} tokens and its completion of "
                    f"{lengths[start]} don't fit; raise it"
                )
            pieces.append((number, range(start, end), total))
            start = end
    batches, room = [], 0
    for number, samples, total in pieces:
        if not batches or total > room:
            batches.append([])
            room = token_budget
        batches[-1].append((number, samples, total))
        room -= total
    while count is not None and len(batches) < count:
        largest = max(range(len(batches)), key=lambda i: (len(batches[i]), len(batches[i][0][1])))
        batch = batches[largest]
        if len(batch) > 1:
            halves = batch[: len(batch) // 2], batch[len(batch) // 2 :]
        else:
            number, samples, total = batch[0]
            if len(samples) < 2:
                raise UserError(f"{len(groups)} groups can't be cut into {count} micro-batches")
            middle = (samples.start + samples.stop) // 2
            halves = [(number, range(samples.start, middle), total)], [(number, range(middle, samples.stop), total)]
        batches[largest : largest + 1] = halves
    return [[(number, samples) for number, samples, _ in batch] for batch in batches]

"""One in-process engine: each puzzle's prompt runs once, its group decodes together, waiting prompts take freed places.

It knows prompts and tokens, nothing of puzzles, rewards or how the model is trained. This file is its host side: what
is asked for and what fits. Who goes where is scheduler.py; what lies on the device is wave.py.
"""

import os

import torch

from sslr1 import ops
from sslr1.errors import UserError
from sslr1.model.packing import Group, Sample
from sslr1.model.shared_prefix import keep_seen, plug_in
from sslr1.ops.attention import KERNEL_DTYPES, KERNEL_HEAD_SIZES
from sslr1.rollout.cache import Shape, bytes_a_sample, bytes_a_token, full_layers, head_size, logit_bytes, places_for
from sslr1.rollout.kept import Kept
from sslr1.rollout.scheduler import Scheduler
from sslr1.rollout.wave import Wave

PLACEHOLDERS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
PREFILL_TOKENS = 16384  # of prompts that run in one packed row, whose activations they share
LOOK_EVERY = 8  # steps on a GPU; on a CPU looking costs nothing


class Engine:
    """model: a plain (not sharded) Hugging Face model; tokenizer: its tokenizer; max_tokens: longest completion;
    wave_rows: how many samples decode together at most (one group's at least).

    wave_groups: how many groups' keys and values are held at most, 0 is half as many again as fill wave_rows. The more,
    the better are wave_rows filled while groups wait for their longest samples; it costs the memory.

    batch_invariant: a sample is the same, bit for bit, with whatever others it decodes, on one machine; it costs a
    fixed 64 rows (or a group, if that is larger) a matrix product, so that finished samples are computed until their
    block of groups is done and weights are read once a block, and prompts that run one by one.
    look_every: decode steps between two looks at the device, 0 is 8 on a GPU and 1 elsewhere; cuda_graphs: replay
    captured steps on a GPU. Neither alters results.
    keeps_seen: prompts keep what the vision tower makes of their images, for a learner that doesn't train it.

    Where steps are captured, buffers and captured steps stay from one call of `generate` to the next, whatever it is
    for, until `release`. They grow with what is asked for; how large they are decides how attention is cut up, so that
    results may round otherwise than in buffers made for the call (not with batch_invariant).
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        max_tokens=512,
        wave_rows=1024,
        wave_groups=0,
        batch_invariant=False,
        look_every=0,
        cuda_graphs=True,
        keeps_seen=False,
    ):
        plug_in(model)
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens, self.wave_rows, self.wave_groups = max_tokens, wave_rows, wave_groups
        self.batch_invariant, self.look_every, self.cuda_graphs = batch_invariant, look_every, cuda_graphs
        self.stop_ids = stop_ids(model, tokenizer)
        self.suppressed = suppressed_ids(model, tokenizer, self.stop_ids)
        self.untold = {*self.stop_ids, *self.suppressed, tokenizer.pad_token_id}
        self.keeps_seen = keeps_seen
        self.kept = Kept()

    def expect(self, prompts, group_size, longest=0) -> None:
        """Say what will be asked for most: so many prompts a call, of `longest` tokens at most where that is known.
        Buffers that stay are made for it at once, and the steps of a smaller call before it are not captured twice."""
        self.kept = Kept(self._shape(prompts, group_size, longest, self.max_tokens))

    def release(self) -> None:
        """Give back the buffers and captured steps that are kept; the next call makes them anew."""
        self.kept.release()

    @property
    def kept_bytes(self) -> int:
        """What they take on the device."""
        return self.kept.bytes

    def _shape(self, prompts, group_size, longest, max_tokens) -> Shape:
        places = places_for(prompts, group_size, self.wave_rows, self.wave_groups)
        rows = min(places, max(1, self.wave_rows // group_size)) * group_size
        return Shape(places=places, longest=longest, group_size=group_size, max_tokens=max_tokens, rows=rows)

    @torch.inference_mode()
    def generate(
        self, prompts, group_size=8, seed=0, step=0, attempt=0, temperature=1.0, top_p=1.0, top_k=0, max_tokens=None
    ):
        """group_size completions of each prompt: list of Group in the prompts' order, tensors on the CPU.

        Draws are keyed by (seed, step, attempt, prompt.id, sample, position) and nothing else. Sampling stops at any of
        the model's stop ids; vision and placeholder ids are never drawn. temperature 0 is greedy.

        Raises UserError, before anything runs, where the buffers of the worst case are more than the device has;
        FloatingPointError for logits that are not finite.
        """
        max_tokens = self.max_tokens if max_tokens is None else max_tokens
        if group_size < 1 or max_tokens < 1:
            raise ValueError(f"group_size and max_tokens must be 1 or more, got {group_size} and {max_tokens}")
        if not prompts:
            return []
        lengths = [len(p.input_ids) for p in prompts]
        shape = self._shape(len(prompts), group_size, max(lengths), max_tokens)
        wave = self._wave(shape)
        wave.begin(
            ops.fold("sample", seed, step, attempt),
            {"temperature": temperature, "top_p": top_p, "top_k": top_k},
            max_tokens,
        )
        try:
            return self._run(wave, Scheduler(lengths, shape, 0 if self.batch_invariant else PREFILL_TOKENS), prompts)
        except BaseException:
            self.release()  # what is not finite must not lie beyond a length of the next call
            raise

    def _wave(self, shape):
        model = self.model
        settings = dict(stop=self.stop_ids, suppressed=self.suppressed, batch_invariant=self.batch_invariant)
        if not self._captures():
            check_room(model, shape)
            return Wave(model, shape, **settings)

        def room(shape, extent):
            return sum(needed(model, shape, extent)) <= free_bytes(model.device)

        return self.kept.wave(model, shape, room, lambda shape: check_room(model, shape), **settings)

    def _run(self, wave, scheduler, prompts):
        look_every = self.look_every or (LOOK_EVERY if self.model.device.type == "cuda" else 1)
        groups = [Group(p) for p in prompts]
        while True:
            done = scheduler.release()
            found = wave.collect(list(done)) if done else None
            for packed in scheduler.admit():
                some = [prompts[n] for n in packed.values()]
                if self.keeps_seen:
                    keep_seen(self.model, some)
                wave.prefill(some, list(packed))
            wave.arrange(scheduler.live)
            wave.decode(scheduler.advance(look_every))
            if done:  # while the device works
                self._fill([groups[n] for n in done.values()], found)
            if not scheduler.busy:
                return groups
            scheduler.look(wave.look())

    def _fill(self, groups, found):
        """Samples of finished groups from `Wave.collect`'s tensors."""
        tokens, logprobs, counts = found
        for group, *rows in zip(groups, tokens, logprobs, counts.tolist()):
            ids, logprobs = ([row[:n].clone() for row, n in zip(x, rows[2])] for x in rows[:2])
            if not all(bool(x.isfinite().all()) for x in logprobs):
                raise FloatingPointError("the sampler met logits that are not finite: the weights have diverged")
            # Not all special tokens: <think> and </think> are such in some tokenizers, and are scored
            texts = self.tokenizer.batch_decode([[i for i in x.tolist() if i not in self.untold] for x in ids])
            ends = ["stop" if int(x[-1]) in self.stop_ids else "length" for x in ids]
            group.samples += map(Sample, ids, logprobs, texts, ends)

    def _captures(self) -> bool:
        model = self.model
        if model.device.type != "cuda" or not self.cuda_graphs:
            return False
        kernel = model.dtype in KERNEL_DTYPES and head_size(model.config.text_config) in KERNEL_HEAD_SIZES
        return kernel or not self.batch_invariant  # the plain form of the attention then waits for the device


def check_room(model, shape) -> None:
    """Raises UserError with the arithmetic where keys, values and the logits of a step are more than is free."""
    text, itemsize, samples = model.config.text_config, model.dtype.itemsize, shape.samples
    a_token, a_sample = bytes_a_token(text, itemsize), bytes_a_sample(text, itemsize)
    (cache, states, logits), free = needed(model, shape, shape.extent), free_bytes(model.device)
    if cache + states + logits <= free:
        return
    linear = f"{samples:,} samples' states x {a_sample:,} bytes take {states / 1e9:.2f} GB; " if states else ""
    raise UserError(
        f"the rollout needs {(cache + states + logits) / 1e9:.2f} GB, {free / 1e9:.2f} GB are free. Keys and values "
        f"take 2 x {len(full_layers(text))} layers x {text.num_key_value_heads} heads x {head_size(text)} x {itemsize} "
        f"bytes = {a_token:,} bytes a token; {shape.places:,} prompts x {shape.longest:,} tokens + {samples:,} samples "
        f"x {shape.max_tokens:,} tokens take {cache / 1e9:.2f} GB; {linear}logits, twice {shape.rows:,} x "
        f"{text.vocab_size:,} x 4 bytes, take {logits / 1e9:.2f} GB. Lower rollout.wave_rows, rollout.wave_groups, "
        "rollout.max_tokens or puzzles.max_pixels"
    )


def needed(model, shape, extent) -> tuple[int, int, int]:
    """Bytes of keys and values, of linear layers' states (for as much as `Shape.extent` names), and of a step's
    logits."""
    text, itemsize, (*tokens, samples) = model.config.text_config, model.dtype.itemsize, extent
    cache, states = sum(tokens) * bytes_a_token(text, itemsize), samples * bytes_a_sample(text, itemsize)
    return cache, states, logit_bytes(text, shape.rows)


def free_bytes(device) -> int:
    """Memory that can be had there: on a GPU what is free or kept by torch unused, on a CPU all that the machine
    has."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def stop_ids(model, tokenizer) -> list:
    """Every id that ends a completion: generation_config's (Qwen's have two) and the tokenizer's own."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


def suppressed_ids(model, tokenizer, stop) -> list:
    """Ids never drawn: vision and placeholder tokens, the pad token unless it stops, rows beyond the tokenizer."""
    config = model.config
    ids = {getattr(config, f"{name}_token_id", None) for name in ("image", "video", "vision_start", "vision_end")}
    ids |= {tokenizer.convert_tokens_to_ids(t) for t in PLACEHOLDERS if t in tokenizer.get_vocab()}
    ids |= {tokenizer.pad_token_id} - set(stop)
    ids |= set(range(len(tokenizer), config.text_config.vocab_size))
    return sorted(i for i in ids if i is not None)

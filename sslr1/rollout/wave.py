"""What of a rollout lies on the device: places for groups in flight, and the step that decodes their samples.

The host fills places, says which rows the next steps compute, and looks at one small tensor every few steps; nothing in
a step waits for it, so that on a GPU a step is captured in a CUDA graph once and replayed, in this call of
`Engine.generate` and in later ones. What is captured is what a CPU runs.
"""

import torch
from torch.nn import functional as F

from sslr1 import ops
from sslr1.model.decode_layers import DecodeLayers, rotary_tables
from sslr1.model.packing import Group, pack, pack_options
from sslr1.model.shared_prefix import run
from sslr1.ops import transfer
from sslr1.rollout.cache import GroupCache

BLOCK = 64  # rows of every step's matrix products where results must not depend on the batch


def bucket(n, device_type) -> int:
    """Rows that a step computes for n living samples: on a GPU the next 2^k or 3 * 2^k, so that few kinds of step are
    captured."""
    if device_type == "cpu":
        return n
    power = 1 << max(0, n - 1).bit_length()
    return power * 3 // 4 if n <= power * 3 // 4 and power >= 4 else power


class Wave:
    """P places, each for a prompt and its G samples; sample s of the prompt in place p has number
    p * G + s.

    By that number, on the device: `tokens` int64 and `logprobs` float32 [P * G, max_tokens], `counts` int64 (tokens
    drawn), `live` bool, `addresses` int64 (the draws' but for the position), `first_position` int64 (of a completion's
    first token). A step computes blocks: samples `order[start:stop]`, which lie in places first to last - 1.

    shape: a `Shape`, of which a call may fill less; graphs: a `Graphs` in which steps become CUDA graphs, or None;
    storage: as for `GroupCache`. `begin` comes first.
    """

    def __init__(self, model, shape, *, stop, suppressed, batch_invariant, graphs=None, storage=None):
        device, samples = model.device, shape.samples
        self.model, self.shape, self.batch_invariant, self.graphs = model, shape, batch_invariant, graphs
        self.places, self.group_size, self.max_tokens = shape.places, shape.group_size, shape.max_tokens
        self.most_rows = shape.rows
        self.cache = GroupCache(model.config.text_config, shape, model.dtype, device, batch_invariant, storage)
        int64 = {"dtype": torch.int64, "device": device}
        self.tokens = torch.zeros(samples, self.max_tokens, **int64)
        self.logprobs = torch.zeros(samples, self.max_tokens, device=device)
        self.counts, self.addresses, self.first_position = (torch.zeros(samples, **int64) for _ in range(3))
        self.live = torch.zeros(samples, dtype=torch.bool, device=device)
        self.rotary = rotary_tables(model.model.language_model, shape.longest + self.max_tokens, device)
        self.lengths = torch.ones(self.places, dtype=torch.int32, device=device)  # prompts, done ones too
        self.order = torch.arange(samples, device=device)
        ids = torch.tensor(stop), torch.tensor(suppressed, dtype=torch.int64)
        self.stop, self.suppressed = transfer.upload_together(ids, device, "ids")
        self.most = torch.full((), self.max_tokens, **int64)  # tokens of a completion in this call

    def begin(self, key, sampling, max_tokens):
        """A call begins, of which nothing is decoded yet: of earlier ones only keys and values stay, which no length
        covers. key: the hash of (seed, step, attempt) that draws go on from; sampling: temperature, top_p and top_k;
        max_tokens: of a completion, as many at most as the shape has."""
        self.key, self.sampling, self.blocks = key, sampling, []
        self.layers = DecodeLayers(self.model.model.language_model)
        for x in (self.tokens, self.logprobs, self.counts, self.addresses, self.live):
            x.zero_()
        self.lengths.fill_(1)
        self.first_position.fill_(1)  # a place that is never filled has no token yet, and goes through steps at 0
        self.most.fill_(max_tokens)

    def prefill(self, prompts, places):
        """Run `prompts` in one packed row, vision tower included, and draw their samples' first tokens."""
        model, device, G = self.model, self.model.device, self.group_size
        lengths = [len(p.input_ids) for p in prompts]
        packed = pack([Group(p) for p in prompts], **pack_options(model.config)).to(device)
        self.cache.expect(places, lengths)
        with ops.fast_products(device):
            hidden = run(model, packed, self.cache)
        numbers = [torch.tensor(x) for x in (places, lengths, [p.id for p in prompts])]
        taken, lengths_there, ids = transfer.upload_together(numbers, device, "tables")
        logits = ops.float_logits(hidden[lengths_there.cumsum(0) - 1], model.lm_head.weight)
        sample = torch.arange(G, device=device)
        samples = (taken[:, None] * G + sample).view(-1)
        next_position = torch.stack([p.max() for p in packed.position_ids.split(lengths, 1)]) + 1
        self.lengths[taken] = lengths_there.int()
        self.addresses[samples] = ops.fold_tensor(self.key, ids[:, None], sample).view(-1)
        self.first_position[samples] = next_position.repeat_interleave(G)
        self.counts[samples], self.live[samples] = 0, True
        self.draw(samples, logits, ops.fold_tensor(self.addresses[samples], self.counts[samples]), G)

    def arrange(self, live):
        """Choose what the next steps compute. live: how many samples of each place may go on, as far as the host
        knows; places after these are not used in this call."""
        live = [*live, *[0] * (self.places - len(live))]
        # The prompt of a place that is done is not read again, and a single key keeps the attention's result finite.
        going = self.live.view(self.places, -1).any(1)
        self.cache.prompt_lengths.copy_(torch.where(going, self.lengths, 1))
        P, G = self.places, self.group_size
        if self.batch_invariant:
            size = max(1, BLOCK // G)
            ranges = [(a, min(a + size, P)) for a in range(0, P, size)]
            self.blocks = [(a * G, b * G, a, b) for a, b in ranges if any(live[a:b])]
            return
        device_type = "cuda" if self.graphs else self.order.device.type
        last = P  # on a GPU one graph serves all of a bucket, places that are done included
        if device_type == "cpu":
            last = 1 + max((p for p in range(P) if live[p]), default=0)
        n = min(bucket(sum(live), device_type), self.most_rows, last * G)
        order = torch.arange(P * G, device=self.order.device)
        if n < last * G:  # the living first, each group's together, and then as many others as fill the bucket
            order = self.live.byte().argsort(descending=True, stable=True)
        self.order.copy_(order)
        self.blocks = [(0, n, 0, last)]

    def decode(self, steps):
        """So many tokens for each sample that goes on. Does not wait for the device."""
        if self.graphs:
            for _ in range(steps):
                for block in self.blocks:
                    self.graphs.run(self.step, block, tuple(self.sampling.values()))
            return
        with ops.fast_products(self.order.device, self.model.config.text_config.hidden_size):
            for _ in range(steps):
                for block in self.blocks:
                    self.step(*block)

    def look(self) -> list:
        """How many samples of each place go on. The host waits here."""
        return self.live.view(self.places, -1).sum(1).tolist()

    def collect(self, places):
        """tokens and logprobs [p, G, max_tokens], counts [p, G] of these places, on the CPU."""
        taken = transfer.upload(torch.tensor(places), self.order.device, "ids")
        return [
            x.view(self.places, self.group_size, *x.shape[1:])[taken].cpu()
            for x in (self.tokens, self.logprobs, self.counts)
        ]

    def step(self, start, stop, first, last):
        """One token for the samples of a block. One that is done goes through it like the others, and keeps what it
        has."""
        samples = self.order[start:stop]
        known = self.tokens, self.counts, self.live, self.addresses, self.first_position
        tokens, positions, written, keys = ops.step_begin(samples, *known, self.cache.own_lengths)
        self.cache.begin_step(samples, written, first, last)
        n = stop - start
        padding = -n % BLOCK if self.batch_invariant else 0
        tokens, positions = (F.pad(x, (0, padding)) if padding else x for x in (tokens, positions))
        states = self.layers(tokens, positions, self.rotary, self.cache)
        self.draw(samples, ops.float_logits(states, self.model.lm_head.weight)[:n], keys)

    def draw(self, samples, logits, keys, repeats=1):
        """The next token of each of `samples` [n] by its draw's key from logits [n / repeats, V], its log-prob, and
        whether the sample goes on."""
        drawn = ops.sample(logits, keys, suppress=self.suppressed, repeats=repeats, **self.sampling)
        ops.step_end(samples, *drawn, self.stop, self.most, self.tokens, self.logprobs, self.counts, self.live)


class Graphs:
    """CUDA graphs of a wave's steps, one for each bucket: a block (a step's arguments), and the numbers by which is
    sampled, which a graph holds. A bucket is run as it is the first time, which compiles its kernels, captured the
    second, and replayed from then on. All that a step reads and writes must stay where it is.

    pool: of torch's memory, one for all: they run one after the other and leave nothing in it. `bytes`: that these
    graphs have taken for it.
    """

    def __init__(self, pool):
        self.captured, self.seen, self.pool, self.bytes = {}, set(), pool, 0

    def run(self, step, block, sampling):
        bucket = block, sampling
        if bucket not in self.seen:
            self.seen.add(bucket)
            return step(*block)
        if bucket not in self.captured:
            self.captured[bucket], taken = capture(step, block, self.pool)
            self.bytes += taken
        self.captured[bucket].replay()


def capture(step, block, pool):
    """(CUDA graph of step(*block), which doesn't run, bytes that it has added to the pool's)."""
    graph = torch.cuda.CUDAGraph()
    # Other threads (NCCL's watchdog, loaders) may use the device meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        before = torch.cuda.memory_reserved()
        step(*block)
        taken = torch.cuda.memory_reserved() - before
    return graph, taken

"""The learner: groups and rewards in, one optimiser step out, of one update or several.

It knows packing, the loss and the optimiser; nothing of puzzles, prompts or how samples were drawn.
"""

import math
from dataclasses import dataclass, field, replace

import torch

from sslr1 import distributed, ops
from sslr1.learner import dealing
from sslr1.learner.adamw import MOMENTS, AdamWBfloat16
from sslr1.model import cost, pack, parallel, split
from sslr1.ops import transfer
from sslr1.sums import plain_sum

METRICS = {  # of an update, by the names of its statistics
    "loss": "loss",
    "policy_loss": "policy_loss",
    "kl": "kl",
    "entropy": "entropy",
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "ratio_mean": "ratio/mean",
    "ratio_min": "ratio/min",
    "ratio_max": "ratio/max",
    "gap_mean": "sampling/logp_difference/mean",
    "gap_max": "sampling/logp_difference/max",
    "capped": "sampling/capped",
}
EXTREMES = {"ratio_min": "min", "ratio_max": "max", "gap_max": "max"}  # all others are sums


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step came to, equal on all ranks."""

    metrics: (
        dict  # by name: means over its updates, but for the ratio's extremes, and the gap to the sampler, of the first
    )
    reward_std: float  # of all rewards
    tokens: float  # of completions
    computed: float  # tokens that went through the policy
    unshared: float  # tokens that would have, had each completion had its own copy of the prompt
    flops: float  # of `model.cost`


@dataclass(frozen=True, kw_only=True)
class Counts:
    """By which a step's loss is divided: over all ranks and micro-batches."""

    tokens: float
    sequences: float
    unshared: float
    reward_std: float


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Groups by their numbers, which of each one's samples, and on the device, for all of the step's updates, what they
    are packed into, the sampler's log-probs of its tokens, rewards, and advantages where they are given. kept:
    arguments of the loss that the first pass leaves to the others: its own log-probs, the reference's, and the weights
    that the sampler's log-probs give its tokens."""

    numbers: list
    parts: list  # of ranges
    inputs: tuple
    kept: dict = field(default_factory=dict)


class Learner:
    """policy: a sharded `model.Policy`; world: `distributed.World`; optim, loss: sections of the configuration;
    temperature: the sampler's; max_tokens: the longest completion; steps: of the whole run, for the schedule;
    max_logp_gap: from which difference to the sampler's log-prob a token is weighted by min(ratio, loss.is_cap), None
    for never; spec: the PatchSpec of all prompts, without which more ranks than one can't hand groups on; keep_seen: a
    function of prompts after which they have what a frozen vision tower sees, None where it is run in each pass. With
    loss.kl_coef above 0, `set_reference` comes before the first step."""

    def __init__(
        self,
        policy,
        world,
        *,
        optim,
        loss,
        temperature,
        max_tokens,
        token_budget,
        steps,
        max_logp_gap=None,
        spec=None,
        keep_seen=None,
    ):
        self.policy, self.world, self.optim = policy, world, optim
        self.spec, self.keep_seen = spec, keep_seen
        self.cost = self._cost_of(policy.model)
        self.token_budget, self.steps, self.updates = token_budget, steps, loss.updates
        self.max_logp_gap, self.is_cap = max_logp_gap, loss.is_cap
        self.reference = self.reference_cost = None
        self.step_number, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.loss_options = dict(
            loss_type=loss.loss_type,
            advantage=loss.advantage,
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            kl_coef=loss.kl_coef,
            entropy_coef=loss.entropy_coef,
            temperature=temperature,
            max_tokens=max_tokens,
        )
        options = dict(lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
        trained = [p for p in policy.parameters() if p.requires_grad]
        self.fused = optim.moments == "float32"
        if optim.moments == "bfloat16":
            self.optimizer = AdamWBfloat16(trained, **options)
        else:
            self.optimizer = torch.optim.AdamW(trained, **options, fused=True)

    def set_reference(self, reference):
        """A frozen policy (`model.load_reference`, `model.lora.Reference`), from which loss.kl_coef measures."""
        self.reference, self.reference_cost = reference, self._cost_of(reference.model, forward_only=True)

    def _cost_of(self, network, **options):
        found = cost.cost_of(network, **options)
        return replace(found, patch=0.0, patch_pair=0.0) if self.keep_seen else found  # which no pass sees then

    def empty_state(self, parameter) -> dict:
        """The optimiser's state of a parameter before its first step, to be filled from a checkpoint."""
        dtype = getattr(torch, self.optim.moments)
        step = torch.zeros((), device=self.world.device if self.fused else "cpu")
        return {"step": step, **{m: torch.zeros_like(parameter.detach(), dtype=dtype) for m in MOMENTS}}

    def learning_rate(self) -> float:
        """Of the step that comes next, all of whose updates take it: a linear rise, then the schedule."""
        k, rise = self.step_number, self.optim.warmup_steps
        if k < rise:
            return self.optim.lr * (k + 1) / rise
        progress = min(1.0, (k - rise) / max(1, self.steps - rise))
        factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return self.optim.lr * factor[self.optim.schedule]

    def step(self, groups, rewards, advantages=None) -> StepResult:
        """`loss.updates` updates from this rank's groups; rewards float32 [P, G]. advantages [P, G] override the
        configured kind.

        The first update is on-policy; the log-probs that it found are the old ones of those after it. Loss and
        gradients are divided by global counts, so they don't depend on ranks or micro-batches. A gradient that is not
        finite skips its update and what is left of the step, on all ranks."""
        counts = self._counts(groups, rewards)
        rows = rewards if advantages is None else torch.cat([rewards, advantages], 1)
        groups, rows = dealing.even_out(groups, rows, self.cost, self.world, self.spec)
        rows = rows.split(rewards.shape[1], 1)  # rewards, and advantages where they are given
        batches = self._micro_batches(groups, rows)
        computed, flops, passes = 0, 0.0, []
        while len(passes) < self.updates and (not passes or math.isfinite(passes[-1]["grad_norm"])):
            totals = {}
            for batch in batches:
                computed += len(batch.inputs[0].input_ids)
                flops += self._flops(groups, batch, first=not passes)
                parallel.last_micro_batch(self.policy, batch is batches[-1])
                with ops.fast_products(self.world.device):
                    found = self._backward(*batch.inputs, kept=batch.kept, counts=counts)
                for name, x in found.items():
                    combine = {"min": torch.minimum, "max": torch.maximum}.get(EXTREMES.get(name), torch.add)
                    totals[name] = combine(totals[name], x) if name in totals else x
            passes.append(self._update(totals))
        metrics = _over_updates(passes) | self._advance(whole=math.isfinite(passes[-1]["grad_norm"]))
        work = self._uploaded(torch.tensor([computed, flops], dtype=torch.float64))
        computed, flops = distributed.all_reduce(work).tolist()
        return StepResult(
            metrics=metrics,
            reward_std=counts.reward_std,
            tokens=counts.tokens,
            computed=computed,
            unshared=counts.unshared * len(passes),
            flops=flops,
        )

    def _counts(self, groups, rewards) -> Counts:
        tokens = sum(len(s.tokens) for g in groups for s in g.samples)
        unshared = sum(len(g.prompt.input_ids) * len(g.samples) for g in groups) + tokens
        own = [tokens, rewards.numel(), unshared, float(rewards.sum()), float(rewards.double().square().sum())]
        own = self._uploaded(torch.tensor(own, dtype=torch.float64))
        tokens, sequences, unshared, total, squares = distributed.all_reduce(own).tolist()
        variance = (squares - total**2 / sequences) / max(1, sequences - 1)
        return Counts(tokens=tokens, sequences=sequences, unshared=unshared, reward_std=max(0.0, variance) ** 0.5)

    def _micro_batches(self, groups, rows) -> list:
        """As many on every rank as the fullest needs."""
        own = torch.full((), len(split(groups, self.token_budget)), device=self.world.device)
        pieces = split(groups, self.token_budget, int(distributed.all_reduce(own, "max")))
        return [self._micro_batch(groups, rows, *zip(*piece)) for piece in pieces]

    def _micro_batch(self, groups, rows, numbers, parts) -> MicroBatch:
        numbers, chosen = list(numbers), [groups[n] for n in numbers]
        if self.keep_seen:
            self.keep_seen([group.prompt for group in chosen])
        packed = pack(chosen, group_size=rows[0].shape[1], parts=parts, **self.policy.pack_options)
        drawn = torch.cat([group.samples[s].logprobs for group, part in zip(chosen, parts) for s in part])
        own = [drawn, *(each[numbers] for each in rows)]
        own = transfer.upload_together(own, self.world.device, "rewards")
        return MicroBatch(numbers=numbers, parts=list(parts), inputs=(packed.to(self.world.device), *own))

    def _uploaded(self, counts):
        return transfer.upload(counts, self.world.device, "counts")

    def _backward(self, packed, drawn, rewards, advantages=None, *, kept, counts) -> dict:
        """Add a micro-batch's gradients; returns its statistics, each divided by the step's counts. kept: see
        MicroBatch."""
        first, names = not kept, []
        token_count = max(1, counts.tokens)  # every completion may have been cut off and masked
        if first and self.reference is not None:
            kept["ref_logprobs"] = self._reference_logprobs(packed)

        def loss(hidden, lm_head):
            own = {}
            if first:
                kept["token_weights"], capped = self._weights(hidden, lm_head, packed.tokens, drawn)
                own["capped"] = capped / token_count
            out = ops.grpo_loss(
                hidden,
                lm_head,
                packed.tokens,
                packed.sequence,
                rewards,
                token_count=token_count,
                sequence_count=counts.sequences,
                reward_std=counts.reward_std,
                advantages=advantages,
                **kept,
                **self.loss_options,
            )
            own |= out.stats
            names[:] = own
            return out.loss, out.logprobs, *own.values()

        value, logprobs, *stats = self.policy(packed, loss)
        value.backward()
        found = dict(zip(names, stats), loss=value.detach())
        if first:
            gap = (logprobs - drawn).abs()
            found["gap_mean"] = gap.sum() / token_count
            found["gap_max"] = gap.max() if len(gap) else gap.new_zeros(())
            kept["old_logprobs"] = logprobs
        return found

    @torch.no_grad()
    def _reference_logprobs(self, packed):
        temperature = self.loss_options["temperature"]
        return self.reference(
            packed, lambda hidden, head: ops.token_logprobs(hidden, head, packed.tokens, temperature)
        )[0]

    def _weights(self, hidden, lm_head, tokens, drawn):
        """(weight of each token, None for all 1; how many are capped): importance weights (truncated) from the
        sampler's policy to this one, for tokens past `max_logp_gap`. They take a pass over the vocabulary before the
        loss's own."""
        if self.max_logp_gap is None:
            return None, drawn.new_zeros(())
        gap = ops.token_logprobs(hidden.detach(), lm_head.detach(), tokens, self.loss_options["temperature"])[0] - drawn
        weights = torch.where(gap.abs() > self.max_logp_gap, gap.exp(), 1.0)
        return weights.clamp(max=self.is_cap), (weights > self.is_cap).sum()

    def _flops(self, groups, batch, first) -> float:
        """What a micro-batch costs, prompts too; in the first pass with the reference's forward pass."""
        total = 0.0
        for each in [self.cost, *([self.reference_cost] if first and self.reference_cost else [])]:
            for number, part in zip(batch.numbers, batch.parts):
                prompt = groups[number].prompt
                length = len(prompt.input_ids)
                total += each.prompt(length, len(prompt.pixel_values), len(prompt.image_grid_thw))
                total += plain_sum(each.completion(length, len(groups[number].samples[s].tokens)) for s in part)
        return total

    def _update(self, totals) -> dict:
        """One update from the gradients that lie there, unless they are not finite; returns its metrics."""
        norm = parallel.clip_gradients(self.policy, self.optim.clip_norm)
        if bool(torch.isfinite(norm)):  # every rank sees the same norm
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for way in ("sum", "min", "max"):
            names = [n for n in totals if EXTREMES.get(n, "sum") == way]
            reduced = distributed.all_reduce(torch.stack([totals[n].double() for n in names]), way).tolist()
            totals.update(zip(names, reduced))
        if self.reference is None:
            del totals["kl"]
        return {METRICS[n]: x for n, x in totals.items() if n in METRICS} | {"grad_norm": float(norm)}

    def _advance(self, whole) -> dict:
        """The next step's number; returns what of this one is a metric."""
        lr = self.learning_rate()
        self.step_number += 1
        self.skipped += not whole
        self.skipped_in_a_row = 0 if whole else self.skipped_in_a_row + 1
        return {"learning_rate": lr, "skipped_steps": self.skipped}


def _over_updates(passes) -> dict:
    """A step's metrics from those of its updates, of which the first has some more."""
    ways = {METRICS[name]: {"min": min, "max": max}[way] for name, way in EXTREMES.items()}
    values = {name: [found[name] for found in passes if name in found] for name in passes[0]}
    return {
        name: ways[name](found) if name in ways else plain_sum(found) / len(found) for name, found in values.items()
    }

"""The learner: groups and rewards in, one optimiser step out, of one update or several.

It knows packing, the loss and the optimiser; nothing of puzzles, prompts or how samples were drawn.
"""

import math

import torch

from sslr1 import distributed, ops
from sslr1.learner import dealing
from sslr1.learner.adamw import MOMENTS, AdamWBfloat16
from sslr1.model import cost, pack, parallel, split
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


class Learner:
    """policy: a sharded `model.Policy`; world: `distributed.World`; optim, loss: sections of the configuration;
    temperature: the sampler's; max_tokens: the longest completion; steps: of the whole run, for the schedule; max_logp_gap: from
    which difference to the sampler's log-prob a token is weighted by min(ratio, loss.is_cap), None for never.
    With loss.kl_coef above 0, `set_reference` comes before the first step."""

    def __init__(self, policy, world, *, optim, loss, temperature, max_tokens, token_budget, steps, max_logp_gap=None):
        self.policy, self.world, self.optim = policy, world, optim
        self.cost = cost.cost_of(policy.model)
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
        self.fused = world.device.type == "cuda" and optim.moments == "float32"
        if optim.moments == "bfloat16":
            self.optimizer = AdamWBfloat16(trained, **options)
        else:
            self.optimizer = torch.optim.AdamW(trained, **options, fused=self.fused or None)

    def set_reference(self, reference):
        """A frozen policy from `model.load_reference`, from which loss.kl_coef measures."""
        self.reference, self.reference_cost = reference, cost.cost_of(reference.model)

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

    def step(self, groups, rewards, advantages=None) -> dict:
        """`loss.updates` updates from this rank's groups; rewards float32 [P, G]. advantages [P, G] override the configured kind.

        The first update is on-policy; the log-probs that it found are the old ones of those behind it. Loss and gradients are
        divided by global counts, so they don't depend on ranks or micro-batches. A gradient that is not finite skips its
        update and what is left of the step, on all ranks.

        Returns metrics of the whole step, equal on all ranks: means over its updates, but for the ratio's extremes, and for
        the difference to the sampler, which is the first one's. `tokens` counts completion tokens, `computed` all tokens that
        went through the policy, `repeated` what would have gone through it had each completion had its own copy of the
        prompt; `flops` are those of `model.cost`; `step_reward_std` is that of all rewards.
        """
        device, G = self.world.device, rewards.shape[1]
        tokens = sum(len(s.tokens) for g in groups for s in g.samples)
        repeated = sum(len(g.prompt.input_ids) * len(g.samples) for g in groups) + tokens
        counts = [tokens, rewards.numel(), repeated, float(rewards.sum()), float(rewards.double().square().sum())]
        counts = distributed.all_reduce(torch.tensor(counts, dtype=torch.float64, device=device))
        tokens, sequence_count, repeated, total, squares = counts.tolist()
        variance = (squares - total**2 / sequence_count) / max(1, sequence_count - 1)
        rows = rewards if advantages is None else torch.cat([rewards, advantages], 1)
        groups, rows = dealing.even_out(groups, rows, self.cost, self.world)
        rewards, *given = rows.split(G, 1)
        pieces = split(groups, self.token_budget)
        most = distributed.all_reduce(torch.tensor(len(pieces), device=device), "max")
        pieces = split(groups, self.token_budget, int(most))

        computed = [0, 0.0]  # tokens, operations
        kept = [{} for _ in pieces]  # what a micro-batch's first pass leaves to the others
        passes = []
        while len(passes) < self.updates and (not passes or math.isfinite(passes[-1]["grad_norm"])):
            totals = {}
            for number, piece in enumerate(pieces):
                chosen = [n for n, _ in piece]
                packed = pack(
                    [groups[n] for n in chosen],
                    group_size=G,
                    numbers=chosen,
                    parts=[r for _, r in piece],
                    **self.policy.pack_options,
                ).to(device)
                work = len(packed.input_ids), self._flops(groups, piece, not passes)
                computed = [a + b for a, b in zip(computed, work)]
                parallel.last_micro_batch(self.policy, number == len(pieces) - 1)
                found = self._backward(
                    packed,
                    rewards[chosen].to(device),
                    torch.cat([groups[n].samples[s].logprobs for n, r in piece for s in r]).to(device),
                    kept[number],
                    token_count=max(1, tokens),  # every completion may have been cut off and masked
                    sequence_count=sequence_count,
                    reward_std=max(0.0, variance) ** 0.5,
                    advantages=given[0][chosen].to(device) if given else None,
                )
                for name, x in found.items():
                    combine = {"min": torch.minimum, "max": torch.maximum}.get(EXTREMES.get(name), torch.add)
                    totals[name] = combine(totals[name], x) if name in totals else x
            passes.append(self._update(totals))
        whole = math.isfinite(passes[-1]["grad_norm"])
        lr = self.learning_rate()
        self.step_number += 1
        self.skipped += not whole
        self.skipped_in_a_row = 0 if whole else self.skipped_in_a_row + 1
        computed = torch.tensor(computed, dtype=torch.float64, device=device)
        computed, flops = distributed.all_reduce(computed).tolist()
        numbers = {"learning_rate": lr, "skipped_steps": self.skipped, "step_reward_std": max(0.0, variance) ** 0.5}
        work = {"tokens": tokens, "computed": computed, "repeated": repeated * len(passes), "flops": flops}
        return _over_updates(passes) | numbers | work

    def _backward(self, packed, rewards, drawn, kept, **counts) -> dict:
        """Add a micro-batch's gradients; returns its statistics, each divided by the step's counts.

        kept: empty in the first pass, which leaves arguments of the loss there for those behind it: its own log-probs, the
        reference's, and the weights that the sampler's log-probs `drawn` give its tokens."""
        first, names = not kept, []
        if first and self.reference is not None:
            kept["ref_logprobs"] = self._reference_logprobs(packed)

        def loss(hidden, lm_head):
            own = {}
            if first:
                kept["token_weights"], capped = self._weights(hidden, lm_head, packed.tokens, drawn)
                own["capped"] = capped / counts["token_count"]
            out = ops.grpo_loss(
                hidden, lm_head, packed.tokens, packed.sequence, rewards, **kept, **self.loss_options, **counts
            )
            own |= out.stats
            names[:] = own
            return out.loss, out.logprobs, *own.values()

        value, logprobs, *stats = self.policy(packed, loss)
        value.backward()
        found = dict(zip(names, stats), loss=value.detach())
        if first:
            gap = (logprobs - drawn).abs()
            found["gap_mean"] = gap.sum() / counts["token_count"]
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
        """(weight of each token, None for all 1; how many are capped): importance weights (truncated) from the sampler's policy to this
        one, for tokens past `max_logp_gap`. They take a pass over the vocabulary before the loss's own."""
        if self.max_logp_gap is None:
            return None, drawn.new_zeros(())
        gap = ops.token_logprobs(hidden.detach(), lm_head.detach(), tokens, self.loss_options["temperature"])[0] - drawn
        weights = torch.where(gap.abs() > self.max_logp_gap, gap.exp(), 1.0)
        return weights.clamp(max=self.is_cap), (weights > self.is_cap).sum()

    def _flops(self, groups, piece, first) -> float:
        """What a micro-batch costs: (group number, range of samples) each, its prompt with it; in the first pass with the
        reference's forward pass."""
        total = 0.0
        for each in [self.cost, *([self.reference_cost] if first and self.reference_cost else [])]:
            for number, samples in piece:
                prompt = groups[number].prompt
                length = len(prompt.input_ids)
                total += each.prompt(length, len(prompt.pixel_values), len(prompt.image_grid_thw))
                total += plain_sum(each.completion(length, len(groups[number].samples[s].tokens)) for s in samples)
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


def _over_updates(passes) -> dict:
    """A step's metrics from those of its updates, of which the first has some more."""
    ways = {METRICS[name]: {"min": min, "max": max}[way] for name, way in EXTREMES.items()}
    values = {name: [found[name] for found in passes if name in found] for name in passes[0]}
    return {
        name: ways[name](found) if name in ways else plain_sum(found) / len(found) for name, found in values.items()
    }

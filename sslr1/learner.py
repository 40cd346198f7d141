"""The learner: groups and rewards in, one optimiser step out.

It knows packing, the loss and the optimiser; nothing of puzzles, prompts or how samples were drawn.
"""

import math

import torch

from sslr1 import ops
from sslr1.model import cost, dealing, pack, parallel, split
from sslr1.model.adamw import AdamWBfloat16

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch's AdamW names them


class Learner:
    """policy: a sharded `model.Policy`; world: `parallel.World`; optim, loss: sections of the configuration;
    temperature: the sampler's; max_tokens: the longest completion; steps: of the whole run, for the schedule; max_logp_gap: from
    which difference to the sampler's log-prob a token is weighted by min(ratio, loss.is_cap), None for never."""

    def __init__(self, policy, world, *, optim, loss, temperature, max_tokens, token_budget, steps, max_logp_gap=None):
        self.policy, self.world, self.optim = policy, world, optim
        self.cost = cost.cost_of(policy.model)
        self.token_budget, self.steps = token_budget, steps
        self.max_logp_gap, self.is_cap = max_logp_gap, loss.is_cap
        self.step_number, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.loss_options = dict(
            loss_type=loss.loss_type,
            advantage=loss.advantage,
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
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

    def empty_state(self, parameter) -> dict:
        """The optimiser's state of a parameter before its first step, to be filled from a checkpoint."""
        dtype = getattr(torch, self.optim.moments)
        step = torch.zeros((), device=self.world.device if self.fused else "cpu")
        return {"step": step, **{m: torch.zeros_like(parameter.detach(), dtype=dtype) for m in MOMENTS}}

    def learning_rate(self) -> float:
        """Of the step that comes next: a linear rise, then the schedule."""
        k, rise = self.step_number, self.optim.warmup_steps
        if k < rise:
            return self.optim.lr * (k + 1) / rise
        progress = min(1.0, (k - rise) / max(1, self.steps - rise))
        factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return self.optim.lr * factor[self.optim.schedule]

    def step(self, groups, rewards, advantages=None) -> dict:
        """One update from this rank's groups; rewards float32 [P, G]. advantages [P, G] override the configured kind.

        Returns metrics of the whole step, equal on all ranks. Loss and gradients are divided by global counts, so they
        don't depend on ranks or micro-batches. A gradient that is not finite skips the update on all ranks. `tokens` counts
        completion tokens, `computed` all tokens that went through the model, `repeated` what would have gone through it had each
        completion had its own copy of the prompt; `flops` are those of `model.cost`.
        """
        device, G = self.world.device, rewards.shape[1]
        tokens = sum(len(s.tokens) for g in groups for s in g.samples)
        repeated = sum(len(g.prompt.input_ids) * len(g.samples) for g in groups) + tokens
        counts = [tokens, rewards.numel(), repeated, float(rewards.sum()), float(rewards.double().square().sum())]
        counts = parallel.all_reduce(torch.tensor(counts, dtype=torch.float64, device=device))
        tokens, sequence_count, repeated, total, squares = counts.tolist()
        token_count = max(1, tokens)  # every completion may have been cut off and masked
        variance = (squares - total**2 / sequence_count) / max(1, sequence_count - 1)
        rows = rewards if advantages is None else torch.cat([rewards, advantages], 1)
        groups, rows = dealing.even_out(groups, rows, self.cost, self.world)
        rewards, *given = rows.to(device).split(G, 1)
        pieces = split(groups, self.token_budget)
        most = parallel.all_reduce(torch.tensor(len(pieces), device=device), "max")
        pieces = split(groups, self.token_budget, int(most))

        totals, computed = {}, torch.zeros(2, dtype=torch.float64, device=device)  # tokens, operations
        for number, piece in enumerate(pieces):
            chosen = [n for n, _ in piece]
            packed = pack(
                [groups[n] for n in chosen],
                group_size=G,
                numbers=chosen,
                parts=[r for _, r in piece],
                **self.policy.pack_options,
            ).to(device)
            computed += computed.new_tensor([len(packed.input_ids), self._flops(groups, piece)])
            options = dict(
                self.loss_options,
                token_count=token_count,
                sequence_count=sequence_count,
                reward_std=max(0.0, variance) ** 0.5,
                advantages=given[0][chosen] if given else None,
            )
            parallel.last_micro_batch(self.policy, number == len(pieces) - 1)
            drawn = torch.cat([groups[n].samples[s].logprobs for n, r in piece for s in r]).to(device)
            names = []

            def loss(hidden, lm_head):
                weights, capped = self._weights(hidden, lm_head, packed.tokens, drawn)
                out = ops.grpo_loss(
                    hidden, lm_head, packed.tokens, packed.sequence, rewards[chosen], token_weights=weights, **options
                )
                stats = out.stats | {"capped": capped / token_count}
                names[:] = stats
                return out.loss, out.logprobs, *stats.values()

            value, logprobs, *stats = self.policy(packed, loss)
            value.backward()
            gap = (logprobs - drawn).abs()
            found = dict(
                zip(names, stats),
                loss=value.detach(),
                gap_mean=gap.sum() / token_count,
                gap_max=gap.max() if len(gap) else gap.new_zeros(()),
            )
            for name, x in found.items():
                combine = {"ratio_min": torch.minimum, "ratio_max": torch.maximum, "gap_max": torch.maximum}.get(
                    name, torch.add
                )
                totals[name] = combine(totals[name], x) if name in totals else x
        computed, flops = parallel.all_reduce(computed).tolist()
        return self._update(totals) | {"tokens": tokens, "computed": computed, "repeated": repeated, "flops": flops}

    def _weights(self, hidden, lm_head, tokens, drawn):
        """(weight of each token, None for all 1; how many are capped): importance weights (truncated) from the sampler's policy to this
        one, for tokens past `max_logp_gap`. They take a pass over the vocabulary before the loss's own."""
        if self.max_logp_gap is None:
            return None, drawn.new_zeros(())
        gap = ops.token_logprobs(hidden.detach(), lm_head.detach(), tokens, self.loss_options["temperature"])[0] - drawn
        weights = torch.where(gap.abs() > self.max_logp_gap, gap.exp(), 1.0)
        return weights.clamp(max=self.is_cap), (weights > self.is_cap).sum()

    def _flops(self, groups, piece) -> float:
        """What a micro-batch costs: (group number, range of samples) each, its prompt with it."""
        total = 0.0
        for number, samples in piece:
            prompt = groups[number].prompt
            length = len(prompt.input_ids)
            total += self.cost.prompt(length, len(prompt.pixel_values), len(prompt.image_grid_thw))
            total += sum(self.cost.completion(length, len(groups[number].samples[s].tokens)) for s in samples)
        return total

    def _update(self, totals):
        norm = parallel.clip_gradients(self.policy, self.optim.clip_norm)
        lr = self.learning_rate()
        if bool(torch.isfinite(norm)):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:  # every rank sees the same norm, so every rank skips
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        ways = {"ratio_min": "min", "ratio_max": "max", "gap_max": "max"}
        for way in ("sum", "min", "max"):
            names = [n for n in totals if ways.get(n, "sum") == way]
            reduced = parallel.all_reduce(torch.stack([totals[n].double() for n in names]), way).tolist()
            totals.update(zip(names, reduced))
        return {
            "loss": totals["loss"],
            "policy_loss": totals["policy_loss"],
            "entropy": totals["entropy"],
            "clip_ratio/low_mean": totals["clip_low"],
            "clip_ratio/high_mean": totals["clip_high"],
            "ratio/mean": totals["ratio_mean"],
            "ratio/min": totals["ratio_min"],
            "ratio/max": totals["ratio_max"],
            "sampling/logp_difference/mean": totals["gap_mean"],
            "sampling/logp_difference/max": totals["gap_max"],
            "sampling/capped": totals["capped"],
            "grad_norm": float(norm),
            "learning_rate": lr,
            "skipped_steps": self.skipped,
        }

"""One in-process engine: each puzzle's prompt runs once, its group decodes together, finished rows are compacted away.

It knows prompts and tokens, nothing of puzzles, rewards or how the model is trained.
"""

import torch

from sslr1 import ops
from sslr1.model.packing import Group, Sample, pack
from sslr1.model.shared_prefix import no_mask, plug_in, run
from sslr1.rollout.cache import GroupCache

PLACEHOLDERS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


class Engine:
    """model: a plain (not sharded) Hugging Face model; tokenizer: its tokenizer; max_tokens: longest completion;
    wave_rows: how many samples decode together at most (a wave is a whole number of groups)."""

    def __init__(self, model, tokenizer, *, max_tokens=512, wave_rows=1024):
        plug_in(model)
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens, self.wave_rows = max_tokens, wave_rows
        self.stop_ids = stop_ids(model, tokenizer)
        self.suppressed = suppressed_ids(model, tokenizer, self.stop_ids)

    @torch.inference_mode()
    def generate(
        self, prompts, group_size=8, seed=0, step=0, attempt=0, temperature=1.0, top_p=1.0, top_k=0, max_tokens=None
    ):
        """group_size completions of each prompt: list of Group in the prompts' order, tensors on the CPU.

        Draws are keyed by (seed, step, attempt, prompt.id, sample, position) and nothing else. Sampling stops at any of
        the model's stop ids; vision and placeholder ids are never drawn. temperature 0 is greedy.
        """
        max_tokens = self.max_tokens if max_tokens is None else max_tokens
        if group_size < 1 or max_tokens < 1:
            raise ValueError(f"group_size and max_tokens must be 1 or more, got {group_size} and {max_tokens}")
        key = ops.fold("sample", seed, step, attempt)
        options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        wave, groups = max(1, self.wave_rows // group_size), []
        for start in range(0, len(prompts), wave):
            groups += self._wave(prompts[start : start + wave], group_size, key, max_tokens, options)
        return groups

    def _wave(self, prompts, G, key, max_tokens, options):
        model, device = self.model, self.model.device
        merge, P = model.config.vision_config.spatial_merge_size, len(prompts)
        packed = pack([Group(p) for p in prompts], image_token_id=model.config.image_token_id, merge=merge).to(device)
        lengths = [len(p.input_ids) for p in prompts]
        cache = GroupCache(model.config.text_config, lengths, G, max_tokens, model.dtype, device)
        hidden = run(model, packed, cache)
        ends = torch.tensor(lengths, device=device).cumsum(0)
        logits = ops.float_logits(hidden[ends - 1], model.lm_head.weight).repeat_interleave(G, 0)
        first_position = torch.stack([p.max() for p in packed.position_ids.split(lengths, 1)]) + 1

        tokens = torch.zeros(P * G, max_tokens, dtype=torch.int64, device=device)
        logprobs = torch.zeros(P * G, max_tokens, device=device)
        counts = torch.full((P * G,), max_tokens, device=device)
        stop = torch.tensor(self.stop_ids, device=device)
        suppressed = torch.tensor(self.suppressed, device=device)
        ids = torch.tensor([p.id for p in prompts], device=device)
        home = torch.arange(P * G, device=device)  # where each live slot's sample belongs
        live = torch.ones(P * G, dtype=torch.bool, device=device)  # slots whose sample goes on
        shape = (P, G)
        for t in range(max_tokens):
            keys = ops.fold_tensor(key, ids[home // G], home % G, torch.full_like(home, t))
            drawn, drawn_logprobs = ops.sample(logits, keys, suppress=suppressed, **options)
            tokens[home[live], t] = drawn[live]
            logprobs[home[live], t] = drawn_logprobs[live]
            stopped = live & torch.isin(drawn, stop)
            counts[home[stopped]] = t + 1
            live = live & ~stopped
            if t + 1 == max_tokens or not bool(live.any()):
                break
            if not bool(live.all()):
                shape, slots = self._compact(cache, live.view(shape))
                drawn, home, live = drawn[slots], home[slots], live[slots]
            position = first_position[home // G] + t
            states = model.model.language_model(
                inputs_embeds=model.model.language_model.embed_tokens(drawn)[None],
                position_ids=position.expand(3, 1, -1),
                attention_mask=no_mask(logits),
                use_cache=False,
                cache=cache,
            ).last_hidden_state[0]
            cache.advance()
            logits = ops.float_logits(states, model.lm_head.weight)
        if not bool(torch.isfinite(logprobs).all()):
            raise FloatingPointError("the sampler met logits that are not finite: the weights have diverged")
        return self._groups(prompts, G, tokens.cpu(), logprobs.cpu(), counts.tolist())

    def _compact(self, cache, live):
        """Drop finished groups and, where all groups have room, finished samples. Returns the new (P, G) and the old slot
        of each new one; a group that has fewer live samples than the fullest keeps some finished ones."""
        per_group = live.sum(1)
        prompts = per_group.nonzero()[:, 0]
        G = int(per_group.max())
        samples = live[prompts].int().argsort(dim=1, descending=True, stable=True)[:, :G]
        if len(prompts) < live.shape[0] or G < live.shape[1]:
            cache.keep(prompts, samples)
        else:
            samples = torch.arange(G, device=live.device).expand(len(prompts), G)
        return (len(prompts), G), (prompts[:, None] * live.shape[1] + samples).reshape(-1)

    def _groups(self, prompts, G, tokens, logprobs, counts):
        groups = [Group(p) for p in prompts]
        stop = set(self.stop_ids)
        texts = self.tokenizer.batch_decode(
            [row[:n].tolist() for row, n in zip(tokens, counts)], skip_special_tokens=True
        )
        for row, (count, text) in enumerate(zip(counts, texts)):
            ids = tokens[row, :count].clone()
            finish = "stop" if int(ids[-1]) in stop else "length"
            groups[row // G].samples.append(Sample(ids, logprobs[row, :count].clone(), text, finish))
        return groups


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

"""What a named GPU makes of a plan: whether it fits, which settings make it fit, and the time of a step. All of it is
arithmetic from data sheets and from the assumptions below, and none of it was measured."""

from dataclasses import replace
from functools import lru_cache

from sslr1.model.cost import CARDS, cost_of
from sslr1.rollout.cache import bytes_a_sample, bytes_a_token
from sslr1.setup.budget import MASTER, ROOM, TEXT, lines_of, outline, peak, rows_of, shapes_of, stays
from sslr1.sums import plain_sum

NAMES = {name.lower().replace(" ", ""): name for name in CARDS}  # by what --card takes
OF_PEAK, OF_BANDWIDTH = 0.4, 0.6  # assumed: what is had of the data sheet's operations, and of its bytes, a second


def report(config, path, ranks, name) -> str:
    """What the card of that name in NAMES makes of the plan; path: as for `budget.plan`."""
    network, card = outline(config, path), CARDS[NAMES[name]]
    sizes = f"{card.memory / 1e9:.0f} GB at {card.bandwidth / 1e12:.3g} TB/s"
    seconds = times(config, network, ranks, card)
    return "\n".join(
        [
            f"{NAMES[name]} ({card.flops / 1e12:.0f} TFLOP/s, {sizes}, {card.link / 1e9:.0f} GB/s between GPUs)",
            *fit(config, network, ranks, card),
            "",
            "seconds a step, estimated by arithmetic, not measured",
            *(f"  {taken:9.2f}  {what}: {how}" for what, taken, how in seconds if taken),
            f"  {plain_sum(taken for _, taken, _ in seconds):9.2f}  in all, without evaluations and checkpoints",
            f"assumed: {OF_PEAK:.0%} of the operations, {OF_BANDWIDTH:.0%} of the bandwidth, completions as long",
            "as rollout.max_tokens, and nothing sent while something is computed",
        ]
    )


def fit(config, network, ranks, card) -> list:
    """Lines on whether it fits, and on what would make it."""
    room = ROOM * card.memory / 1e9

    @lru_cache
    def shapes(frozen):
        return shapes_of(changed(config, {"model.frozen": frozen}), network, ranks)

    def takes(settings, count):
        other = changed(config, settings)
        spread = {"ranks": count, "shards": count // other.train.replicate}
        return peak(lines_of(other, replace(shapes(other.model.frozen), **spread))[0])

    own, said = takes({}, ranks), f"{ROOM:.0%} of its memory are {room:.1f} GB"
    if own <= room:
        keeps = config.rollout.cuda_graphs and stays(lines_of(config, shapes(config.model.frozen))[0], room)
        then = "stay during the learner's turn" if keeps else "are made anew in each step"
        return [f"  fits: {own:.1f} GB; {said}; the rollout's buffers {then}"]
    lines, s, count = [f"  does not fit: {own:.1f} GB; {said}"], shapes(config.model.frozen), ranks
    while config.rollout.prompts % count == 0:
        settings = mended(ladder(config, count, s.longest), lambda tried: takes(tried, count) <= room)
        if settings is not None:
            words = [f"{count} GPUs"] if count > ranks else []
            words += [f"{key}={value}" for key, value in settings.items()]
            return [*lines, f"  it would with {', '.join(words)}: {takes(settings, count):.1f} GB"]
        count *= 2
    sampler = f"the sampler's weights, {s.every * s.dtype / 1e9:.1f} GB, are whole on each"
    return [*lines, f"  nor with other settings, nor on up to {count // 2} GPUs: {sampler}. Take a smaller model"]


def ladder(config, ranks, prompt) -> dict:
    """{setting: values that may make it fit, the mildest first}, in the order of what they cost: time, then rounding,
    then training less of the model."""
    c, r = config, config.rollout
    rows = min(r.wave_rows, r.prompts // ranks * r.group_size)
    return {
        "train.recompute": [1] * (c.train.recompute != 1),
        "train.token_budget": _halves(c.train.token_budget, prompt + r.max_tokens),
        "rollout.wave_groups": [0] * (r.wave_groups > 0),
        "rollout.wave_rows": _halves(rows, r.group_size),
        "train.replicate": [1] * (c.train.replicate > 1),
        "optim.moments": ["bfloat16"] * (c.optim.moments != "bfloat16"),
        "model.frozen": ["vision"] * (c.model.frozen != "vision" and not c.model.lora.rank),
    }


def _halves(number, least) -> list:
    """Half of it, a quarter, … down to `least`."""
    out = []
    while number // 2 >= least:
        number //= 2
        out.append(number)
    return out


def mended(steps, fits) -> dict | None:
    """The settings with which `fits` holds: one after the other is taken to its end until it does, then each is taken
    back as far as it can be. None if it never does."""
    chosen = {}
    for key, value in ((key, value) for key, values in steps.items() for value in values):
        if fits(chosen):
            break
        chosen[key] = value
    if not fits(chosen):
        return None
    for key in reversed(list(chosen)):  # of what costs most first
        rest = {other: value for other, value in chosen.items() if other != key}
        milder = [rest, *(rest | {key: value} for value in steps[key])]
        chosen = next(settings for settings in milder if fits(settings))
    return {key: chosen[key] for key in steps if key in chosen}


def changed(config, settings):
    """The configuration with other values for some settings, by dotted key."""
    for key, value in settings.items():
        section, name = key.split(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config


def times(config, network, ranks, card) -> list:
    """(what, seconds, how) of a step's parts. Matrix products and attention are counted as `model.cost` does; a decode
    step takes as long as reading the language model and the keys and values of its rows, or as computing."""
    shapes, r, train = shapes_of(config, network, ranks), config.rollout, config.train
    learned, forward = cost_of(network), cost_of(network, forward_only=True)
    groups, rows, prompt = r.prompts // ranks, rows_of(config, ranks), shapes.prompt
    patches = (prompt - TEXT) * shapes.patches
    flops, moved = OF_PEAK * card.flops, OF_BANDWIDTH * card.bandwidth

    def whole(cost):
        return groups * (cost.prompt(prompt, patches, 1) + r.group_size * cost.completion(prompt, r.max_tokens))

    steps = -(-groups * r.group_size // rows) * r.max_tokens
    kept = rows * (prompt / r.group_size + r.max_tokens / 2) * bytes_a_token(shapes.text, shapes.dtype)
    kept += 2 * rows * bytes_a_sample(shapes.text, shapes.dtype)  # read and written
    read = (read_weights(network) * shapes.dtype + kept) / moved
    computed = rows * forward.completion(prompt, r.max_tokens) / r.max_tokens / flops
    again = whole(forward) / train.recompute if train.recompute else 0
    reference = bool(config.loss.kl_coef) * whole(forward)
    update = shapes.trained / shapes.shards * (3 * MASTER + 4 * (2 if config.optim.moments == "bfloat16" else 4))
    tokens = groups * (prompt + r.group_size * r.max_tokens)
    passes = -(-tokens // train.token_budget)
    updates, sent = config.loss.updates, {"a micro-batch": passes, "an update": 1}
    gigabytes = plain_sum(
        line.gb * (sent[often] * updates if (often := line.what.split(", ")[1]) in sent else 1)
        for line in lines_of(config, shapes)[1]
    )
    learner = (whole(learned) + again) * updates + reference
    return [
        ("prompts", groups * forward.prompt(prompt, patches, 1) / flops, f"{groups} of about {prompt} tokens"),
        ("decoding", steps * max(read, computed), f"{steps:,} steps of {rows} samples at most"),
        ("learner", learner / flops, f"{passes * updates} micro-batches"),
        ("AdamW", update * updates / moved, f"{shapes.trained / shapes.shards:,.0f} parameters"),
        ("sending", gigabytes * 1e9 / card.link, f"{gigabytes:.1f} GB, within one machine"),
    ]


def read_weights(network) -> int:
    """Parameters that a decode step reads: the language model's with its head, of untied embeddings only some rows."""
    language = network.model.language_model
    embeddings = language.embed_tokens.weight.numel()
    return sum(p.numel() for p in language.parameters()) - embeddings + network.lm_head.weight.numel()

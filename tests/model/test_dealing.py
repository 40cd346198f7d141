"""Groups dealt to ranks: everything once, loads within the slack, little moved."""

from sslr1.learner.dealing import SLACK, deal


def loads(pieces, prompts, completions, ranks):
    out = [0.0] * ranks
    for piece in pieces:
        out[piece.rank] += prompts[piece.group] + sum(completions[piece.group][s] for s in piece.samples)
    return out


def covers(pieces, completions):
    for g, own in enumerate(completions):
        assert [s for p in pieces if p.group == g for s in p.samples] == list(range(len(own)))


def test_loads_are_even(draw):
    """Lengths as uneven as rollouts' are, from 2 to 16 ranks with 4 to 16 groups each."""
    for _ in range(60):
        ranks, each, G = int(draw.integers(2, 17)), int(draw.integers(4, 17)), int(draw.integers(2, 17))
        n = ranks * each
        prompts = draw.uniform(200, 1500, n).tolist()
        completions = draw.gamma(2.0, draw.uniform(10, 300, (n, 1)), (n, G)).tolist()
        home = [i // each for i in range(n)]
        pieces = deal(prompts, completions, home, ranks)
        covers(pieces, completions)
        after = loads(pieces, prompts, completions, ranks)
        assert max(after) <= (1 + SLACK) * sum(after) / ranks, (ranks, each, G)
        assert sum(after) <= 1.05 * sum(map(sum, completions)) + 1.05 * sum(prompts)


def test_even_loads_stay_where_they_are():
    pieces = deal([100.0] * 6, [[10.0] * 4] * 6, [0, 0, 1, 1, 2, 2], 3)
    assert [p.rank for p in pieces] == [0, 0, 1, 1, 2, 2]


def test_a_single_large_group_is_split():
    """Whole groups can't be even here; its completions can."""
    completions = [[50.0] * 16, [1.0] * 16]
    pieces = deal([10.0, 10.0], completions, [0, 1], 2)
    covers(pieces, completions)
    assert len(pieces) == 3
    after = loads(pieces, [10.0, 10.0], completions, 2)
    assert max(after) <= 1.06 * sum(after) / 2


def test_what_cannot_be_split_stays():
    assert [p.rank for p in deal([10.0, 10.0], [[1000.0], [1.0]], [0, 1], 2)] == [0, 1]
    assert deal([], [], [], 2) == []


def test_costs_are_the_models(tiny):
    """2 operations a weight and token forward, 4 backward; what is frozen goes forward only."""
    from sslr1 import model
    from sslr1.model.cost import cost_of

    network = model.skeleton(tiny)
    cost = cost_of(network)
    layers = network.model.language_model.layers
    weights = sum(p.numel() for name, p in layers.named_parameters() if p.ndim == 2)
    assert cost.token == 6 * weights and cost.row == 6 * network.lm_head.weight.numel()
    attention = 12 * len(layers) * network.config.text_config.hidden_size
    assert cost.prompt(10, 0, 0) == 10 * cost.token + 50 * attention
    assert cost.completion(10, 4) == 4 * (cost.token + cost.row) + 4 * (10 + 2) * attention
    model.freeze(network, "vision")
    assert cost_of(network).patch == cost.patch / 3 and cost.patch > 0
    assert cost_of(network).patch_pair == cost.patch_pair / 3 > 0

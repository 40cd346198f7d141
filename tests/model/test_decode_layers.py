"""Products of the same input are one on the sampler's replica, whose parameters are views of it, and stay apart where
the sampler reads the learner's storage."""

import pytest
import torch

from sslr1 import distributed, model
from sslr1.model import parallel
from sslr1.model.decode_layers import DecodeLayers, Product, rotary_tables
from sslr1.rollout import SamplerWeights


def made(folder, dtype):
    world = distributed.start("cpu")
    network = model.skeleton(folder)
    weights = SamplerWeights(network, dtype)
    policy = parallel.shard(model.Policy(network), world, dtype)
    parallel.materialize(policy, world.device)
    model.load_weights(policy.model, folder)
    return policy, weights.attach(policy, world)


def products(network):
    layers = DecodeLayers(network.model.language_model).layers
    return [product for layer in layers for product in (layer.into, layer.up)]


def test_a_replicas_products_are_one(any_tiny):
    policy, weights = made(any_tiny, torch.bfloat16)
    assert not weights.shared
    found = products(weights.model)
    assert all(product.weight is not None for product in found)
    known = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in weights.model.parameters()}
    assert sum(known.values()) == sum({p.data_ptr(): p.nbytes for p in weights.model.parameters()}.values())
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    weights.refresh(policy)
    x = torch.randn(3, found[0].weight.shape[1], dtype=torch.bfloat16)
    for product in found:
        if product.weight.shape[1] == x.shape[1]:
            apart = torch.cat([linear(x) for linear in product.linears], -1)
            torch.testing.assert_close(product(x), apart, rtol=1e-2, atol=1e-1)
    mine, theirs = dict(weights.model.named_parameters()), dict(policy.model.named_parameters())
    for name in weights.copied:
        assert torch.equal(mine[name], parallel.local(theirs[name]).to(mine[name].dtype)), name


def test_what_the_learner_holds_stays_where_it_is(any_tiny):
    policy, weights = made(any_tiny, torch.float32)
    assert weights.shared
    mine, theirs = dict(weights.model.named_parameters()), dict(policy.model.named_parameters())
    assert all(parallel.local(theirs[name]).data_ptr() == p.data_ptr() for name, p in mine.items())
    for product in products(weights.model):
        x = torch.randn(5, product.linears[0].in_features)
        apart = torch.cat([linear(x) for linear in product.linears], -1)
        assert product.weight is None
        torch.testing.assert_close(product(x), apart, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_neighbours(bias):
    whole = torch.randn(12, 6)
    biases = torch.randn(12)
    linears = []
    for rows in (slice(0, 4), slice(4, 12)):
        linear = torch.nn.Linear(6, rows.stop - rows.start, bias=bias)
        linear.weight = torch.nn.Parameter(whole[rows])
        if bias:
            linear.bias = torch.nn.Parameter(biases[rows])
        linears.append(linear)
    with torch.no_grad():
        assert Product(linears).weight.data_ptr() == whole.data_ptr()
        assert Product(linears[::-1]).weight is None
        x = torch.randn(3, 6)
        for order in (linears, linears[::-1]):
            expected = torch.cat([linear(x) for linear in order], -1)
            torch.testing.assert_close(Product(order)(x), expected, rtol=1e-6, atol=1e-6)


def test_rotary_tables_are_the_modules(any_tiny):
    language = model.load_model(any_tiny).model.language_model
    positions = torch.tensor([0, 7, 7, 39])
    expected = language.rotary_emb(torch.empty(1), positions.expand(3, 1, -1))
    for table, own in zip(rotary_tables(language, 40, positions.device), expected):
        assert len(table) == 40 and torch.equal(table[positions], own[0])
    language.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ValueError, match="'dynamic'"):
        rotary_tables(language, 40, positions.device)

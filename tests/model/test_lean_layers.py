"""What a layer keeps for its backward pass, counted once a storage, against transformers' modules; and states of linear
layers over a whole learner."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sslr1 import model
from sslr1.model import gated_delta_net, lean_layers, parallel
from sslr1.model.tiny import build_tiny
from sslr1.setup import budget
from tests.model.test_packing import some_prompts, spec_of, with_samples


@pytest.mark.parametrize("size, most_of_text", [("qwen2.5-vl-3b", 0.5), ("qwen3-vl-2b", 0.5), ("qwen3.5-0.8b", 0.6)])
def test_bytes_kept_a_token(size, most_of_text, monkeypatch):
    """In bfloat16 without recomputation, at published shapes: at most half of what transformers' modules keep, of the
    tower 0.6."""
    text, patch = budget.activations(model.outline(size), torch.bfloat16)
    monkeypatch.setattr(lean_layers, "plug_in", lambda network: None)
    theirs = budget.activations(model.outline(size), torch.bfloat16)
    print(size, text, patch, theirs)
    assert text <= most_of_text * theirs[0] and patch <= 0.6 * theirs[1]
    if size == "qwen2.5-vl-3b":
        assert text <= 68e3 and theirs[0] >= 130e3


class Token:
    pass


class States(TorchDispatchMode):
    """Notes, after every operation, how many states of linear layers are held."""

    def __init__(self):
        super().__init__()
        self.made, self.held = [], []  # (a token that lives as long as the states, how many)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        if function._schema.name == "sslr1::gated_delta_rule":
            storage = out[1].untyped_storage()
            storage.token = Token()
            self.made.append((weakref.ref(storage.token), len(out[1])))
        self.held.append(sum(count for token, count in self.made if token() is not None))
        return out


def test_states_under_recomputation(tmp_path, photographs, seed, one_process):
    """A learner whose layers are recomputed holds no state between its passes, and in the backward pass those of one
    linear layer at a time: one for 64 prompt tokens, where each completion might have one as well."""
    folder = build_tiny(tmp_path / "m", seed=3, family="qwen3_5")
    network = model.load_model(folder)
    linear = gated_delta_net.linear_layers(network.config.text_config)
    policy = parallel.shard(model.Policy(network), one_process, recompute=1)
    prompts = some_prompts(model.load_tokenizer(folder), photographs, spec_of(folder))
    packed = model.pack(with_samples(prompts, [[3, 1, 4], [2, 5, 1], [1, 2, 6], [7, 1, 1]]), **policy.pack_options)
    with States() as states:
        (value,) = policy(packed, lambda hidden, head: (hidden.square().sum(),))
        between = states.held[-1]
        before = len(states.made)
        value.backward()
    a_layer = sum(-(-prompt // 64) for prompt, _ in packed.layout.groups)
    assert len(linear) == 3 and before == 3 and len(states.made) == 6  # each layer's twice
    assert between == 0 and max(states.held) == a_layer and states.held[-1] == 0
    assert all(p.grad is not None for p in policy.parameters())

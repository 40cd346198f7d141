"""Adapters in files: checkpoints that PEFT reads, PEFT's that we read, merged ones, and what is refused in words."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from sslr1 import config, export, model
from sslr1.config.inputs import Lora
from sslr1.errors import UserError
from sslr1.evaluate.__main__ import locate
from sslr1.model import lora, parallel
from sslr1.model.folder import base_of, holds_adapter
from sslr1.model.shared_prefix import Policy
from sslr1.runs import checkpoint
from sslr1.setup import budget, build
from tests.learner.test_learner import OPTIONS, make_groups, make_learner
from tests.model.test_lora import BOTH, put, some_values

NAMES = ("adapter_config.json", "adapter_model.safetensors")


def saved(folder, learner, weights, base, world, step=1):
    options = dict(tokenizer=model.load_tokenizer(base), source=base, world=world)
    trainer = {"best_step": step, "made_by": {"dtype": "torch.float32"}}
    return checkpoint.save(folder, step, learner=learner, sampler=weights.model, trainer=trainer, **options)


@pytest.fixture
def step(tmp_path, any_tiny, photographs, seed, one_process):
    """(learner, a run's folder with a checkpoint of it), adapters that do something."""
    learner, weights = make_learner(any_tiny, one_process, lora=BOTH)
    put(learner.policy.model, some_values(learner.policy.model))
    learner.step(*make_groups(any_tiny, photographs, seed))
    weights.refresh(learner.policy)
    saved(tmp_path / "run" / "checkpoints", learner, weights, any_tiny, one_process)
    return SimpleNamespace(learner=learner, weights=weights, run=tmp_path / "run", base=any_tiny)


def logits(network, base, photographs):
    groups, _ = make_groups(base, photographs, 0)
    group = groups[0]
    ids = torch.cat([group.prompt.input_ids, group.samples[0].tokens])[None]
    with torch.no_grad():
        return network(
            input_ids=ids,
            mm_token_type_ids=(ids == network.config.image_token_id).int(),
            use_cache=False,
            pixel_values=group.prompt.pixel_values,
            image_grid_thw=group.prompt.image_grid_thw,
        ).logits


def test_a_checkpoint_is_an_adapter_and_export_merges_it(step, tmp_path, photographs):
    """hf/ holds what changed and nothing else; of the merged folder transformers has the sampler's logits."""
    hf = step.run / "checkpoints" / "step-000001" / "hf"
    assert holds_adapter(hf) and not (hf / "model.safetensors").exists() and not (hf / "config.json").exists()
    told = json.loads((hf / NAMES[0]).read_text())
    assert base_of(hf) == step.base.resolve() and (told["r"], told["lora_alpha"], told["use_rslora"]) == (4, 6, True)
    held = load_file(hf / NAMES[1])
    gathered = lora.gathered(step.learner.policy.model)
    assert {f"{lora.PREFIX}{name}" for name in gathered} == set(held)
    assert all(torch.equal(held[f"{lora.PREFIX}{name}"], tensor) for name, tensor in gathered.items())
    assert export.export_model(step.run, tmp_path / "merged", dtype=None).name == "step-000001"
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", local_files_only=True)
    assert merged.dtype == torch.float32 and not (tmp_path / "merged" / NAMES[0]).exists()
    expected = logits(step.weights.model, step.base, photographs)
    assert (logits(merged, step.base, photographs) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (logits(model.load_model(step.base), step.base, photographs) - expected).abs().max() > 0.01
    whole = dict(model.load_model(hf).named_parameters())
    assert all(torch.equal(whole[name], p) for name, p in merged.named_parameters())
    export.export_model(step.run, tmp_path / "alone", adapter=True)
    assert all((tmp_path / "alone" / name).read_bytes() == (hf / name).read_bytes() for name in NAMES)


@pytest.mark.peer
def test_peft_reads_it_and_merges_the_same(step, tmp_path, photographs):
    """From a checkpoint and from an export; and what PEFT saves, we read."""
    import peft

    hf = step.run / "checkpoints" / "step-000001" / "hf"
    expected = logits(step.weights.model, step.base, photographs)
    theirs = peft.PeftModel.from_pretrained(model.load_model(step.base), hf)
    # float32's noise: of Qwen3.5, whose states are sums over all that went before, up to 1.5e-5 in five seeds
    bound = 5e-5 if step.weights.model.config.model_type == "qwen3_5" else 1e-5
    assert (logits(theirs, step.base, photographs) - expected).abs().max() <= bound * expected.abs().max()
    theirs.save_pretrained(tmp_path / "theirs")
    network = model.skeleton(step.base)
    assert lora.read(tmp_path / "theirs", network) == lora.read(hf, network) == lora.lora_of(step.weights.model)
    merged, mine = dict(theirs.merge_and_unload().named_parameters()), dict(model.load_model(hf).named_parameters())
    assert merged.keys() == mine.keys()
    assert all((mine[name] - p).abs().max() <= 1e-6 for name, p in merged.items())


def test_it_goes_on_bit_for_bit(step, photographs, seed, one_process):
    """Adapters, moments and counters; the base is read from where it was."""
    path = step.run / "checkpoints" / "step-000001"
    state = {name for file in (path / "state").glob("*.safetensors") for name in load_file(file)}
    assert all(lora.is_adapter(name) or ".lora_" in name for name in state)
    other, _ = make_learner(step.base, one_process, lora=BOTH)
    checkpoint.load(path, learner=other)
    groups, rewards = make_groups(step.base, photographs, seed + 1)
    mine, theirs = (each.step(groups, rewards).metrics for each in (step.learner, other))
    assert mine == theirs and mine["grad_norm"] > 0
    after = [lora.gathered(each.policy.model) for each in (step.learner, other)]
    assert all(torch.equal(p, after[1][name]) for name, p in after[0].items())


def settings_of(path, **own):
    return config.check({"model": {"path": str(path), **own}}, data=False)


def test_an_adapters_folder_is_trained_on_and_planned(step, one_process):
    """By its own rank and targets, or the same in words; its tokenizer, sizes and weights are its base's."""
    hf = step.run / "checkpoints" / "step-000001" / "hf"
    for own in ({}, {"lora": BOTH.model_dump()}):
        settings = settings_of(hf, **own)
        policy, weights = build._networks(settings, one_process, hf, torch.float32)
        found = lora.gathered(policy.model)
        assert all(torch.equal(found[name], p) for name, p in lora.gathered(step.learner.policy.model).items())
        assert all(p.requires_grad == lora.is_adapter(name) for name, p in policy.model.named_parameters())
        planned = {line.what: line.gb * 1e9 for line in budget.plan(settings, hf, 1, device="cpu")[0]}
        assert planned["gradients"] == sum(p.numel() for p in found.values()) * 4
    assert model.load_tokenizer(hf).chat_template == model.load_tokenizer(step.base).chat_template
    assert model.remarks(hf, policy.model) == []
    assert locate(str(hf.parent))[1] == [f'model.path="{hf}"'] and locate(str(hf))[1] == [f'model.path="{hf}"']
    for own, said in (
        ({"rank": 8}, "rank: 8, the adapter's is 4; alpha: 16, the adapter's is 6; rslora: False"),
        (BOTH.model_dump() | {"vision": None}, r"names: \d+ linears, the adapter's is \d+ linears"),
    ):
        with pytest.raises(UserError, match=said):
            build._networks(settings_of(hf, lora=own), one_process, hf, torch.float32)


def test_beside_weights_it_is_only_named(step, tmp_path):
    folder = shutil.copytree(step.base, tmp_path / "both")
    for name in NAMES:
        shutil.copy(step.run / "checkpoints" / "step-000001" / "hf" / name, folder)
    assert not holds_adapter(folder) and base_of(folder) == folder
    (said,) = model.remarks(folder, model.skeleton(folder))
    assert "is not used, only the model beside it" in said


def edited(**changes):
    def edit(folder):
        told = json.loads((folder / NAMES[0]).read_text()) | changes
        (folder / NAMES[0]).write_text(json.dumps(told))

    return edit


def tensors(change):
    def edit(folder):
        held = load_file(folder / NAMES[1])
        change(held)
        save_file(held, folder / NAMES[1])

    return edit


def moved(held, old, new):
    held[new] = held.pop(next(key for key in held if key.endswith(old)))


FIRST = "layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "another kind": (edited(peft_type="LOHA"), "peft_type is 'LOHA'; only LORA is supported"),
    "DoRA": (edited(use_dora=True), "asks for use_dora=True, which is not supported: only plain LoRA"),
    "whole modules": (edited(modules_to_save=["lm_head"]), r"asks for modules_to_save=\['lm_head'\]"),
    "ranks of their own": (edited(rank_pattern={"q_proj": 2}), "asks for rank_pattern="),
    "trained biases": (edited(bias="lora_only"), "asks for bias='lora_only'"),
    "another base": (edited(init_lora_weights="pissa"), "asks for init_lora_weights='pissa'"),
    "another rank": (edited(r=5), "r=5 make it"),
    "no rank": (edited(r=None), "r is None"),
    "no base": (edited(base_model_name_or_path=None), "names no base_model_name_or_path"),
    "a base elsewhere": (
        edited(base_model_name_or_path="org/name"),
        "an adapter of 'org/name', which is no folder here",
    ),
    "pickled": (lambda f: (f / NAMES[1]).rename(f / "adapter_model.bin"), "pickled adapters are not read"),
    "half": (
        tensors(lambda held: held.pop(next(k for k in held if k.endswith(FIRST)))),
        "lora_A.weight has shape None",
    ),
    "of a head": (tensors(lambda held: moved(held, FIRST, f"{lora.PREFIX}lm_head.lora_A.weight")), "of lm_head, which"),
    "of what isn't there": (tensors(lambda held: moved(held, FIRST, f"{lora.PREFIX}x.lora_A.weight")), "does not have"),
    "of another method": (tensors(lambda held: moved(held, FIRST, "x.hada_w1_a")), "is not half of a linear's"),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny):
    """An adapter's folder of the tiny model."""
    network = model.skeleton(tiny)
    lora.add(network, lora.chosen(network, Lora(rank=2)), torch.float32)
    folder = tmp_path_factory.mktemp("adapter")
    lora.write(folder, {n: torch.zeros(p.shape) for n, p in lora.adapters(network)}, lora.lora_of(network), tiny)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_adapter_is_refused_in_words(tmp_path, adapter, case):
    edit, said = REFUSED[case]
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    edit(folder)
    with pytest.raises(UserError, match=said) as raised:
        lora.read(folder, model.skeleton(folder))
    assert "\n" not in str(raised.value)


def test_names_of_older_transformers_are_read(tmp_path, adapter, tiny):
    """As a model's own: before version 5 the language model was at model.layers."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")

    def old(held):
        for key in list(held):
            held[key.replace("model.language_model.", "model.")] = held.pop(key)

    tensors(old)(folder)
    network = model.skeleton(tiny)
    assert lora.read(folder, network) == lora.read(adapter, network)
    model.load_model(folder)


def test_an_adapter_of_a_run_that_has_none(tmp_path, tiny, one_process):
    learner, weights = make_learner(tiny, one_process)
    saved(tmp_path / "run" / "checkpoints", learner, weights, tiny, one_process)
    with pytest.raises(UserError, match=r"has no adapter: its run trained the model itself"):
        export.export_model(tmp_path / "run", tmp_path / "out", adapter=True)


@pytest.mark.parametrize(
    "any_tiny, warmed",
    [
        ("qwen2_5_vl", False),
        pytest.param("qwen2_5_vl", True, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", False, marks=pytest.mark.slow),
        ("qwen3_vl", True),
        pytest.param("qwen3_5", False, marks=pytest.mark.slow),
        ("qwen3_5", True),
    ],
    indirect=["any_tiny"],
)
def test_the_reference_is_step_0_on_the_same_base(
    tmp_path, any_tiny, photographs, seed, one_process, warmed, exact_norms
):
    """New adapters are switched off, and nothing is held; warmed-up ones change places with the trained ones. In both
    cases as a policy of its own, merged, has it."""
    loss = OPTIONS.loss.model_copy(update={"kl_coef": 0.3})
    learner, weights = make_learner(any_tiny, one_process, lora=BOTH, loss=loss)
    learner.policy.model.double()
    if warmed:
        put(learner.policy.model, some_values(learner.policy.model))
        weights.refresh(learner.policy)
    saved(tmp_path, learner, weights, any_tiny, one_process, 0)
    hf = tmp_path / "step-000000" / "hf"
    reference = lora.Reference(learner.policy, hf)
    assert (reference.held is not None) == warmed
    learner.set_reference(reference)
    groups, rewards = make_groups(any_tiny, photographs, seed)
    for group in groups:
        group.prompt.pixel_values = group.prompt.pixel_values.double()
    assert learner.step(groups, rewards).metrics["kl"] < 1e-24
    values = some_values(learner.policy.model)
    put(learner.policy.model, values)
    before = lora.gathered(learner.policy.model)
    packed = model.pack(groups, **learner.policy.pack_options)
    found = learner._reference_logprobs(packed)
    learner.set_reference(Policy(model.load_model(hf)))
    assert (learner._reference_logprobs(packed) - found).abs().max() < 1e-4  # merged, it rounds otherwise
    assert all(torch.equal(p, before[name]) for name, p in lora.gathered(learner.policy.model).items())
    assert all(parallel.is_whole(p) for p in learner.policy.parameters())

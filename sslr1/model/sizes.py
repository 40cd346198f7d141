"""Published models by name, for plans without a download: of each config.json what shapes and positions follow from.

Numbers of parameters that follow from these shapes are the published files' (tests/model/test_load.py), but for MiMo-VL
7B, whose config.json is a third party's quotation, and Qwen2.5-VL 72B, which has its technical report's numbers (table
1) and transformers' defaults: their counts were not compared.
"""


def _qwen2_5(hidden, mlp, layers, heads, kv_heads, *, vocabulary=152_064, vision_mlp=3456, tied=False, **own) -> dict:
    vision = dict(depth=32, hidden_size=1280, intermediate_size=vision_mlp, num_heads=16, in_chans=3)
    vision |= dict(patch_size=14, spatial_patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
    vision |= dict(window_size=112, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2, out_hidden_size=hidden)
    text = dict(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads)
    text |= dict(num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied)
    text |= dict(max_position_embeddings=128_000, sliding_window=32_768, use_sliding_window=False)
    text |= dict(rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]})
    return {"model_type": "qwen2_5_vl", "vision_config": vision, **text, **own}


def _qwen3(hidden, mlp, layers, heads, *, large_vision, tied) -> dict:
    vision = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
    if large_vision:
        vision = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])
    vision |= dict(num_heads=16, patch_size=16, spatial_merge_size=2, temporal_patch_size=2)
    vision |= dict(model_type="qwen3_vl", num_position_embeddings=2304, out_hidden_size=hidden)
    text = dict(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads)
    text |= dict(num_key_value_heads=8, head_dim=128, vocab_size=151_936, tie_word_embeddings=tied)
    text |= dict(model_type="qwen3_vl_text", attention_bias=False, max_position_embeddings=262_144, rms_norm_eps=1e-6)
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    text |= dict(rope_theta=5_000_000, rope_scaling=rope)
    return dict(model_type="qwen3_vl", tie_word_embeddings=tied, text_config=text, vision_config=vision)


def _qwen3_5(hidden, mlp, layers, heads, kv_heads, *, tower, value_heads=32, tied=False) -> dict:
    depth, width, vision_mlp, vision_heads = tower
    vision = dict(depth=depth, hidden_size=width, intermediate_size=vision_mlp, num_heads=vision_heads)
    vision |= dict(patch_size=16, spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
    vision |= dict(model_type="qwen3_5", num_position_embeddings=2304, out_hidden_size=hidden)
    text = dict(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads)
    text |= dict(num_key_value_heads=kv_heads, head_dim=256, vocab_size=248_320, tie_word_embeddings=tied)
    text |= dict(linear_num_key_heads=16, linear_num_value_heads=value_heads, linear_conv_kernel_dim=4)
    text |= dict(linear_key_head_dim=128, linear_value_head_dim=128, full_attention_interval=4, eos_token_id=248_044)
    rope = {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default"}
    rope |= {"rope_theta": 10_000_000, "partial_rotary_factor": 0.25}
    text |= dict(model_type="qwen3_5_text", max_position_embeddings=262_144, rms_norm_eps=1e-6, rope_parameters=rope)
    return dict(model_type="qwen3_5", tie_word_embeddings=tied, text_config=text, vision_config=vision)


_SMALL, _MIDDLE, _LARGE = (12, 768, 3072, 12), (24, 1024, 4096, 16), (27, 1152, 4304, 16)

SIZES = {
    "qwen2.5-vl-3b": _qwen2_5(2048, 11_008, 36, 16, 2, vocabulary=151_936, vision_mlp=3420, tied=True),
    "qwen2.5-vl-7b": _qwen2_5(3584, 18_944, 28, 28, 4, vision_mlp=3420),
    "qwen2.5-vl-32b": _qwen2_5(5120, 27_648, 64, 40, 8),
    "qwen2.5-vl-72b": _qwen2_5(8192, 29_568, 80, 64, 8),
    "mimo-vl-7b": _qwen2_5(4096, 11_008, 36, 32, 8, vocabulary=151_680, rms_norm_eps=1e-5, rope_theta=640_000.0),
    "qwen3-vl-2b": _qwen3(2048, 6144, 28, 16, large_vision=False, tied=True),
    "qwen3-vl-4b": _qwen3(2560, 9728, 36, 32, large_vision=False, tied=True),
    "qwen3-vl-8b": _qwen3(4096, 12_288, 36, 32, large_vision=True, tied=False),
    "qwen3-vl-32b": _qwen3(5120, 25_600, 64, 64, large_vision=True, tied=False),
    "qwen3.5-0.8b": _qwen3_5(1024, 3584, 24, 8, 2, tower=_SMALL, value_heads=16, tied=True),
    "qwen3.5-2b": _qwen3_5(2048, 6144, 24, 8, 2, tower=_MIDDLE, value_heads=16, tied=True),
    "qwen3.5-4b": _qwen3_5(2560, 9216, 32, 16, 4, tower=_MIDDLE, tied=True),
    "qwen3.5-9b": _qwen3_5(4096, 12_288, 32, 16, 4, tower=_LARGE),
    "qwen3.5-27b": _qwen3_5(5120, 17_408, 64, 24, 4, tower=_LARGE, value_heads=48),
}

"""The policy: loading, packing, shared-prefix forward, sharding. Any Hugging Face folder of a supported family.

Names load on first use: `sslr1.model.folder` imports without torch and transformers.
"""

from sslr1 import at_first_use

__getattr__, __all__ = at_first_use(
    __name__,
    {
        "folder": "MODEL_TYPES",
        "load": "check_patches freeze load_model load_tokenizer load_weights outline remarks skeleton",
        "packing": "Group Packed Prompt Sample mrope_positions opening pack prompt prompts question_ids split",
        "reference": "load_reference",
        "shared_prefix": "Policy",
        "sizes": "SIZES",
    },
)

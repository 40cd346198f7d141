"""The policy: loading, packing, shared-prefix forward, sharding. Any Hugging Face folder of a supported family."""

from sslr1.model.folder import MODEL_TYPES
from sslr1.model.load import check_patches, freeze, load_model, load_tokenizer, load_weights, remarks, skeleton
from sslr1.model.packing import Group, Packed, Prompt, Sample, mrope_positions, opening, pack, prompt, prompts, split
from sslr1.model.reference import load_reference
from sslr1.model.shared_prefix import Policy

__all__ = [
    "MODEL_TYPES",
    "Group",
    "Packed",
    "Policy",
    "Prompt",
    "Sample",
    "check_patches",
    "freeze",
    "load_model",
    "load_reference",
    "load_tokenizer",
    "load_weights",
    "mrope_positions",
    "opening",
    "pack",
    "prompt",
    "prompts",
    "remarks",
    "skeleton",
    "split",
]

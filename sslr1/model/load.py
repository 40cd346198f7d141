"""Models and tokenizers from ordinary Hugging Face folders. No remote code, safetensors only."""

import copy
import re
from contextlib import contextmanager

from sslr1.errors import UserError
from sslr1.model import lora, parallel
from sslr1.model.folder import (
    ADAPTER,
    base_of,
    chat_template,
    check_config,
    check_folder,
    check_whole,
    holds_adapter,
    opened,
    weight_files,
)
from sslr1.model.gated_delta_net import cast
from sslr1.model.packing import IMAGE_PAD
from sslr1.model.sizes import SIZES

# What checkpoints hold and the models have no place for, which transformers passes over too: tables of old ones that
# are computed now, and the layer that guesses tokens ahead (Qwen3.5's mtp), which nothing here runs
PASSED_OVER = re.compile(r"rotary_emb\.inv_freq$|^mtp\.")
ROWS = 4096  # of a matrix that are compared at once


def load_model(path, dtype=None):
    """The folder's model, whole on the CPU in eval mode, in `dtype` (default float32) but for what stays in float32
    (`gated_delta_net.KEPT`); an adapter is merged into it. Errors: `load_weights`', and `lora.read`'s."""
    import torch

    network = skeleton(path)
    cast(network, dtype or torch.float32)
    if holds_adapter(path):
        lora.add(network, lora.read(path, network), dtype or torch.float32)
    parallel.materialize(network, "cpu")
    network.tie_weights()
    load_weights(network, path)
    if holds_adapter(path):
        lora.load(network, path)
        lora.merge(network)
    return network


def skeleton(path):
    """The folder's model without its weights: parameters on the meta device, buffers (rotary tables) real. In eval
    mode.

    What `load_weights` fills after it has been sharded, so that no rank ever holds more than its share. A head that
    config.json ties to the embeddings, and that is stored beside them with other values, is its own, as in
    transformers. Errors: `check_folder`'s, and settings that transformers refuses.
    """
    folder = check_folder(path)
    config = _config(folder)
    with _told(folder / "config.json"):
        model = _built(config)
        if _own_head(model, folder):
            config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
            model = _built(config)
    model.generation_config = _generation(folder) or model.generation_config
    return model.eval()


def outline(what):
    """A model whose shapes are counted and which is never loaded. what: a folder, which need not hold the weights, nor
    all of them, or a name in SIZES. Errors: `check_config`'s, and settings that transformers refuses."""
    from transformers import AutoConfig

    if what in SIZES:
        return _built(AutoConfig.for_model(**copy.deepcopy(SIZES[what])))
    try:
        return skeleton(what)
    except UserError:
        folder = check_config(what)
        with _told(folder / "config.json"):
            return _built(_config(folder))


def _built(config):
    from transformers import AutoModelForImageTextToText

    with _parameters_on_meta():
        return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype="float32")


def remarks(path, network) -> list[str]:
    """What somebody who gave this folder may not expect of the model that was made of it."""
    folder, out = base_of(path), []
    if (folder / ADAPTER[0]).is_file():
        out.append(
            f"the adapter in {folder} ({ADAPTER[0]}) is not used, only the model beside it; transformers would add it "
            "where peft is installed. Merge it first if it is meant"
        )
    if _config(folder).tie_word_embeddings and not network.config.tie_word_embeddings:
        out.append(
            f"config.json of {folder} ties lm_head to the embeddings, but its files hold both, and they differ: the "
            "head is one of its own, as in transformers"
        )
    return out


def _config(folder):
    from transformers import AutoConfig

    with _told(folder / "config.json"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _generation(folder):
    """The folder's generation config, None if it has no file of its own."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    check_whole(file)
    with _told(file):
        found = GenerationConfig.from_pretrained(folder, local_files_only=True)
        found.validate(strict=True)  # or a checkpoint could not hold it
    stops = found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]
    if not all(stop is None or type(stop) is int for stop in stops):
        raise UserError(f"{file}: eos_token_id can't be {found.eos_token_id!r}: it takes token numbers")
    return found


@contextmanager
def _told(file):
    """What transformers raises of a file of settings, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # it raises all kinds
        raise UserError(f"{file} can't be used: {_line(error)}") from None


def _line(error) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _own_head(model, folder) -> bool:
    """Whether the files hold a tied head of other values than the embeddings'."""
    stored = {name: (file, key) for name, key, _, file in _stored(model, folder)} if model.all_tied_weights_keys else {}
    return any(
        all(name in stored for name in pair) and not _equal(*(stored[name] for name in pair))
        for pair in model.all_tied_weights_keys.items()
    )


def _equal(*places) -> bool:
    """Whether two matrices are, each a (file, key)."""
    with opened(places[0][0]) as one, opened(places[1][0]) as other:
        a, b = (tensors.get_slice(key) for tensors, (_, key) in zip((one, other), places))
        return a.get_shape() == b.get_shape() and all(
            a[start : start + ROWS].float().equal(b[start : start + ROWS].float())
            for start in range(0, a.get_shape()[0], ROWS)
        )


@contextmanager
def _parameters_on_meta():
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    register, initialize = nn.Module.register_parameter, PreTrainedModel.initialize_weights

    def without_storage(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # one that is tied keeps its identity
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = without_storage
    PreTrainedModel.initialize_weights = lambda model: None  # a walk over modules that fills nothing here
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # what is allocated here is never read
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        PreTrainedModel.initialize_weights = initialize
        nn.Module.register_parameter = register


def _stored(model, folder):
    """(parameter's name, or None for a tensor that is none, its key in the file, its shape, the file) of each tensor of
    the folder's weights, from their headers. Of two of one name the later counts. Names that published checkpoints use
    are translated as transformers does."""
    rename, known = renamer(model), {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for file in weight_files(folder):
        with opened(file) as tensors:
            for key in tensors.keys():
                if not PASSED_OVER.search(key):
                    name = rename(key)
                    yield name if name in known else None, key, tensors.get_slice(key).get_shape(), file


def renamer(model):
    """A function that makes of a name that published checkpoints use a parameter's, as transformers does; of what it
    would also convert, ""."""
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renames = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    parameters = model.named_parameters(remove_duplicate=False)
    shapes = {name: torch.empty(p.shape, device="meta") for name, p in parameters}

    def rename(key):
        name, converted = rename_source_key(key, renames, converters, model.base_model_prefix, shapes)
        return name if converted is None else ""

    return rename


def load_weights(model, path) -> None:
    """Fill a model's parameters, sharded or not, from the folder's `weight_files`: of each tensor only this rank's rows
    are read. Adapters are left as they are.

    Raises UserError for a tensor that is missing, unknown or of another shape, before any is read.
    """
    folder = check_folder(path)
    parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not lora.is_adapter(n)}
    once = {id(p): name for name, p in reversed(parameters.items())}  # one name of those that share a parameter
    found = {}
    for name, key, shape, file in _stored(model, folder):
        if name is None:
            raise UserError(f"{file}: tensor {key!r} is not a parameter of a {model.config.model_type} model")
        parameter = parameters[name]
        if list(parameter.shape) != shape:
            raise UserError(f"{file}: {key!r} has shape {shape}, config.json makes it {list(parameter.shape)}")
        if id(parameter) not in found or once[id(parameter)] == name:  # else a head that is tied, and stored as well
            found[id(parameter)] = file, key, parameter
    missing = [name for name, p in parameters.items() if id(p) not in found]
    if missing:
        raise UserError(f"{str(folder)!r} lacks {len(missing)} of the model's tensors, e.g. {missing[0]!r}")
    for file in weight_files(folder):
        with opened(file) as tensors:
            for _, key, parameter in (place for place in found.values() if place[0] == file):
                parallel.fill(parameter, tensors.get_slice(key))


def check_patches(path, spec) -> None:
    """Raises UserError where an image processor's PatchSpec cuts pictures otherwise than the folder's vision tower
    reads them."""
    vision = _config(check_folder(path)).vision_config
    cut = {"patch_size": spec.patch, "spatial_merge_size": spec.merge, "temporal_patch_size": spec.temporal}
    for name, given in cut.items():
        if getattr(vision, name) != given:
            raise UserError(
                f"model.path {str(path)!r}: {name} is {getattr(vision, name)} in config.json, but its image processor "
                f"has {given}: take the original model's preprocessor_config.json"
            )


def freeze(model, part) -> None:
    """Train everything ("none"), or leave the vision tower as it is ("vision"): its gradients and moments are then
    never made. Of a model with adapters they alone are trained."""
    if lora.lora_of(model):
        return lora.freeze(model)
    model.requires_grad_(True)
    if part == "vision":
        model.model.visual.requires_grad_(False)


def load_tokenizer(path):
    """The folder's tokenizer with its chat template, the processor's where that has its own. Raises UserError, also
    where it has not the model's own token for a picture or none that ends an answer."""
    from transformers import AutoTokenizer

    folder = check_folder(path)
    files = [folder / name for name in ("tokenizer.json", "vocab.json", "tokenizer.model") if (folder / name).is_file()]
    if not files:
        raise UserError(
            f"model.path {str(path)!r} has no tokenizer (tokenizer.json): copy the tokenizer files of the original "
            "model into it"
        )
    for file in files:
        check_whole(file)
    config, _ = _config(folder), _generation(folder)  # before the tokenizer, which is blamed for either otherwise
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise all kinds
        raise UserError(
            f"model.path {str(path)!r}: its tokenizer can't be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    tokenizer.chat_template = chat_template(folder) or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise UserError(
            f"model.path {str(path)!r}: the tokenizer has no chat template (chat_template.jinja): copy it from the "
            "original model"
        )
    _check_ids(tokenizer, config, folder)
    return tokenizer


def _check_ids(tokenizer, config, folder) -> None:
    vocabulary, rows = tokenizer.get_vocab(), config.text_config.vocab_size
    mark, own = config.image_token_id, vocabulary.get(IMAGE_PAD)
    advice = f"{folder / 'tokenizer.json'} and {folder / 'config.json'} must be of one model"
    if own is None or tokenizer(IMAGE_PAD, add_special_tokens=False)["input_ids"] != [own]:
        raise UserError(
            f"model.path {str(folder)!r}: its tokenizer has no token {IMAGE_PAD}, which stands for pictures; {advice}"
        )
    if own != mark:
        raise UserError(
            f"model.path {str(folder)!r}: image_token_id is {mark} in its config.json, but its tokenizer's {IMAGE_PAD} "
            f"is {own}; {advice}"
        )
    if max(vocabulary.values()) >= rows:
        raise UserError(
            f"model.path {str(folder)!r}: its tokenizer counts up to {max(vocabulary.values())}, but the model has "
            f"vocab_size {rows}; {advice}"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path {str(folder)!r}: its tokenizer names no eos_token (tokenizer_config.json), so no answer would "
            "end"
        )

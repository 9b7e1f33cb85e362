"""What a checkpoint folder makes of a model: every effective value, the file it comes from, and what has no effect.

Reads the small files and the headers of the weights. What a file gets wrong is told beside what the others say.
"""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llama_fast.config import LlamaConfig
from llama_fast.config_file import CODE_FIELDS
from llama_fast.engine.generation_config import FILE_NAME as GENERATION
from llama_fast.engine.generation_config import GenerationDefaults
from llama_fast.errors import ConfigError, LlamaFastError, brief, shown
from llama_fast.files import read_json_object
from llama_fast.model.checkpoint import load_targets, match_tensors
from llama_fast.model.checkpoint_files import SINGLE_FILE, CheckpointFiles
from llama_fast.model.checkpoint_index import INDEX_FILE
from llama_fast.model.llama import LlamaLM
from llama_fast.model.loading import check_tokenizer, open_checkpoint, pick_device
from llama_fast.model.quantization import stored_scheme
from llama_fast.ops import describe_backend
from llama_fast.tokenizer import LlamaTokenizer
from llama_fast.tokenizer.chat_template import read_chat_templates
from llama_fast.tokenizer.files import MAX_SIDE_BYTES

CONFIG, TOKENIZER, SPECIAL_TOKENS = "config.json", "tokenizer_config.json", "special_tokens_map.json"
DEFAULT = "default"
MACHINE = "this machine"

_ROPE_FIELDS = ("rope_theta", "rope_scaling")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NO_EFFECT = ("pretraining_tp", "kwargs")
# Fields of config.json under their name in LlamaConfig, in the page's order; the others have sections of their own.
_FIELDS = [
    name for name in inspect.signature(LlamaConfig).parameters if name not in (*_ROPE_FIELDS, *_TOKEN_IDS, *_NO_EFFECT)
]
_ROPE_NAMES = {"rope_parameters", "partial_rotary_factor", "original_max_position_embeddings", *_ROPE_FIELDS}
_OTHER_FIELDS = ("model_type", "architectures", "torch_dtype", "dtype", "quantization_config", "compression_config")

# What counts where no file says anything (engine/sampling.py).
_GENERATION_DEFAULTS = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "max_new_tokens": None,
    "max_length": None,
}
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_NO_LIMIT = 10**29  # Hugging Face writes int(1e30) where there is none
_TOKENIZER_FIELDS = {
    *("add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens"),
    *("chat_template", "clean_up_tokenization_spaces", "extra_special_tokens", "legacy", "model_input_names"),
    *("model_max_length", "padding_side", "truncation_side", *_NAMED_TOKENS),
}


@dataclass(frozen=True)
class Entry:
    """One effective value. `origin` is the name of the file that gives it, "default" or "this machine"."""

    value: Any
    origin: str


@dataclass
class ModelInfo:
    """Effective values by section (model, rope, generation, tokenizer, weights, machine) and field.

    Attributes:
        missing: by section, why it is empty although nothing is wrong.
        ignored: what stands in a file and has no effect: "FILE: NAME", and the reason where there is one.
        problems: why the folder cannot be loaded; empty if nothing speaks against it.
    """

    sections: dict[str, dict[str, Entry]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def ignore(self, file: str, name: str, reason: str = "") -> None:
        self.ignored.append(f"{file}: {shown(name)}" + (f" ({reason})" if reason else ""))


def model_info(folder: Path, *, weights: bool = True) -> ModelInfo:
    """Describe a checkpoint folder, as from `find_folder` with the same `weights`. Raises nothing for what is in it."""
    info = ModelInfo()
    content = _given(folder, CONFIG)
    config = _read_config(folder, info)
    _add_model(content, config, info)
    _add_generation(folder, content, config, info)
    _add_tokenizer(folder, config, info)
    _add_weights(folder, weights, config, info)
    device = pick_device("auto")
    info.sections["machine"] = {
        "backend": Entry(describe_backend(device), MACHINE),
        "device": Entry(str(device), MACHINE),
        "threads": Entry(torch.get_num_threads(), MACHINE),
    }
    return info


def _given(folder: Path, name: str) -> dict[str, Any]:
    """A file's content; empty if it is not there or malformed, which what it is for reports."""
    try:
        return read_json_object(folder / name, ConfigError, max_bytes=MAX_SIDE_BYTES)
    except ConfigError:
        return {}


def _read_config(folder: Path, info: ModelInfo) -> LlamaConfig | None:
    config = None
    try:
        config = LlamaConfig.from_pretrained(folder)
        stored_scheme(config, folder)
    except LlamaFastError as error:
        info.problems.append(str(error))
    return config


def _add_model(content: Mapping[str, Any], config: LlamaConfig | None, info: ModelInfo) -> None:
    """Sections model and rope. Of a config.json that is refused the file's own values are told."""
    values = content if config is None else vars(config) | {"model_type": config.model_type}
    model = {
        name: _entry(name, values, content) for name in ("model_type", *_FIELDS, "architectures") if name in values
    }
    dtypes = [name for name in ("dtype", "torch_dtype") if content.get(name) is not None]
    if dtypes:
        model["dtype"] = Entry(str(content[dtypes[0]]).removeprefix("torch."), CONFIG)
    for name in dtypes[1:]:
        if content[name] != content[dtypes[0]]:
            info.ignore(CONFIG, f"{name}={brief(content[name])}", f"{dtypes[0]} counts")
    for name in ("quantization_config", "compression_config"):
        if content.get(name) is not None:
            model[name] = Entry(content[name], CONFIG)
    info.sections["model"] = model

    places = [content, *(content.get(name) for name in ("rope_parameters", "rope_scaling"))]
    named = {name for place in places if isinstance(place, Mapping) for name in place}
    named |= {"rope_type"} if "type" in named else set()
    rope = {name: content[name] for name in sorted(_ROPE_NAMES & content.keys())}
    if config is not None:
        rope = config.rope_parameters
    info.sections["rope"] = {n: Entry(value, CONFIG if n in named else DEFAULT) for n, value in rope.items()}


def _entry(name: str, values: Mapping[str, Any], content: Mapping[str, Any]) -> Entry:
    says = name in content and (content[name] is not None or values[name] is None)
    return Entry(values[name], CONFIG if says else DEFAULT)


def _add_generation(folder: Path, content: Mapping[str, Any], config: LlamaConfig | None, info: ModelInfo) -> None:
    """Section generation, after precedence, and what config.json says in vain."""
    own = os.path.lexists(folder / GENERATION)
    origin = GENERATION if own else CONFIG
    given = _given(folder, origin)
    try:
        defaults = GenerationDefaults.from_folder(folder)
        given = defaults.to_dict()
        if config is not None:
            defaults.check_vocab(config.vocab_size)
    except LlamaFastError as error:
        if own or config is not None:  # else config.json's problem is told already
            info.problems.append(str(error))
    section: dict[str, Entry] = {}
    for name, default in _GENERATION_DEFAULTS.items():
        section[name] = Entry(default, DEFAULT) if given.get(name) is None else Entry(given[name], origin)
    for name in _TOKEN_IDS:
        if own and given.get(name) is not None:
            section[name] = Entry(given[name], GENERATION)
            if content.get(name) not in (None, given[name]):
                info.ignore(CONFIG, f"{name}={brief(content[name])}", f"{GENERATION} counts")
        elif config is not None or name in content:
            section[name] = _entry(name, content if config is None else vars(config), content)
    info.sections["generation"] = section

    used = {name for name, entry in section.items() if entry.origin == CONFIG}
    used |= {*info.sections["model"], *_OTHER_FIELDS, *_ROPE_NAMES, *_TOKEN_IDS}
    for name in sorted(content.keys() - used):
        if name in CODE_FIELDS:
            info.ignore(CONFIG, name, "no code of a checkpoint is ever run")
        elif config is not None:  # what a refused file's other keys would do is not known
            info.ignore(CONFIG, name)
    for name in sorted(given.keys() - section.keys()) if own else ():
        info.ignore(GENERATION, name)


def _add_tokenizer(folder: Path, config: LlamaConfig | None, info: ModelInfo) -> None:
    files = [name for name in ("tokenizer.json", "tokenizer.model") if os.path.lexists(folder / name)]
    section = info.sections["tokenizer"] = {}
    if not files:
        info.missing["tokenizer"] = "neither tokenizer.json nor tokenizer.model is here"
        return
    file, settings = files[0], _given(folder, TOKENIZER)
    for name in files[1:]:
        info.ignored.append(f"{name} ({file} counts)")
    try:
        tokenizer = LlamaTokenizer.from_pretrained(folder)
        templates = read_chat_templates(folder, settings)
    except LlamaFastError as error:
        info.problems.append(str(error))
        return
    if config is not None:
        try:
            check_tokenizer(tokenizer, config, folder)
        except LlamaFastError as error:
            info.problems.append(str(error))

    byte_level = file == "tokenizer.json" and b'"ByteLevel"' in (folder / file).read_bytes()
    kind = "byte-level BPE (as Llama 3)" if byte_level else "BPE as of SentencePiece (as Llama 1 and 2)"
    section["kind"] = Entry(kind, file)
    section["tokens"] = Entry(len(tokenizer), file)
    section["tokens_without_added"] = Entry(tokenizer.vocab_size, file)
    # special_tokens_map.json is read only beside a tokenizer_config.json without added_tokens_decoder, and wins there.
    special = _given(folder, SPECIAL_TOKENS)
    if special and "added_tokens_decoder" in settings:
        info.ignored.append(f"{SPECIAL_TOKENS} ({TOKENIZER} counts: it has added_tokens_decoder)")
        special = {}
    for name in _NAMED_TOKENS:
        sources = {SPECIAL_TOKENS: special, TOKENIZER: settings}
        origins = [source for source, names in sources.items() if names.get(name) is not None]
        value = getattr(tokenizer, name)
        origin = DEFAULT if value is None else (*origins, file)[0]
        section[name] = Entry(None if value is None else str(value), origin)
        section[f"{name}_id"] = Entry(getattr(tokenizer, f"{name}_id"), origin)
        if len(origins) == 2 and special[name] != settings[name]:
            info.ignore(TOKENIZER, name, f"{SPECIAL_TOKENS} counts")
    length = tokenizer.model_max_length if tokenizer.model_max_length < _NO_LIMIT else None
    section["model_max_length"] = Entry(length, DEFAULT if length is None else TOKENIZER)
    in_files = any(folder.glob("*.jinja")) or any(folder.glob("*/*.jinja"))
    origin = "*.jinja" if in_files else TOKENIZER if templates else DEFAULT
    section["chat_templates"] = Entry(sorted(templates), origin)
    if in_files and settings.get("chat_template") is not None:
        info.ignore(TOKENIZER, "chat_template", "*.jinja counts")
    for name in sorted(settings.keys() - _TOKENIZER_FIELDS):
        info.ignore(TOKENIZER, name)


def _add_weights(folder: Path, expected: bool, config: LlamaConfig | None, info: ModelInfo) -> None:
    info.sections["weights"] = {}
    try:
        files = CheckpointFiles.open(folder)
    except LlamaFastError as error:
        if not expected:
            info.missing["weights"] = "not downloaded"
        elif any(_files(folder, ("*.safetensors", INDEX_FILE, "*.bin", "*.pt", "*.pth"))):
            info.problems.append(str(error))
        else:
            info.missing["weights"] = f"neither {SINGLE_FILE} nor {INDEX_FILE} is here"
        return
    origin = SINGLE_FILE if files.paths[0].name == SINGLE_FILE else INDEX_FILE
    dtypes = Counter(str(dtype).removeprefix("torch.") for dtype in files.dtypes.values())
    info.sections["weights"] = {
        "files": Entry([path.name for path in files.paths], origin),
        "tensors": Entry(len(files.shapes), origin),
        "parameters": Entry(sum(torch.Size(shape).numel() for shape in files.shapes.values()), origin),
        "tensors_by_dtype": Entry(dict(dtypes), origin),
        "bytes": Entry(files.total_bytes, origin),
    }
    if config is not None and not info.problems:
        try:
            checkpoint = open_checkpoint(folder, dtype=None, device="cpu")
            targets, _ = load_targets(checkpoint.empty_model(LlamaLM), files, checkpoint.int4)
            match_tensors(targets, files)
        except LlamaFastError as error:
            info.problems.append(str(error))


def _files(folder: Path, patterns: Iterable[str]) -> Iterable[Path]:
    return (path for pattern in patterns for path in folder.glob(pattern))

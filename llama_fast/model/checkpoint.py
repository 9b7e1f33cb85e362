"""Checkpoints: from a folder of safetensors to a module's parameters, and back.

Either nothing is copied on the CPU: parameters are views of the mapped files (see checkpoint_files.py), so an optimizer
step or any in-place write changes the parameter and never the file. Or all is read into memory, and nothing of the
files is used afterwards. The bits are the same.

Names   those of transformers, with or without the base model's prefix `model.`, whichever the module has.
Dtypes  F64, F32, F16 and BF16 weights, and 4-bit integers in the formats of int4_formats.py.
Ties    names that are one parameter in the module may be stored under any of them; stored twice they must be equal.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llama_fast.errors import CheckpointMismatchError, ConfigError, OutOfMemoryError, brief, listed, shown
from llama_fast.model.checkpoint_files import CheckpointFiles
from llama_fast.model.checkpoint_save import save_weights
from llama_fast.model.int4_formats import Int4Format
from llama_fast.model.int4_modules import int4_linears
from llama_fast.model.progress import ProgressBar
from llama_fast.model.quantization import Int4Scheme, Layout
from llama_fast.ops.int4 import INT4_SUFFIXES, Int4Linear

__all__ = ["CheckpointFiles", "LoadReport", "load_weights", "save_weights"]

LOAD_MODES = ("mmap", "copy")
_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HEAD = "lm_head.weight"
_CHUNK_BYTES = 1 << 24

# Tensors that only the quantized formats (GPTQ, AWQ, compressed-tensors, fp8, bitsandbytes) store.
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|input_scale|SCB"
    r"|weight[._](packed|scale|scale_inv|shape|zero_point|g_idx|absmax|quant_map|quant_state.*))$"
)

_FUSED = re.compile(r"\.(qkv_proj|query_key_value|c_attn|W_?qkv|W_?pack|gate_up_proj)\.", re.IGNORECASE)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did: the files read, and every tensor that was not taken exactly as stored."""

    paths: tuple[Path, ...]
    weight_bytes: int  # bytes of the checkpoint's tensors, as stored
    dtype: torch.dtype  # of every loaded parameter
    cast: tuple[str, ...]  # names, as stored, whose dtype differed
    ignored: tuple[str, ...]  # names, as stored, that the module has no use for


def load_weights(
    module: nn.Module,
    source: Path | CheckpointFiles,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    load: str = "mmap",
    int4: Int4Scheme | None = None,
) -> LoadReport:
    """Replace every parameter of `module`, usually on the meta device, by the checkpoint's.

    They get requires_grad=False; parameters that were one object (a tied head) are one object again. The module is
    unchanged when an error is raised.

    Args:
        module: has transformers' parameter names, with or without the prefix `model.`.
        source: a folder, as from `find_folder`, or its files opened earlier, which must be unchanged since.
        dtype: of the parameters; None keeps the files' dtype. If that is mixed, all are cast to the dtype of the
            module's first parameter (the embedding), as transformers does for "auto" without a dtype in the config.
        device: tensors are uploaded to it one by one.
        load: "mmap" makes CPU parameters that are not cast views of the mapped files; "copy" reads all into memory.
            Tensors that are read here, with "copy" or for a cast, are searched for NaN and infinity: a warning names
            them. Mapped ones are not read before they are used; `verify_checkpoint` searches those.
        int4: how the files hold the module's `Int4Linear`s (see int4_modules.py). Each is read by itself: beside the
            result there is never more than one projection in memory.

    Ignored are stored `rotary_emb.inv_freq` (old checkpoints; it follows from the config) and, when the module has no
    head, `lm_head.weight`. Shapes must be equal: an embedding of another vocab_size is an error, never resized.

    Raises:
        CheckpointMismatchError: a tensor is missing, unexpected, misshapen or not a float, or tied ones differ.
        CheckpointPathError, CheckpointIOError, CheckpointFormatError, UnsupportedError: see `CheckpointFiles.open`;
            CheckpointIOError also when a file changes before all of it is loaded.
        ConfigError: `load` is neither; or the int4 weights are not as config.json says.
        UnsupportedError: a variant of an int4 format.
        OutOfMemoryError: the parameters do not fit on `device`, or their cast or copy not in the host's memory.
    """
    if load not in LOAD_MODES:
        raise ConfigError(f"load={load!r} is not a way to load; use {' or '.join(map(repr, LOAD_MODES))}")
    device = torch.device(device)
    files = source if isinstance(source, CheckpointFiles) else CheckpointFiles.open(source)
    targets, formats = load_targets(module, files, int4)
    sources, ignored = match_tensors(targets, files)

    floats = [name for target, name in sources.items() if targets[target].is_floating_point()]
    stored = [files.dtypes[name] for name in floats]
    dtype = dtype or stored[0]
    cast = tuple(dict.fromkeys(name for name in floats if files.dtypes[name] != dtype))
    if cast and len(set(stored)) > 1:
        _log.warning("%s: mixed dtypes; %d tensors are cast to %s: %s", files.folder, len(cast), dtype, listed(cast))

    mapped = load == "mmap" and not cast and device.type == "cpu" and all(form.kept for _, form in formats.values())
    loaded: dict[str, Tensor] = {}
    shared: dict[int, Tensor] = {}
    non_finite: list[str] = []
    parameters = module.state_dict(keep_vars=True)
    # An int4 projection's parameters may have the names of stored tensors, and are made of them in one piece.
    taken = {f"{name}.{suffix}" for name in formats for suffix in INT4_SUFFIXES}
    plain = {name: parameter for name, parameter in parameters.items() if name in sources and name not in taken}
    steps = [*plain, *formats]
    for name in ProgressBar(steps, _title(int4), unit="tensor", disable=mapped or None):
        try:
            if name in formats:
                for suffix, value in _read_int4(name, *formats[name], files, sources, dtype, device, load).items():
                    loaded[f"{name}.{suffix}"] = nn.Parameter(value, requires_grad=False)
                continue
            if id(plain[name]) not in shared:
                tensor = (files.copy if load == "copy" else files.tensor)(sources[name]).to(dtype)
                if (load == "copy" or files.dtypes[sources[name]] != dtype) and not is_finite(tensor):
                    non_finite.append(sources[name])
                shared[id(plain[name])] = nn.Parameter(tensor.to(device), requires_grad=False)
            loaded[name] = shared[id(plain[name])]
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            reason = str(error).partition("\n")[0]
            raise OutOfMemoryError(
                f"the weights need {_num_bytes(parameters.values(), dtype):,} bytes on {device}; memory ran out at "
                f"{name}: {reason}; free memory there, or use a smaller dtype or model"
            ) from error
    files.check_unchanged()
    if non_finite:
        _log.warning("%s: %d tensors hold NaN or infinity: %s", files.folder, len(non_finite), listed(non_finite))
    module.requires_grad_(False)  # load_state_dict copies the flag from the parameter it replaces
    module.load_state_dict(loaded, strict=True, assign=True)
    return LoadReport(files.paths, files.total_bytes, dtype, cast, ignored)


Formats = dict[str, tuple[Int4Linear, Int4Format]]


def load_targets(
    module: nn.Module, files: CheckpointFiles, int4: Int4Scheme | None
) -> tuple[dict[str, Tensor], Formats]:
    """What the files must hold: each parameter by its name, and what stands for an int4 projection.

    Returns:
        Name -> a tensor of that shape and kind of dtype, one object for names that are tied; and the projections with
        their formats, by name.
    """
    targets: dict[str, Tensor] = module.state_dict(keep_vars=True)
    formats: Formats = {}
    if int4 is None:
        return targets, formats
    held: dict[str, dict[str, torch.dtype]] = {}
    for name, dtype in files.dtypes.items():
        owner, _, suffix = _base_name(name).rpartition(".")
        held.setdefault(owner, {})[suffix] = dtype
    for name, linear in int4_linears(module):
        for suffix in INT4_SUFFIXES:
            targets.pop(f"{name}.{suffix}", None)
        form = int4.format_of(Layout(linear.group_size, linear.weight_zero_point is None))
        found = held.get(_base_name(name), {})
        for suffix, target in form.tensors(linear, found).items():
            if suffix not in form.optional or suffix in found:
                targets.setdefault(f"{name}.{suffix}", target)
        formats[name] = linear, form
    config = getattr(module, "config", None)
    if int4.rounds and _HEAD.removesuffix(".weight") in formats and config and config.tie_word_embeddings:
        # The head is made of the embedding, which stays as it is.
        targets[_HEAD] = targets["model.embed_tokens.weight"]
    return targets, formats


def _read_int4(
    name: str,
    linear: Int4Linear,
    form: Int4Format,
    files: CheckpointFiles,
    sources: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
    load: str,
) -> dict[str, Tensor]:
    """The parameters of one int4 projection, but its bias."""
    read = files.tensor if form.kept and load == "mmap" else files.copy
    suffixes = [suffix for suffix in form.tensors(linear, {}) if f"{name}.{suffix}" in sources]
    stored = {suffix: read(sources[f"{name}.{suffix}"]).to(device) for suffix in suffixes}
    words, scales, zeros = form.read(f"{files.folder}: {name}", stored, linear, dtype)
    found = {"weight_packed": words, "weight_scale": scales}
    return found if zeros is None else {**found, "weight_zero_point": zeros}


def _title(int4: Int4Scheme | None) -> str:
    return "quantizing" if int4 is not None and int4.rounds else "loading weights"


def _num_bytes(parameters: Iterable[Tensor], dtype: torch.dtype) -> int:
    return sum(p.numel() * (dtype if p.is_floating_point() else p.dtype).itemsize for p in parameters)


def is_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds no NaN and no infinity; its extremes show both, in one pass at memory bandwidth."""
    return tensor.numel() == 0 or all(extreme.isfinite().item() for extreme in tensor.aminmax())


def match_tensors(targets: Mapping[str, Tensor], files: CheckpointFiles) -> tuple[dict[str, str], tuple[str, ...]]:
    """Which stored tensor each parameter of `targets` takes, and the stored names that are ignored.

    Names are compared without the prefix `model.`. Names of one parameter object (ties) share one stored tensor; only
    one that is stored twice is read, to compare the two.

    Raises:
        CheckpointMismatchError: as `load_weights`.
    """
    stored: dict[str, str] = {}
    ignored: list[str] = []
    has_head = any(name.startswith("lm_head.") for name in targets)
    twice: list[str] = []
    for name in files.shapes:
        if name.endswith("rotary_emb.inv_freq") or (name == _HEAD and not has_head):
            ignored.append(name)
        elif stored.setdefault(_base_name(name), name) != name:
            twice.append(name)

    names_of: dict[int, list[str]] = {}  # parameter object -> its names in the module; more than one where tied
    for name, target in targets.items():
        names_of.setdefault(id(target), []).append(name)

    sources: dict[str, str] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    transposed = 0
    tied: list[tuple[str, str]] = []
    for names in names_of.values():
        found = [stored.pop(_base_name(name)) for name in names if _base_name(name) in stored]
        if not found:
            missing.append(names[0])
            continue
        expected = tuple(targets[names[0]].shape)
        for name in found:
            if files.shapes[name] != expected:
                misshapen.append(f"{name} {brief(list(files.shapes[name]))}, expected {list(expected)}")
                transposed += len(expected) == 2 and files.shapes[name] == expected[::-1]
            elif problem := _dtype_problem(files.dtypes[name], targets[names[0]].dtype):
                misshapen.append(f"{name} has dtype {files.dtypes[name]}, expected {problem}")
        sources.update(dict.fromkeys(names, found[0]))
        tied += [(found[0], other) for other in found[1:]]

    unexpected = twice + list(stored.values())
    problems = [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape or dtype", misshapen))
        if names
    ]
    if problems:
        hints = _hints(missing, unexpected, misshapen)
        if transposed:
            hints.append(f"{transposed} are transposed: a weight is stored as [out_features, in_features]")
        raise CheckpointMismatchError(f"{files.folder} does not fit the model: {'; '.join([*problems, *hints])}")
    for name, other in tied:
        if not _bitwise_equal(files, name, other):
            raise CheckpointMismatchError(
                f"{files.folder}: the model ties {shown(other)} to {shown(name)}, but the checkpoint stores "
                "different values for them; set tie_word_embeddings to false in config.json if both are wanted"
            )
    return sources, tuple(ignored)


def _dtype_problem(stored: torch.dtype, target: torch.dtype) -> str:
    """What was expected instead of `stored`; empty if it fits."""
    if target.is_floating_point:
        return "" if stored in _WEIGHT_DTYPES else "a float of 16 bits or more"
    return "" if stored == target else str(target)


def _base_name(name: str) -> str:
    return name.removeprefix("model.")


def _bitwise_equal(files: CheckpointFiles, name: str, other: str) -> bool:
    # As bytes, so that NaN equals NaN and 0.0 differs from -0.0.
    return files.dtypes[name] == files.dtypes[other] and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(files.chunks(name, _CHUNK_BYTES), files.chunks(other, _CHUNK_BYTES), strict=True)
    )


def _hints(missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]) -> list[str]:
    hints = []
    if missing == [_HEAD]:
        hints.append("set tie_word_embeddings to true in config.json if the head is the embedding")
    if any(_QUANTIZED.search(name) for name in (*unexpected, *misshapen)):
        hints.append(
            "these are quantized weights that config.json's quantization_config does not tell of, or tells otherwise; "
            "use the config.json that came with them"
        )
    if any(_FUSED.search(name) for name in unexpected):
        hints.append("projections are stored fused; split them into q_proj, k_proj, v_proj and gate_proj, up_proj")
    wanted = {_base_name(name) for name in missing}
    heads_tails = [name.partition(".")[::2] for name in unexpected]
    prefixes = {f"{head}." for head, tail in heads_tails if _base_name(tail) in wanted}
    if prefixes:
        hints.append(f"the names have the prefix {listed(sorted(prefixes))} of another program; save them without it")
    return hints

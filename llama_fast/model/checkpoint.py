"""Checkpoints: from a folder of safetensors to a module's parameters, and back.

Either nothing is copied on the CPU: parameters are views of the mapped files (see checkpoint_files.py), so an optimizer
step or any in-place write changes the parameter and never the file. Or all is read into memory, and nothing of the
files is used afterwards. The bits are the same.

Names   those of transformers, with or without the base model's prefix `model.`, whichever the module has.
Dtypes  F64, F32, F16 and BF16 weights. Quantized checkpoints are refused.
Ties    names that are one parameter in the module may be stored under any of them; stored twice they must be equal.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llama_fast.errors import CheckpointMismatchError, ConfigError, OutOfMemoryError, brief, listed, shown
from llama_fast.model.checkpoint_files import CheckpointFiles
from llama_fast.model.checkpoint_save import save_weights
from llama_fast.model.progress import ProgressBar

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

    Ignored are stored `rotary_emb.inv_freq` (old checkpoints; it follows from the config) and, when the module has no
    head, `lm_head.weight`. Shapes must be equal: an embedding of another vocab_size is an error, never resized.

    Raises:
        CheckpointMismatchError: a tensor is missing, unexpected, misshapen or not a float, or tied ones differ.
        CheckpointPathError, CheckpointIOError, CheckpointFormatError, UnsupportedError: see `CheckpointFiles.open`;
            CheckpointIOError also when a file changes before all of it is loaded.
        ConfigError: `load` is neither.
        OutOfMemoryError: the parameters do not fit on `device`, or their cast or copy not in the host's memory.
    """
    if load not in LOAD_MODES:
        raise ConfigError(f"load={load!r} is not a way to load; use {' or '.join(map(repr, LOAD_MODES))}")
    device = torch.device(device)
    files = source if isinstance(source, CheckpointFiles) else CheckpointFiles.open(source)
    targets: dict[str, Tensor] = module.state_dict(keep_vars=True)
    sources, ignored = match_tensors(targets, files)

    stored = [files.dtypes[name] for name in sources.values()]
    dtype = dtype or stored[0]
    cast = tuple(dict.fromkeys(name for name in sources.values() if files.dtypes[name] != dtype))
    if cast and len(set(stored)) > 1:
        _log.warning("%s: mixed dtypes; %d tensors are cast to %s: %s", files.folder, len(cast), dtype, listed(cast))

    read = files.copy if load == "copy" else files.tensor
    mapped = load == "mmap" and not cast and device.type == "cpu"
    loaded: dict[int, Tensor] = {}
    non_finite: list[str] = []
    for name, target in ProgressBar(targets.items(), "loading weights", unit="tensor", disable=mapped or None):
        if id(target) in loaded:
            continue
        try:
            tensor = read(sources[name]).to(dtype)
            if (load == "copy" or files.dtypes[sources[name]] != dtype) and not is_finite(tensor):
                non_finite.append(sources[name])
            loaded[id(target)] = nn.Parameter(tensor.to(device), requires_grad=False)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            needed = sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize
            reason = str(error).partition("\n")[0]
            raise OutOfMemoryError(
                f"the weights need {needed:,} bytes on {device}; memory ran out at {name}: {reason}; "
                "free memory there, or use a smaller dtype or model"
            ) from error
    files.check_unchanged()
    if non_finite:
        _log.warning("%s: %d tensors hold NaN or infinity: %s", files.folder, len(non_finite), listed(non_finite))
    module.requires_grad_(False)  # load_state_dict copies the flag from the parameter it replaces
    module.load_state_dict({name: loaded[id(target)] for name, target in targets.items()}, strict=True, assign=True)
    return LoadReport(files.paths, files.total_bytes, dtype, cast, ignored)


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
    twice: list[str] = []
    for name in files.shapes:
        if name.endswith("rotary_emb.inv_freq") or (name == _HEAD and _HEAD not in targets):
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
            elif files.dtypes[name] not in _WEIGHT_DTYPES:
                misshapen.append(f"{name} has dtype {files.dtypes[name]}, expected a float of 16 bits or more")
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
        hints.append("this is a quantized checkpoint, which is not supported; use the unquantized one")
    if any(_FUSED.search(name) for name in unexpected):
        hints.append("projections are stored fused; split them into q_proj, k_proj, v_proj and gate_proj, up_proj")
    wanted = {_base_name(name) for name in missing}
    heads_tails = [name.partition(".")[::2] for name in unexpected]
    prefixes = {f"{head}." for head, tail in heads_tails if _base_name(tail) in wanted}
    if prefixes:
        hints.append(f"the names have the prefix {listed(sorted(prefixes))} of another program; save them without it")
    return hints

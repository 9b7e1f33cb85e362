"""GGUF files for llama.cpp, from a Llama checkpoint in bf16: the same weights in the order that it wants.

    python bench/gguf_file.py convert CHECKPOINT_FOLDER bf16.gguf
    python bench/gguf_file.py quantize bf16.gguf q8_0.gguf --type q8_0

For the interpreter of the peer: needs gguf and numpy to convert and llama_cpp to quantize, but no torch. Matrices keep
their bf16 bits, norms become fp32. The file has no tokenizer: prompts are token ids.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_QUANTIZED = {"q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}


def bf16_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of a safetensors file, the bits of each bf16 as uint16; mapped, not read.

    numpy has no bf16, so safetensors cannot hand such tensors out without torch.
    """
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{path}: {name} is {entry['dtype']}; only BF16 is converted")
        offset = 8 + header_bytes + entry["data_offsets"][0]
        yield name, np.memmap(path, np.uint16, "r", offset, tuple(entry["shape"]))


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a q or k projection as llama.cpp rotates them.

    Hugging Face rotates row i of a head with row i + head_dim / 2; llama.cpp rotates row 2i with row 2i + 1.
    """
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def widened(bits: np.ndarray) -> np.ndarray:
    """fp32 of the same values: bf16 is its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def convert(folder: Path, path: Path) -> None:
    """Write `folder`'s model.safetensors as a bf16 GGUF file, which is whole once it has its name."""
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    partial = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(partial, "llama")
    _write_config(writer, config)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj.weight": config["num_attention_heads"], "k_proj.weight": config["num_key_value_heads"]}
    for name, bits in bf16_tensors(folder / "model.safetensors"):
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        if gguf_name is None:
            raise ValueError(f"{name} has no name in GGUF")
        if bits.ndim == 1:
            writer.add_tensor(gguf_name, widened(bits))
            continue
        num_heads = heads.get(".".join(name.split(".")[-2:]))
        rows = np.ascontiguousarray(bits if num_heads is None else interleaved(bits, num_heads))
        writer.add_tensor(gguf_name, rows.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


def _write_config(writer: Any, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or config
    if (config.get("rope_scaling") or rope).get("rope_type", "default") != "default":
        raise ValueError("RoPE with scaling is not converted")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def quantize(source: Path, path: Path, kind: str) -> None:
    """Write a bf16 GGUF file anew with llama.cpp's own quantization, "q8_0" or "q4_0"."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, _QUANTIZED[kind])
    partial = path.with_name(path.name + ".tmp")
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(partial), params)
    if status:
        raise RuntimeError(f"llama_model_quantize ended with status {status}")
    os.replace(partial, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("convert", "quantize"))
    parser.add_argument("source", type=Path, help="checkpoint folder, or the bf16 file to quantize")
    parser.add_argument("path", type=Path, help="the file to write")
    parser.add_argument("--type", choices=sorted(_QUANTIZED), default="q8_0", help="default: %(default)s")
    args = parser.parse_args()
    if args.action == "convert":
        convert(args.source, args.path)
    else:
        quantize(args.source, args.path, args.type)
    return 0


if __name__ == "__main__":
    sys.exit(main())

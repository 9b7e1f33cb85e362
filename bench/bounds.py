"""Bounds that nothing in a run beats."""

from typing import Any

# A case whose inputs together are this large reads them from memory and not from a cache.
_FROM_MEMORY = 2**29
# What PyTorch does beside these kernels moves as many bytes.
_LIKE_PYTORCH = ("rms_norm", "silu_mul", "linear", "attention")


def settle(result: dict[str, Any]) -> dict[str, Any]:
    """Raise the two rates to what the run itself reached, and make bounds and shares of them anew.

    A copy is not the fastest way to move bytes: a kernel that only reads can be quicker, and PyTorch's or ours was.

    Args:
        result: of bench_kernels: `bytes_per_s`, `flops_per_s` and `rows`.
    """
    bandwidth, flops = result["bytes_per_s"], result["flops_per_s"]
    for row in result["rows"]:
        times = [row["us"]["median"]] if "us" in row else []
        if row["kernel"] in _LIKE_PYTORCH and row.get("torch_us"):
            times.append(row["torch_us"])
        for us in times:
            if row["num_bytes"] * row["sets"] >= _FROM_MEMORY:
                bandwidth = max(bandwidth, row["num_bytes"] / (1e-6 * us))
            flops = max(flops, row["flops"] / (1e-6 * us))
    rows = []
    for row in result["rows"]:
        bytes_us, flops_us = 1e6 * row["num_bytes"] / bandwidth, 1e6 * row["flops"] / flops
        row = {**row, "memory_bound": bytes_us >= flops_us, "bound_us": max(bytes_us, flops_us)}
        if "us" in row:
            row["share"] = row["bound_us"] / row["us"]["median"]
        rows.append(row)
    alone = {"copy_bytes_per_s": result["bytes_per_s"], "matmul_flops_per_s": result["flops_per_s"]}
    return {**result, "bytes_per_s": bandwidth, "flops_per_s": flops, **alone, "rows": rows}

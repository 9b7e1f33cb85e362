"""Bounds that nothing in a run beats."""

import pytest


@pytest.fixture
def settle(bench):
    return bench.settle


def _row(kernel, num_bytes, flops, us, torch_us=None, sets=1):
    return {
        "kernel": kernel,
        "num_bytes": num_bytes,
        "flops": flops,
        "sets": sets,
        "us": {"median": us},
        "torch_us": torch_us,
        "bound_us": 0.0,
        "share": 0.0,
        "memory_bound": True,
    }


def _settled(settle, *rows, bandwidth=1e12, flops=1e14):
    return settle({"bytes_per_s": bandwidth, "flops_per_s": flops, "rows": list(rows)})


def test_what_no_row_beats_stays(settle):
    result = _settled(settle, _row("linear", 2**30, 10**9, 2000.0))
    assert result["bytes_per_s"] == result["copy_bytes_per_s"] == 1e12
    (row,) = result["rows"]
    assert row["bound_us"] == 2**30 / 1e6 and row["share"] == row["bound_us"] / 2000 and row["memory_bound"]


def test_a_rate_that_a_kernel_or_pytorch_beats_is_raised_for_all_rows(settle):
    quick, slow = _row("attention", 2**30, 0, 900.0, torch_us=500.0), _row("silu_mul", 2**20, 0, 10.0)
    result = _settled(settle, quick, slow)
    assert result["bytes_per_s"] == 2**30 / 500e-6 and result["copy_bytes_per_s"] == 1e12
    assert [row["share"] for row in result["rows"]] == [500 / 900, 2**20 / (2**30 / 500) / 10]
    compute = _settled(settle, _row("linear", 1, 10**12, 5000.0))
    assert compute["flops_per_s"] == 10**12 / 5000e-6 and compute["rows"][0]["share"] == 1


def test_what_a_cache_serves_or_pytorch_does_otherwise_raises_nothing(settle):
    cached = _row("linear", 2**20, 0, 0.5)
    other_work = _row("sample", 2**30, 0, 2000.0, torch_us=1.0)
    assert _settled(settle, cached, other_work)["bytes_per_s"] == 1e12
    # The same bytes from memory: enough sets of inputs that no cache holds them.
    assert _settled(settle, {**cached, "sets": 512})["bytes_per_s"] == 2**20 / 0.5e-6


def test_a_refused_row_has_a_bound_and_no_share(settle):
    refused = {"kernel": "linear", "num_bytes": 2**30, "flops": 0, "refused": "wrong", "bound_us": 0.0}
    (row,) = _settled(settle, refused)["rows"]
    assert row["bound_us"] == 2**30 / 1e6 and "share" not in row

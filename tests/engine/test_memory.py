"""How the cache is sized; page bytes are counted by hand here."""

import logging

import pytest
import torch

from llama_fast.engine import memory
from llama_fast.engine.engine import Engine
from llama_fast.engine.memory import cache_size
from llama_fast.errors import OutOfMemoryError
from llama_fast.ops import device_memory
from llama_fast.ops.device_memory import free_bytes
from tests.tiny import make_model

PAGE = 8
# 2 layers x (K, V) x 2 KV heads x head_dim 16 x fp32, a page of 8 slots.
PAGE_BYTES = 2 * 2 * 2 * 16 * 4 * PAGE


@pytest.fixture(scope="module")
def tiny():
    return make_model()  # 256 positions: 32 pages a sequence


def _free(monkeypatch, model, pages):
    """So much memory beside the weights that half of it holds `pages`."""
    weights = sum(p.numel() * 4 for p in model.parameters())

    def free_bytes(device, weight_bytes):
        assert weight_bytes == weights
        return 2 * pages * PAGE_BYTES

    monkeypatch.setattr(memory, "free_bytes", free_bytes)


def test_with_room_the_pool_holds_max_batch_sequences(tiny, monkeypatch):
    _free(monkeypatch, tiny, 1000)
    assert cache_size(tiny, 5, None, None, PAGE) == (256, 5 * 32)
    assert cache_size(tiny, 5, 20, None, PAGE) == (20, 5 * 3)


def test_with_less_room_fewer_sequences_fit(tiny, monkeypatch, caplog):
    _free(monkeypatch, tiny, 70)
    assert cache_size(tiny, 5, None, None, PAGE) == (256, 70)
    assert not caplog.records


def test_with_too_little_room_sequences_are_shorter_and_that_is_said(tiny, monkeypatch, caplog):
    _free(monkeypatch, tiny, 10)
    with caplog.at_level(logging.WARNING):
        assert cache_size(tiny, 5, None, None, PAGE) == (80, 10)
    assert "limited to 80 tokens: the model is made for 256" in caplog.text


def test_L01_a_length_that_was_asked_for_must_fit(tiny, monkeypatch):
    _free(monkeypatch, tiny, 10)
    message = f"max_seq_len=100 needs {13 * PAGE_BYTES} bytes .* room for {10 * PAGE_BYTES}: use max_seq_len=80 or less"
    with pytest.raises(OutOfMemoryError, match=message):
        cache_size(tiny, 5, 100, None, PAGE)
    with pytest.raises(OutOfMemoryError, match=r"room for 10: raise cache_bytes"):
        cache_size(tiny, 5, None, 10, PAGE)


def test_a_byte_budget_is_used_whole(tiny):
    assert cache_size(tiny, 1, 64, 50 * PAGE_BYTES + 7, PAGE) == (64, 50)


def test_free_bytes_is_what_the_system_says():
    with open("/proc/meminfo", encoding="ascii") as file:
        total = int(next(line for line in file if line.startswith("MemTotal")).split()[1]) * 1024
    assert 0 < free_bytes(torch.device("cpu"), 0) <= total


def test_what_pytorch_keeps_on_a_gpu_is_free(monkeypatch):
    """A model that was deleted makes room for the next one, although the driver still counts its memory."""
    for name, value in {"mem_get_info": (1000, 5000), "memory_reserved": 700, "memory_allocated": 200}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda"), 300) == 1500


def test_L09_a_control_group_limits_what_is_free(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\nactive_file 250000\ninactive_file 50000\n")
    monkeypatch.setattr(device_memory, "_CONTROL_GROUP", tmp_path)
    # 400,000 are taken: the page cache can be dropped.
    assert free_bytes(torch.device("cpu"), 0) == 600_000
    assert free_bytes(torch.device("cpu"), 100_000) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu"), 0) > 600_000


def test_L01_a_pool_that_cannot_be_allocated_says_so(tiny):
    with pytest.raises(OutOfMemoryError, match="cannot be allocated on cpu; lower cache_bytes"):
        Engine(tiny, cache_bytes=1 << 55)

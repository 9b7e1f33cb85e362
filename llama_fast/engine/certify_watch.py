"""A backend whose ops are looked at or changed as they are called, for one engine: its module is not touched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llama_fast.engine.request import Request, Sample
from llama_fast.model.batch import Batch
from llama_fast.model.kv_cache import LayerPages, PagedKVCache
from llama_fast.model.llama import DecoderLayer

Op = Callable[..., Tensor]

# In the order in which a layer calls them.
EMBED, CACHE = "embed", "K and V in the cache"
QKV, ATTENTION, O_PROJ, GATE_UP, DOWN_PROJ = (
    "norm_qkv_rope_cache",
    "attention",
    "linear_residual (o_proj)",
    "norm_gate_up_act",
    "linear_residual (down_proj)",
)
ORDER = (EMBED, QKV, CACHE, ATTENTION, O_PROJ, GATE_UP, DOWN_PROJ)


class Watch:
    """Is told of every op of every layer."""

    def begin(self, x: Tensor, batch: Batch, cache: PagedKVCache) -> None:
        """The layers will run on x [num_tokens, hidden_size]."""

    def op(self, name: str, layer: int, plain: Op, args: tuple[Any, ...]) -> Tensor:
        """An op is called; returns what it gives."""
        return plain(*args)


def watched_backend(ops: ModuleType, watches: Sequence[Watch]) -> ModuleType:
    """A module like `ops` that calls the layers' ops one by one, each through the watches, the first innermost.

    Its weights are those of `ops`.
    """
    watched = ModuleType(ops.__name__)
    vars(watched).update(vars(ops))
    layer_index, last = -1, ""

    def through(name: str, plain: Op, args: tuple[Any, ...]) -> Tensor:
        nonlocal last
        last = name
        function = plain
        for watch in watches:
            function = _bound(watch, name, layer_index, function)
        return function(*args)

    def linear_residual(*args: Any) -> Tensor:
        return through(O_PROJ if last == ATTENTION else DOWN_PROJ, ops.linear_residual, args)

    def run_layers(layers: Any, x: Tensor, batch: Batch, cache: PagedKVCache) -> Tensor:
        nonlocal layer_index
        for watch in watches:
            watch.begin(x, batch, cache)
        # Of a backend that runs them in one native call: its layers.
        every: Sequence[DecoderLayer] = getattr(layers, "layers", layers)
        for layer_index, layer in enumerate(every):
            x = layer(x, batch, cache.layer(layer_index))
        return x

    def replacement(name: str) -> Op:
        return lambda *args: through(name, getattr(ops, name), args)

    for name in (QKV, ATTENTION, GATE_UP):
        setattr(watched, name, replacement(name))
    vars(watched).update(linear_residual=linear_residual, run_layers=run_layers)
    return watched


def _bound(watch: Watch, name: str, layer: int, plain: Op) -> Op:
    return lambda *args: watch.op(name, layer, plain, args)


class SplitSum(Watch):
    """The planted fault: the down projection of one layer sums in two halves where it has more than one row.

    Each half is rounded before they are added, as where a kernel splits K over blocks for few rows and not for others.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer

    @property
    def description(self) -> str:
        return f"{DOWN_PROJ} of layer {self.layer} sums in two halves where it has more than one row"

    def op(self, name: str, layer: int, plain: Op, args: tuple[Any, ...]) -> Tensor:
        if name != DOWN_PROJ or layer != self.layer or len(args[0]) < 2:
            return plain(*args)
        x, weight, residual, batch = args
        first, second, zeros = x.clone(), x.clone(), torch.zeros_like(residual)
        half = x.shape[1] // 2
        first[:, half:], second[:, :half] = 0, 0
        # It is in both halves.
        bias = plain(torch.zeros_like(x), weight, zeros, batch)
        return residual + (plain(first, weight, zeros, batch) + plain(second, weight, zeros, batch) - bias)


class Trace(Watch):
    """What every op gave for the tokens of one sample, as sha256 of the bytes.

    Args:
        number, position, sample_index: of its group in a path, of its request in that, of the sample in that.
        ops: False keeps logits alone, and lets everything run as it does.

    Attributes:
        digests: by slot, then by (layer, op). Of the cache what the sample's slots up to this one held.
        logits: by token, what it was drawn from.
    """

    def __init__(self, number: int, position: int, sample_index: int, *, ops: bool = True) -> None:
        self.ops = ops
        self.number, self._position, self._sample_index = number, position, sample_index
        self._sample: Sample | None = None
        self._rows: list[tuple[int, int]] = []
        self.digests: dict[int, dict[tuple[int, str], bytes]] = {}
        self.logits: dict[int, Tensor] = {}

    def choose(self, number: int, requests: Sequence[Request]) -> None:
        """A path has made a group of requests."""
        if number == self.number:
            self._sample = requests[self._position].samples[self._sample_index]

    def keep_logits(self, draws: Sequence[tuple[Sample, int, Tensor]]) -> None:
        """(sample, which of its tokens, logits) of a draw."""
        self.logits |= {index: row.detach().cpu().clone() for sample, index, row in draws if sample is self._sample}

    def begin(self, x: Tensor, batch: Batch, cache: PagedKVCache) -> None:
        self._rows = self._rows_of(batch, cache.page_size)
        for row, slot in self._rows:
            # Of a guess that was wrong, nothing stays.
            self.digests[slot] = {(0, EMBED): digest(x[row])}

    def _rows_of(self, batch: Batch, page_size: int) -> list[tuple[int, int]]:
        """(row, slot) of the sample's tokens: those that are written into its pages."""
        if self._sample is None:
            return []
        pages = self._sample.sequence.pages
        slots = batch.slots.tolist()
        written, _ = batch.pages_of_slots(page_size)
        return [
            (row, slot)
            for row, (slot, page) in enumerate(zip(slots, written.tolist(), strict=True))
            if slot // page_size < len(pages) and pages[slot // page_size] == page
        ]

    def op(self, name: str, layer: int, plain: Op, args: tuple[Any, ...]) -> Tensor:
        if name == ATTENTION and self._rows:
            slot = max(slot for _, slot in self._rows)
            self.digests[slot][layer, CACHE] = digest(*self._cached(args[1], 0, slot + 1))
        out = plain(*args)
        for row, slot in self._rows:
            given = [out[row], *(self._cached(args[4], slot, slot + 1) if name == QKV else ())]
            self.digests[slot][layer, name] = digest(*given)
        return out

    def _cached(self, pages: LayerPages, start: int, end: int) -> list[Tensor]:
        """K and V of the sample's slots."""
        assert self._sample is not None
        found = []
        for index in range(start // pages.page_size, -(-end // pages.page_size)):
            first = index * pages.page_size
            inside = slice(max(0, start - first), end - first)
            page = self._sample.sequence.pages[index]
            found += [pages.k[page, :, inside], pages.v[page, :, inside]]
        return found


def digest(*tensors: Tensor) -> bytes:
    """sha256 of the bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.digest()

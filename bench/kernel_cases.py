"""What bench_kernels.py measures: each kernel on the shapes of a model, with its bound, its check and PyTorch's own op.

A case knows its bytes and FLOPs without a GPU. `build` makes sets of random inputs on one, so many that together they
are far beyond its L2 cache, and draws them anew in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from checks import sum_inaccurate, ulp, worse_than_twice
from gpu_timing import num_sets
from torch import Tensor

from llama_fast.model.batch import Batch
from llama_fast.model.kv_cache import PAGE_SIZE, SPLIT_SIZE, LayerPages
from llama_fast.ops import reference, reference_sample

DTYPE = torch.bfloat16
ITEM = DTYPE.itemsize
EPS = 1e-5
GROUP_SIZE = 128
NUM_TOP = 5
TOP_K, TOP_P, TEMPERATURE = 50, 0.9, 0.8


@dataclass(frozen=True)
class Shape:
    """What the kernels see of a model."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


MODELS = {
    "1b": Shape(2048, 8192, 32, 8, 64, 128256),
    "8b": Shape(4096, 14336, 32, 8, 128, 128256),
    "smoke": Shape(256, 512, 4, 2, 64, 1000),
}
KERNELS = ("rms_norm", "rope_and_cache", "silu_mul", "linear", "int4_linear", "attention", "sample", "log_probs")


@dataclass
class Setup:
    """A case on a GPU.

    Attributes:
        sets: arguments of one call each.
        ours: the kernel.
        check: what is wrong with its results, or None.
        peers: other implementations by name ("torch" first): a function that makes (function, sets), and may raise.
        check_with: `check` of another function of the same arguments on sets like these, where there is one.
    """

    sets: list[tuple[Any, ...]]
    ours: Callable[..., Any]
    check: Callable[[], str | None]
    peers: dict[str, Callable[[], tuple[Callable[..., Any], list[tuple[Any, ...]]]]] = field(default_factory=dict)
    check_with: Callable[[Callable[..., Any], list[tuple[Any, ...]]], str | None] | None = None


@dataclass(frozen=True)
class Case:
    """One kernel on one shape.

    Attributes:
        kernel: its file in kernels/.
        op: which of its uses.
        context: slots that attention sees; None elsewhere.
        num_bytes: every input read once and every output written once.
        flops: of matrix products in bf16.
    """

    kernel: str
    op: str
    model: str
    rows: int
    context: int | None
    num_bytes: int
    flops: int
    build: Callable[[torch.device, int], Setup]

    @property
    def name(self) -> str:
        context = "" if self.context is None else f", context {self.context}"
        return f"{self.kernel} {self.op}, {self.model}, {self.rows} rows{context}"

    def bound_us(self, bandwidth: float, flops: float) -> float:
        return 1e6 * max(self.num_bytes / bandwidth, self.flops / flops)


def cases(
    models: list[str], kernels: list[str], rows: list[int], prefill: list[int], contexts: list[int]
) -> list[Case]:
    """All cases of the kernels asked for, in their order."""
    makers: dict[str, Callable[[str, list[int], list[int], list[int]], Iterator[Case]]] = {
        "rms_norm": _rms_norm,
        "rope_and_cache": _rope_and_cache,
        "silu_mul": _silu_mul,
        "linear": _linear,
        "int4_linear": _int4_linear,
        "attention": _attention,
        "sample": _sample,
        "log_probs": _log_probs,
    }
    return [case for kernel in kernels for model in models for case in makers[kernel](model, rows, prefill, contexts)]


# --- rows of activations ---------------------------------------------------------------------------------------------


def _rms_norm(model: str, rows: list[int], prefill: list[int], contexts: list[int]) -> Iterator[Case]:
    width = MODELS[model].hidden_size
    for count in (*rows, *prefill):
        size = ITEM * (2 * count * width + width)

        def build(device: torch.device, l2_bytes: int, count: int = count, size: int = size) -> Setup:
            from llama_fast.kernels.rms_norm import rms_norm

            def draw() -> tuple[Any, ...]:
                return _randn(count, width, device=device), 1 + _randn(width, device=device, scale=0.1), EPS

            sets = [draw() for _ in range(num_sets(size, l2_bytes))]
            peers = {
                "torch": lambda: (lambda x, weight, eps: F.rms_norm(x, (width,), weight, eps), sets),
                "liger": lambda: (_liger_rms_norm(), sets),
                "flashinfer": lambda: (_flashinfer().norm.rmsnorm, sets),
            }
            return Setup(sets, rms_norm, lambda: _twice(rms_norm, reference.rms_norm, sets, draw), peers)

        yield Case("rms_norm", f"{width}", model, count, None, size, 0, build)


def _plain_silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _silu_mul(model: str, rows: list[int], prefill: list[int], contexts: list[int]) -> Iterator[Case]:
    width = MODELS[model].intermediate_size
    for count in (*rows, *prefill):
        size = ITEM * 3 * count * width

        def build(device: torch.device, l2_bytes: int, count: int = count, size: int = size) -> Setup:
            from llama_fast.kernels.silu_mul import silu_mul

            def draw() -> tuple[Any, ...]:
                return (_randn(count, 2 * width, device=device),)

            def torch_silu_mul(gate_up: Tensor) -> Tensor:
                gate, up = gate_up.chunk(2, dim=-1)
                return F.silu(gate) * up

            sets = [draw() for _ in range(num_sets(size, l2_bytes))]
            peers = {
                "torch": lambda: (torch_silu_mul, sets),
                "liger": lambda: (_liger_silu_mul(), [tuple(x.contiguous() for x in s[0].chunk(2, -1)) for s in sets]),
                "flashinfer": lambda: (_flashinfer().activation.silu_and_mul, sets),
            }
            return Setup(sets, silu_mul, lambda: _twice(silu_mul, _plain_silu_mul, sets, draw), peers)

        yield Case("silu_mul", f"{width}", model, count, None, size, 0, build)


def _rope_and_cache(model: str, rows: list[int], prefill: list[int], contexts: list[int]) -> Iterator[Case]:
    shape = MODELS[model]
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    for count, generated in [(r, True) for r in rows] + [(p, False) for p in prefill]:
        # q and its rotation, k and v and their slots, cos and sin, slot and sequence of each token.
        size = count * (ITEM * (2 * heads + 4 * kv_heads) * dim + 2 * 4 * dim + 2 * 8)

        def build(
            device: torch.device, l2_bytes: int, count: int = count, size: int = size, generated: bool = generated
        ) -> Setup:
            from llama_fast.kernels.rope_and_cache import rope_and_cache

            def draw() -> tuple[Any, ...]:
                batch, pages = _cache(device, shape, count, count if generated else 1, generated)
                packed = _randn(count, heads + 2 * kv_heads, dim, device=device)
                return *packed.split((heads, kv_heads, kv_heads), dim=1), batch, pages

            def check() -> str | None:
                def results() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
                    while True:
                        q, k, v, batch, pages = draw()
                        wide = replace(batch, cos=batch.cos.double(), sin=batch.sin.double())
                        outputs = []
                        for to, given in ((Tensor.clone, batch), (Tensor.clone, batch), (Tensor.double, wide)):
                            function = reference.rope_and_cache if outputs else rope_and_cache
                            mine = LayerPages(to(pages.k), to(pages.v))
                            rotated = _poisoned(function, to(q), to(k), to(v), given, mine)
                            page, offset = batch.pages_of_slots(PAGE_SIZE)
                            stored = [x[page, :, offset].flatten() for x in (mine.k, mine.v)]
                            outputs.append(torch.cat([rotated.flatten(), *stored]))
                        yield tuple(outputs)

                return worse_than_twice(results())

            # With its pages a set is much larger than what a call touches of it.
            sets = [draw() for _ in range(min(16, num_sets(size, l2_bytes)))]
            return Setup(sets, rope_and_cache, check, {"torch": lambda: (reference.rope_and_cache, sets)})

        yield Case("rope_and_cache", f"{heads}+{kv_heads} heads", model, count, None, size, 0, build)


# --- linear layers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """A linear layer with its epilogue; `out_features` are the weight's rows."""

    op: str
    out_features: int
    in_features: int
    residual: bool = False
    gated: bool = False
    head: bool = False

    @property
    def width(self) -> int:
        """Of the result."""
        return self.out_features // 2 if self.gated else self.out_features

    def bytes_beside_weight(self, rows: int) -> int:
        out = rows * self.width * (4 if self.head else ITEM)
        return rows * self.in_features * ITEM + out + (rows * self.width * ITEM if self.residual else 0)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the kernel beside x, weight and residual."""
        return {"activation": "silu" if self.gated else None, "out_dtype": torch.float32 if self.head else None}


def projections(model: str) -> list[Projection]:
    """The linear layers of a model."""
    shape = MODELS[model]
    hidden, attended = shape.hidden_size, shape.num_heads * shape.head_dim
    return [
        Projection("qkv", attended + 2 * shape.num_kv_heads * shape.head_dim, hidden),
        Projection("o + residual", hidden, attended, residual=True),
        Projection("gate-up + silu", 2 * shape.intermediate_size, hidden, gated=True),
        Projection("down + residual", hidden, shape.intermediate_size, residual=True),
        Projection("LM head", shape.vocab_size, hidden, head=True),
    ]


def _each_projection(model: str, rows: list[int], prefill: list[int]) -> Iterator[tuple[Projection, int]]:
    for projection in projections(model):
        # A prompt's logits are those of its last row.
        for count in rows if projection.head else (*rows, *prefill):
            yield projection, count


def _linear(model: str, rows: list[int], prefill: list[int], contexts: list[int]) -> Iterator[Case]:
    for projection, count in _each_projection(model, rows, prefill):
        weights = projection.out_features * projection.in_features
        size = weights * ITEM + projection.bytes_beside_weight(count)

        def build(
            device: torch.device, l2_bytes: int, p: Projection = projection, count: int = count, size: int = size
        ) -> Setup:
            return linear_setup(p, count, device, num_sets(size, l2_bytes))

        yield Case("linear", projection.op, model, count, None, size, 2 * count * weights, build)


def linear_setup(p: Projection, count: int, device: torch.device, sets_wanted: int) -> Setup:
    """linear.py on a projection; tune.py takes it too."""
    from llama_fast.kernels.linear import linear

    options = p.options

    def ours(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
        return linear(x, weight, residual=residual, **options)

    def draw() -> tuple[Any, ...]:
        weight = _randn(p.out_features, p.in_features, device=device, scale=p.in_features**-0.5)
        return _randn(count, p.in_features, device=device), weight, _residual(p, count, device)

    sets = [draw() for _ in range(sets_wanted)]

    def check() -> str | None:
        return check_projection(p, ours, F.linear, sets, lambda weight: weight)

    return Setup(sets, ours, check, {"torch": lambda: (_torch_projection(p), sets)})


def _torch_projection(p: Projection) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """What PyTorch offers for a projection with its epilogue."""

    def residual_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return torch.addmm(residual, x, weight.t())

    def gated(x: Tensor, weight: Tensor, residual: None) -> Tensor:
        gate, up = F.linear(x, weight).chunk(2, dim=-1)
        return F.silu(gate) * up

    def head(x: Tensor, weight: Tensor, residual: None) -> Tensor:
        if x.is_cuda:
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        return F.linear(x, weight).float()

    def plain(x: Tensor, weight: Tensor, residual: None) -> Tensor:
        return F.linear(x, weight)

    return residual_add if p.residual else gated if p.gated else head if p.head else plain


def check_projection(
    p: Projection,
    ours: Callable[..., Tensor],
    plain: Callable[[Tensor, Tensor], Tensor],
    sets: list[tuple[Any, ...]],
    dense: Callable[[Any], Tensor],
) -> str | None:
    """What is wrong with a projection on the first sets.

    Args:
        plain: x and a dense weight to their product in bf16.
        dense: the weight of a set as a matrix, bf16 or fp32, without rounding.
    """
    if p.gated:

        def results() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for x, weight, residual in sets:
                matrix = dense(weight)
                got = _poisoned(ours, x, weight, residual)
                yield got, _plain_silu_mul(plain(x, matrix.to(x.dtype))), _plain_silu_mul(_exact(x, matrix)[0])

        return worse_than_twice(results())
    # One set has fewer than POOL outputs only at one row of a narrow layer.
    for x, weight, residual in sets[:2]:
        got = _poisoned(ours, x, weight, residual)
        exact, magnitude = _exact(x, dense(weight))
        rounded = None
        if residual is not None:
            rounded, exact = exact, exact + residual.double()
        problem = sum_inaccurate(got, exact, magnitude, p.in_features, rounded)
        if problem is not None:
            return problem
    return None


def _exact(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x times weight's transpose in fp64, and the same of absolute values; few rows of the weight at a time."""
    wide = x.double()
    products, magnitudes = [], []
    for part in weight.split(16384):
        part = part.double()
        products.append(wide @ part.t())
        magnitudes.append(wide.abs() @ part.abs().t())
    return torch.cat(products, dim=-1), torch.cat(magnitudes, dim=-1)


def _residual(p: Projection, count: int, device: torch.device) -> Tensor | None:
    return _randn(count, p.width, device=device) if p.residual else None


def _int4_linear(model: str, rows: list[int], prefill: list[int], contexts: list[int]) -> Iterator[Case]:
    for projection, count in _each_projection(model, rows, prefill):
        if projection.head:
            continue
        weights = projection.out_features * projection.in_features
        weight_bytes = weights // 2 + weights // GROUP_SIZE * ITEM
        size = weight_bytes + projection.bytes_beside_weight(count)

        def build(
            device: torch.device, l2_bytes: int, p: Projection = projection, count: int = count, size: int = size
        ) -> Setup:
            return int4_setup(p, count, device, num_sets(size, l2_bytes))

        yield Case("int4_linear", projection.op, model, count, None, size, 2 * count * weights, build)


def int4_setup(
    p: Projection,
    count: int,
    device: torch.device,
    sets_wanted: int,
    group_size: int = GROUP_SIZE,
    has_zeros: bool = False,
) -> Setup:
    """int4_linear.py on a projection; tune.py takes it too. PyTorch's own has no zeros and groups of GROUP_SIZE."""
    from llama_fast.kernels.int4_linear import PlanarInt4, int4_linear

    options = p.options
    num_blocks = p.in_features // 128

    def ours(x: Tensor, weight: PlanarInt4, residual: Tensor | None) -> Tensor:
        return int4_linear(x, weight, residual=residual, **options)

    def draw() -> tuple[Any, ...]:
        # Random bits are random integers in any packing.
        words = torch.randint(-(2**31), 2**31, (num_blocks, p.out_features, 16), dtype=torch.int32, device=device)
        # Integers from -8 to 7 have a spread of about 4.6.
        scales = _randn(p.in_features // group_size, p.out_features, device=device, scale=0.1).abs_().add_(1)
        zeros = torch.randint(0, 17, scales.shape, device=device).to(DTYPE) if has_zeros else None
        weight = PlanarInt4(words, scales.mul_(p.in_features**-0.5 / 4.6), zeros, None, p.in_features)
        return _randn(count, p.in_features, device=device), weight, _residual(p, count, device)

    def dense(weight: PlanarInt4) -> Tensor:
        shifts = 4 * torch.arange(8, device=device, dtype=torch.int32)
        integers = (weight.words[:, :, None, :] >> shifts[:, None]) & 15  # [blocks, outs, plane, 16]
        integers = integers.transpose(0, 1).reshape(p.out_features, -1, group_size)
        zeros = 8 if weight.zeros is None else weight.zeros.t()[:, :, None]
        return ((integers.float() - zeros) * weight.scales.t().float()[:, :, None]).flatten(1)

    sets = [draw() for _ in range(sets_wanted)]

    def torch_int4() -> tuple[Callable[..., Any], list[tuple[Any, ...]]]:
        return _torch_int4(), [(x, *_tinygemm_weight(dense(weight), weight.scales)) for x, weight, _ in sets]

    def torch_bf16() -> tuple[Callable[..., Any], list[tuple[Any, ...]]]:
        return F.linear, [(x, dense(weight).to(DTYPE)) for x, weight, _ in sets]

    def check_with(function: Callable[..., Tensor], on: list[tuple[Any, ...]]) -> str | None:
        return check_projection(p, function, F.linear, on, dense)

    peers = {"torch": torch_int4, "torch bf16": torch_bf16, "torchao": _torchao(p, sets, dense)}
    return Setup(sets, ours, lambda: check_with(ours, sets), peers, check_with)


def _torch_int4() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, packed, scales_and_zeros: torch._weight_int4pack_mm(x, packed, GROUP_SIZE, scales_and_zeros)


def _tinygemm_weight(matrix: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """A dense weight for PyTorch's int4 matmul, projection only: it has no epilogues."""
    integers = (matrix / scales.t().float().repeat_interleave(GROUP_SIZE, dim=1) + 8).round().to(torch.uint8)
    pairs = integers[:, ::2] << 4 | integers[:, 1::2]
    # Its zero is a float: weight = (q - 8) * scale + zero.
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()
    return torch._convert_weight_to_int4pack(pairs.contiguous(), 8), scales_and_zeros


def _torchao(
    p: Projection, sets: list[tuple[Any, ...]], dense: Callable[[Any], Tensor]
) -> Callable[[], tuple[Callable[..., Any], list[tuple[Any, ...]]]]:
    def make() -> tuple[Callable[..., Any], list[tuple[Any, ...]]]:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        made = []
        for x, weight, _ in sets:
            layer = torch.nn.Linear(p.in_features, p.out_features, bias=False, device="meta")
            layer.weight = torch.nn.Parameter(dense(weight).to(DTYPE), requires_grad=False)
            quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d"))
            made.append((layer, x))
        return (lambda layer, x: layer(x)), made

    return make


# --- attention -------------------------------------------------------------------------------------------------------


def _attention(model: str, rows: list[int], prefill: list[int], contexts: list[int]) -> Iterator[Case]:
    shape = MODELS[model]
    slot_bytes = 2 * shape.num_kv_heads * shape.head_dim * ITEM
    width = shape.num_heads * shape.head_dim
    for count, context, generated in [(r, c, True) for c in contexts for r in rows] + [(p, p, False) for p in prefill]:
        num_seqs = count if generated else 1
        # A prompt's token sees itself and those before it.
        pairs = count * context if generated else count * (count + 1) // 2
        size = num_seqs * context * slot_bytes + 2 * count * width * ITEM

        def build(
            device: torch.device,
            l2_bytes: int,
            count: int = count,
            context: int = context,
            generated: bool = generated,
            size: int = size,
        ) -> Setup:
            return attention_setup(shape, count, context, generated, device, num_sets(size, l2_bytes))

        op = "generated" if generated else "prompt"
        yield Case("attention", op, model, count, context, size, 4 * pairs * width, build)


def attention_setup(
    shape: Shape, count: int, context: int, generated: bool, device: torch.device, sets_wanted: int
) -> Setup:
    """attention.py on `count` sequences of `context` slots, or on one prompt; tune.py takes it too."""
    from llama_fast.kernels.attention import attention

    num_seqs = count if generated else 1

    def draw() -> tuple[Any, ...]:
        batch, pages = _cache(device, shape, count, num_seqs, generated, context)
        return _randn(count, shape.num_heads, shape.head_dim, device=device), pages, batch

    def dense(q: Tensor, pages: LayerPages, batch: Batch, seq: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """As PyTorch takes them, [sequences, heads, tokens, head_dim]; of one sequence or of all."""
        table = batch.page_table if seq is None else batch.page_table[seq : seq + 1]
        k, v = (x[table].transpose(1, 2).flatten(2, 3)[:, :, :context].contiguous() for x in (pages.k, pages.v))
        if generated:
            return (q if seq is None else q[seq : seq + 1])[:, :, None], k, v
        return q.transpose(0, 1)[None], k, v

    def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=not generated, enable_gqa=True)

    def results() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for q, pages, batch in sets:
            got = _poisoned(attention, q, pages, batch).unflatten(1, q.shape[1:])
            # A sequence at a time, since fp64 of all of them may not fit.
            for seq in range(num_seqs):
                one = dense(q, pages, batch, seq)
                plain = torch_attention(*one)[0].transpose(0, 1)
                exact = _exact_attention(*one, causal=not generated)
                yield (got[seq : seq + 1] if generated else got), plain, exact

    def flashinfer() -> tuple[Callable[..., Any], list[tuple[Any, ...]]]:
        return _flashinfer_attention(shape, num_seqs, count, context, generated, device), sets

    sets = [draw() for _ in range(sets_wanted)]
    peers = {
        "torch": lambda: (torch_attention, [dense(*arguments, None) for arguments in sets]),
        "flashinfer": flashinfer,
    }
    return Setup(sets, attention, lambda: worse_than_twice(_all_of_first(results(), num_seqs)), peers)


def _all_of_first(results: Iterator[Any], num_seqs: int) -> Iterator[Any]:
    """Results with those of a whole set as one: a set is compared with all its sequences, or not at all."""
    group = []
    for result in results:
        group.append(result)
        if len(group) == num_seqs:
            yield tuple(torch.cat(parts) for parts in zip(*group, strict=True))
            group = []


def _exact_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """In fp64, one key head at a time: q [1, heads, tokens, dim] -> [tokens, heads, dim]."""
    group = q.shape[1] // k.shape[1]
    outputs = []
    for head in range(k.shape[1]):
        queries = q[0, head * group : (head + 1) * group].double() * q.shape[-1] ** -0.5
        scores = queries @ k[0, head].double().t()
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores.masked_fill_(hidden, -torch.inf)
        outputs.append(scores.softmax(-1) @ v[0, head].double())
    return torch.cat(outputs).transpose(0, 1)


def _cache(
    device: torch.device, shape: Shape, count: int, num_seqs: int, generated: bool, context: int | None = None
) -> tuple[Batch, LayerPages]:
    """Random pages in shuffled order, and a batch of `count` tokens in them; without a context at any slot."""
    most = context or (2 * PAGE_SIZE if generated else count)
    per_seq = -(-most // PAGE_SIZE)
    num_pages = num_seqs * per_seq
    pool = (num_pages, shape.num_kv_heads, PAGE_SIZE, shape.head_dim)
    pages = LayerPages(_randn(*pool, device=device), _randn(*pool, device=device))
    if not generated:
        slots = torch.arange(count, device=device)
    elif context is None:
        slots = torch.randint(most, (count,), device=device)
    else:
        slots = torch.full((count,), context - 1, device=device)
    angles = torch.rand(count, shape.head_dim // 2, device=device) * 6.28
    starts = torch.arange(count + 1, device=device) if generated else torch.tensor([0, count], device=device)
    batch = Batch(
        ops=reference,
        token_ids=torch.zeros_like(slots),
        slots=slots,
        seq_ids=torch.arange(count, device=device) if generated else torch.zeros_like(slots),
        query_starts=starts,
        seq_lens=slots + 1 if generated else slots[-1:] + 1,
        page_table=torch.randperm(num_pages, device=device).view(num_seqs, per_seq),
        cos=angles.cos().repeat(1, 2),
        sin=angles.sin().repeat(1, 2),
        split_size=SPLIT_SIZE,
        generated=generated,
    )
    return batch, pages


# --- logits ----------------------------------------------------------------------------------------------------------


def _sample(model: str, rows: list[int], prefill: list[int], contexts: list[int]) -> Iterator[Case]:
    vocab = MODELS[model].vocab_size
    for op in ("greedy", f"T {TEMPERATURE}, top-k {TOP_K}, top-p {TOP_P}"):
        for count in rows:
            size = count * (4 * vocab + 8)

            def build(
                device: torch.device, l2_bytes: int, count: int = count, size: int = size, greedy: bool = op == "greedy"
            ) -> Setup:
                return _sample_setup(vocab, count, greedy, device, num_sets(size, l2_bytes))

            yield Case("sample", op, model, count, None, size, 0, build)


def _sample_setup(vocab: int, count: int, greedy: bool, device: torch.device, sets_wanted: int) -> Setup:
    from llama_fast.kernels.sample import sample

    def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((count,), value, dtype=dtype, device=device)

    def draw() -> tuple[Any, ...]:
        batch = reference_sample.SamplingBatch(
            temperature=full(0.0 if greedy else TEMPERATURE),
            top_k=full(0 if greedy else TOP_K, torch.int32),
            top_p=full(1.0 if greedy else TOP_P),
            min_p=full(0.0),
            repetition_penalty=full(1.0),
            frequency_penalty=full(0.0),
            presence_penalty=full(0.0),
            seeds=torch.randint(-(2**62), 2**62, (count,), device=device),
            sample_index=full(0, torch.int32),
            position=torch.randint(4096, (count,), device=device),
        )
        return _logits(count, vocab, device), batch

    def check() -> str | None:
        logits, batch = sets[0]
        tokens = sample(logits, batch)
        if tokens.shape != (count,) or not ((tokens >= 0) & (tokens < vocab)).all():
            return f"tokens {tokens.tolist()[:8]} of a vocabulary of {vocab}"
        if greedy:
            wrong = int((tokens != logits.argmax(-1)).sum())
            return f"{wrong} of {count} tokens are not the most probable one" if wrong else None
        for row, token in enumerate(tokens.tolist()):
            problem = _wrong_draw(logits[row], batch, row, token)
            if problem is not None:
                return f"row {row}: {problem}"
        return None

    def torch_sample(logits: Tensor, batch: Any) -> Tensor:
        if greedy:
            return logits.argmax(-1)
        # What torch.multinomial does for one draw, without its check of the values on the host.
        probabilities = (logits / TEMPERATURE).softmax(-1)
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)

    def flashinfer() -> tuple[Callable[..., Any], list[tuple[Any, ...]]]:
        if greedy:
            raise LookupError("has no greedy sampling")
        draw_tokens = _flashinfer().sampling.top_k_top_p_sampling_from_logits
        return (lambda logits, batch: draw_tokens(logits / TEMPERATURE, TOP_K, TOP_P)), sets

    sets = [draw() for _ in range(sets_wanted)]
    peers = {"torch": lambda: (torch_sample, sets)}
    if not greedy:
        peers["flashinfer"] = flashinfer
    return Setup(sets, sample, check, peers)


def _wrong_draw(logits: Tensor, batch: Any, row: int, token: int) -> str | None:
    """The drawn token must survive the filters and have the largest noisy score, as far as fp32 can tell."""
    token_ids, scores = reference_sample.filter_row(
        logits, batch.temperature[row], int(batch.top_k[row]), batch.top_p[row], batch.min_p[row]
    )
    noise = reference_sample.gumbel_noise(token_ids, batch.seeds[row], batch.sample_index[row], batch.position[row])
    noisy = scores + noise
    chosen = noisy[token_ids == token]
    if not chosen.numel():
        return f"token {token} was filtered out"
    behind = (noisy.max() - chosen).item()
    # Scores and noise stay within 64, where an ulp is 2^-18; a few of them for the logarithms and the sum.
    return None if behind <= 2.0**-15 else f"token {token} is {behind:.3g} behind the best"


def _log_probs(model: str, rows: list[int], prefill: list[int], contexts: list[int]) -> Iterator[Case]:
    vocab = MODELS[model].vocab_size
    for count in rows:
        size = count * (4 * vocab + 8 + 4 + 8 + 12 * NUM_TOP)

        def build(device: torch.device, l2_bytes: int, count: int = count, size: int = size) -> Setup:
            from llama_fast.kernels.log_probs import log_probs

            def check() -> str | None:
                logits, token_ids, _ = sets[0]
                return _wrong_log_probs(logits, token_ids, *log_probs(logits, token_ids, NUM_TOP))

            def torch_log_probs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Any]:
                values = logits.log_softmax(-1)
                return values.gather(-1, token_ids[:, None]), values.topk(num_top)

            sets = [
                (_logits(count, vocab, device), torch.randint(vocab, (count,), device=device), NUM_TOP)
                for _ in range(num_sets(size, l2_bytes))
            ]
            return Setup(sets, log_probs, check, {"torch": lambda: (torch_log_probs, sets)})

        yield Case("log_probs", f"top {NUM_TOP}", model, count, None, size, 0, build)


def _wrong_log_probs(
    logits: Tensor, token_ids: Tensor, chosen: Tensor, ranks: Tensor, top_values: Tensor, top_ids: Tensor
) -> str | None:
    exact = logits.double().log_softmax(-1)
    # Ranks are those of what fp32 keeps of logit - maximum, equals by ascending id.
    x = logits - logits.amax(-1, keepdim=True)
    order = x.sort(dim=-1, descending=True, stable=True).indices
    if not torch.equal(top_ids, order[:, : top_ids.shape[1]]):
        return "the most probable tokens are others"
    if not torch.equal(ranks, 1 + (order == token_ids[:, None]).int().argmax(-1)):
        return "ranks differ"
    for got, ids in ((chosen[:, None], token_ids[:, None]), (top_values, top_ids)):
        wanted = exact.gather(-1, ids)
        # logit - maximum and the result are rounded once each, half an ulp; exp's relative errors, of a few times
        # 2^-23 and |x| 2^-24, come into the logarithm of the sum.
        error = (got.double() - wanted).abs() - ulp(wanted, torch.float32) - 2.0**-20
        if not (error <= 0).all():
            return f"a log-probability is off by {error.max().item():.3g} beyond its bound"
    return None


def _logits(count: int, vocab: int, device: torch.device) -> Tensor:
    return 3 * torch.randn(count, vocab, device=device)


# --- shared ----------------------------------------------------------------------------------------------------------


def _randn(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    x = torch.randn(shape, dtype=DTYPE, device=device)
    return x if scale == 1.0 else x.mul_(scale)


def _poisoned(function: Callable[..., Any], *arguments: Any) -> Any:
    """A call in which torch.empty gives NaN, so that an output that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return function(*arguments)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _twice(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    sets: list[tuple[Any, ...]],
    draw: Callable[[], tuple[Any, ...]],
) -> str | None:
    """The criterion on sets, and on further draws if they are too few."""

    def results() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        index = 0
        while True:
            arguments = sets[index] if index < len(sets) else draw()
            wide = [a.double() if isinstance(a, Tensor) else a for a in arguments]
            yield _poisoned(ours, *arguments), plain(*arguments), plain(*wide)
            index += 1

    return worse_than_twice(results())


# --- other libraries, where they are installed -----------------------------------------------------------------------

INSTALL = {"liger": "liger-kernel", "flashinfer": "flashinfer-python", "torchao": "torchao"}


def _flashinfer() -> Any:
    import flashinfer

    return flashinfer


def _liger_rms_norm() -> Callable[..., Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply


def _liger_silu_mul() -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def _flashinfer_attention(
    shape: Shape, num_seqs: int, count: int, context: int, generated: bool, device: torch.device
) -> Callable[..., Any]:
    """FlashInfer on the same pages; its plan, made on the host, is not timed."""
    flashinfer = _flashinfer()
    workspace = torch.empty(2**28, dtype=torch.uint8, device=device)
    per_seq = -(-context // PAGE_SIZE)
    indptr = torch.arange(num_seqs + 1, dtype=torch.int32) * per_seq
    last = torch.full((num_seqs,), context - (per_seq - 1) * PAGE_SIZE, dtype=torch.int32)
    # One plan serves all sets: it holds the lengths, and reads the pages' numbers from a buffer of its own.
    table = torch.randperm(num_seqs * per_seq, dtype=torch.int32, device=device)
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim, PAGE_SIZE)
    types = {"q_data_type": DTYPE, "kv_data_type": DTYPE}
    if generated:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(indptr, table, last, *heads, **types)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        queries = torch.tensor([0, count], dtype=torch.int32)
        wrapper.plan(queries, indptr, table, last, *heads, causal=True, **types)
    return lambda q, pages, batch: wrapper.run(q, (pages.k, pages.v))

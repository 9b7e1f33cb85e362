"""What sample and log_probs share: exact ordering, exp, fixed-point mass and Gumbel noise; the row's best logit.

Every function gives a value the same bits wherever it stands: reductions are over integers, fp32 is rounded as written.
So these kernels are launched with OPTIONS: a compiler that contracts a multiplication and an addition in one kernel and
not in another would let them disagree about a token.
"""

import torch
import triton
import triton.language as tl

from llama_fast.kernels.arguments import DTYPES, check_devices, refuse

# Tokens of one program; a row of 128,256 is 63 programs, so that one row fills half of an H100.
CHUNK = 2048
# reference_sample.py's limits; a test compares them. A term of a mass is at most 2^42, so int64 holds 2^20 of them.
MAX_VOCAB_SIZE = 2**20
MASS_ONE = tl.constexpr(2.0**42)
# Launch options: 8 tokens of a chunk a thread; what is written as fma is one rounding, everything else is two.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}

# Bits of +inf: in `distance` a token that cannot be drawn.
INFINITE = tl.constexpr(0x7F800000)
# An integer below every packed value.
NOTHING = tl.constexpr(-(2**63))
_ORDER_OF_MINUS_INF = tl.constexpr(-0x7F800001)
_LAST_ID = tl.constexpr(0x7FFFFFFF)
_INT32_MIN = tl.constexpr(-(2**31))

# ln 2 in two parts; the first has 9 bits, so its product with an exponent is exact.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.1219444005469057e-4)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Bits of sqrt(1/2) in fp32.
_SQRT_HALF = tl.constexpr(0x3F3504F3)


@triton.jit
def order(x):
    """fp32 -> int32 with the same order: -inf < finite < inf < NaN, and both zeros equal."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(x == 0, 0, key)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def value_of(key):
    """The inverse of `order`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(key):
    """Whether the value of an `order` is; of a row's largest: whether the row can be sampled."""
    return (key > _ORDER_OF_MINUS_INF) & (key < INFINITE)


@triton.jit
def scaled(x, maximum, temperature):
    """(x - maximum) / temperature. Subtracting first keeps the leading scores exact however small the temperature."""
    return tl.div_rn(x - maximum, temperature)


@triton.jit
def distance(x):
    """x <= 0 -> int32 that rises as x falls, the bits of |x|; both zeros are 0, -inf is INFINITE."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def best(key, ids, valid):
    """The largest int32 key and the lowest id that has it, packed into one int64 of the same order."""
    key = tl.where(valid, key, _INT32_MIN)
    largest = tl.max(key, axis=0)
    return pack(largest, tl.min(tl.where(valid & (key == largest), ids, _LAST_ID), axis=0))


@triton.jit
def pack(key, token_id):
    return (key.to(tl.int64) << 32) | (token_id ^ _LAST_ID).to(tl.int64)


@triton.jit
def key_of(packed):
    return (packed >> 32).to(tl.int32)


@triton.jit
def id_of(packed):
    return (packed & 0xFFFFFFFF) ^ _LAST_ID


@triton.jit
def best_of_chunks(chunk_best_ptr, row, num_chunks, BLOCK_CHUNKS: tl.constexpr):
    """The largest of a row's packed values."""
    chunks = tl.arange(0, BLOCK_CHUNKS)
    return tl.max(tl.load(chunk_best_ptr + row * num_chunks + chunks, chunks < num_chunks, other=NOTHING), axis=0)


@triton.jit
def exp(x):
    """e^x of x <= 0, within one unit in the last place down to -40 and e^-40 below; exactly 1 at 0."""
    x = tl.maximum(x, -40.0)
    n = tl.floor(tl.fma(x, _LOG2_E, 0.5))
    r = tl.fma(n, -_LN2_LOW, tl.fma(n, -_LN2_HIGH, x))
    # Taylor's series: |r| <= ln(2) / 2, so the next term, r^8 / 8!, is below 2^-27.
    y = tl.fma(r, 1 / 5040, 1 / 720)
    y = tl.fma(y, r, 1 / 120)
    y = tl.fma(y, r, 1 / 24)
    y = tl.fma(y, r, 1 / 6)
    y = tl.fma(y, r, 0.5)
    y = tl.fma(r * r, y, r) + 1.0
    return y * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def mass(x):
    """exp(x) in units of 2^-42, truncated: sums of it are the same in any order."""
    return (exp(x) * MASS_ONE).to(tl.int64)


@triton.jit
def log(x):
    """ln(x) of positive normal x, within two units in the last place, also next to x = 1."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    # log(1 + f) = 2 atanh(s) = 2 s + s R with 2 s = f - s f: what is added to the exact f is small.
    s = f / (2.0 + f)
    square = s * s
    # |s| <= 0.172: the next term, 2 s^10 / 11, is below 2^-27 of the first.
    series = tl.fma(square, 2 / 9, 2 / 7)
    series = tl.fma(series, square, 2 / 5)
    series = tl.fma(series, square, 2 / 3)
    e = exponent.to(tl.float32)
    small = tl.fma(e, _LN2_LOW, -s * tl.fma(-series, square, f))
    return tl.fma(e, _LN2_HIGH, f + small)


@triton.jit
def gumbel_of_word(word):
    """Standard Gumbel noise, in (-2.82, 21.49), of a random 32-bit word."""
    u = tl.minimum(tl.maximum((word >> 1).to(tl.int32).to(tl.float32) * 2.0**-31, 2.0**-31), 1 - 2.0**-24)
    # log1p(-u): 1 - u rounds by `lost`, exactly known; it counts where u is small, and log(w + lost) is there
    # log(w) + lost * (1 + u).
    w = 1.0 - u
    lost = (1.0 - w) - u
    return -log(-(log(w) + tl.fma(lost, u, lost)))


@triton.jit
def gumbel(seed, sample_index, position, token_ids):
    """Gumbel noise of each token, a function of these four alone (reference_sample.py says which words go where)."""
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, sample_index, low, high, token_ids)
    return gumbel_of_word(word)


def check_logits(op: str, logits: torch.Tensor) -> None:
    """Logits that can be sampled from.

    Raises:
        KernelArgumentError: they cannot.
    """
    if logits.ndim != 2 or logits.dtype not in DTYPES or not 0 < logits.shape[1] <= MAX_VOCAB_SIZE:
        refuse(
            op,
            f"logits must be float16, bfloat16 or float32 [rows, vocab_size] with 1 to {MAX_VOCAB_SIZE} tokens; "
            f"got {logits.dtype} {tuple(logits.shape)}",
        )
    check_devices(op, logits=logits)


def num_chunks(vocab_size: int) -> tuple[int, int]:
    """Chunks of a row, and that as a power of two: the block that merges them."""
    chunks = triton.cdiv(vocab_size, CHUNK)
    return chunks, triton.next_power_of_2(chunks)

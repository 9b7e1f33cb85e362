"""Sampling in plain PyTorch: penalties, temperature, top-k, top-p, min-p and a counter-based draw.

One answer  On the CPU a row's result is bitwise independent of the other rows and of their number. Steps that are
            exact in any order (IEEE add, multiply, divide; max; integers) run on the whole batch or on one row
            alike; exp and log go through `rows.elementwise`; probability mass is summed in fixed point.
Mass        exp(x - max) in units of 2**-42 as int64. Integer addition is associative, so no order of summation and no
            thread count changes a bit; truncating costs 128,256 tokens together less than 2**-25 of the largest.
Draw        Gumbel-max (Maddison et al., arXiv:1411.0030): argmax(x + g), g = -log(E), E = -log1p(-u). u comes from
            Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), first output word w:
              key      (seed & 0xFFFFFFFF, seed >> 32)
              counter  (sample_index, position & 0xFFFFFFFF, position >> 32, token_id)
              u        clamp(fp32(w >> 1) * 2**-31, 2**-31, 1 - 2**-24)
            Large g needs small u, and there the step is 2**-31: g < 21.49, so a token 2**31 times less likely than
            the most likely one is practically never drawn.
"""

from dataclasses import dataclass

import torch

from llama_fast.errors import KernelArgumentError
from llama_fast.ops.rows import elementwise

_MASK32 = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10
# A term is at most 2**42, so int64 holds the sum of 2**20 of them.
_MASS_ONE = 2.0**42
MAX_VOCAB_SIZE = 2**20


@dataclass(frozen=True)
class SamplingBatch:
    """What sampling needs besides the logits, one row per sequence that samples now; tensors on the logits' device.

    The neutral value of a field leaves a row's bits unchanged, so rows with and without a feature share a batch.
    """

    temperature: torch.Tensor  # [B] fp32; 0 = greedy
    top_k: torch.Tensor  # [B] int32; 0 = off
    top_p: torch.Tensor  # [B] fp32; 1 = off
    min_p: torch.Tensor  # [B] fp32; 0 = off
    repetition_penalty: torch.Tensor  # [B] fp32; 1 = off
    frequency_penalty: torch.Tensor  # [B] fp32; 0 = off
    presence_penalty: torch.Tensor  # [B] fp32; 0 = off
    seeds: torch.Tensor  # [B] int64: the bit pattern of the unsigned 64-bit seed
    sample_index: torch.Tensor  # [B] int32: which of a request's n samples
    position: torch.Tensor  # [B] int64: index in the sequence of the token being drawn
    prompt_mask: torch.Tensor | None = None  # [B, vocab_size] bool: token occurs in the prompt
    output_counts: torch.Tensor | None = None  # [B, vocab_size] int32: occurrences among generated tokens
    bias: torch.Tensor | None = None  # [B, vocab_size] fp32: logit_bias; -inf forbids a token


def finite_rows(logits: torch.Tensor) -> torch.Tensor:
    """[B, vocab_size] -> bool [B]: rows that can be sampled, that is without NaN and with a finite maximum."""
    return logits.amax(-1).isfinite()


def process_logits(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Penalties, then bias: what greedy takes the argmax of and sampling starts from.

    Repetition (arXiv:1909.05858, as Hugging Face): once per token id in prompt or output, a negative logit is
    multiplied and any other divided. Then frequency * count and presence, over generated tokens only, are subtracted.

    Args:
        logits: [B, vocab_size], floating point.

    Returns:
        [B, vocab_size] fp32; `logits` itself where nothing applies.

    Raises:
        KernelArgumentError: shapes that do not fit each other, or a vocabulary above MAX_VOCAB_SIZE.
    """
    check_sampling(logits, batch)
    logits = logits.float()
    seen = batch.prompt_mask
    if batch.output_counts is not None:
        generated = batch.output_counts > 0
        seen = generated if seen is None else seen | generated
    if seen is not None:
        penalty = batch.repetition_penalty[:, None]
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if batch.output_counts is not None:
        logits = logits - batch.frequency_penalty[:, None] * batch.output_counts
        logits = logits - batch.presence_penalty[:, None] * generated
    return logits if batch.bias is None else logits + batch.bias


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Draw one token per row: penalties, bias, temperature, top-k, top-p, min-p, Gumbel-max.

    Args:
        logits: [B, vocab_size], floating point; B may be 0.

    Returns:
        int64 [B]: token ids; -1 for a row without a finite maximum (NaN, +inf, or every token forbidden), so that
        one broken request does not stop the others. Equal scores go to the lowest id.

    Raises:
        KernelArgumentError: as `process_logits`.
    """
    scores = process_logits(logits, batch)
    # torch.argmax returns the first of several maxima.
    tokens = torch.where(finite_rows(scores), scores.argmax(-1), -1)
    for row in ((batch.temperature > 0) & (tokens >= 0)).nonzero()[:, 0].tolist():
        token_ids, survivors = filter_row(
            scores[row], batch.temperature[row], int(batch.top_k[row]), batch.top_p[row], batch.min_p[row]
        )
        noise = gumbel_noise(token_ids, batch.seeds[row], batch.sample_index[row], batch.position[row])
        tokens[row] = token_ids[(survivors + noise).argmax()]
    return tokens


def filter_row(
    scores: torch.Tensor, temperature: torch.Tensor, top_k: int, top_p: torch.Tensor, min_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of one row that may be drawn.

    top-k keeps ties with the k-th. top-p (nucleus, arXiv:1904.09751) keeps a token iff the mass of strictly more
    probable ones, renormalised after top-k, is below top_p. min-p (arXiv:2407.01082) keeps p >= min_p * max(p).

    Args:
        scores: [vocab_size] fp32 with a finite maximum.
        temperature, top_p, min_p: fp32 scalars (tensors: a Python divisor becomes a multiplication on some devices).
        top_k: 0 or at least vocab_size: off.

    Returns:
        Token ids, int64 [num_survivors], ascending; and (score - max) / temperature, fp32 [num_survivors]. Never
        empty: the most probable tokens always survive.
    """
    # Subtracting first keeps the leading scores exact however small the temperature.
    x = (scores - scores.max()) / temperature
    keep = x > -torch.inf
    if 0 < top_k < x.shape[0]:
        keep &= x >= x.topk(top_k).values[-1]
    token_ids = keep.nonzero()[:, 0]
    x = x[token_ids]
    if top_p < 1:
        descending = x.sort(descending=True).values
        mass = _mass(descending)
        mass_before = mass.cumsum(0) - mass
        kept = (mass_before < top_p.double() * mass.sum()).sum()
        token_ids, x = _keep(x >= descending[(kept - 1).clamp(min=0)], token_ids, x)
    if min_p > 0:
        token_ids, x = _keep(elementwise(torch.exp, x) >= min_p, token_ids, x)
    return token_ids, x


def gumbel_noise(
    token_ids: torch.Tensor, seed: torch.Tensor, sample_index: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """Standard Gumbel noise of each token; a function of its four arguments alone (layout: module docstring).

    Args:
        token_ids: [num_tokens] int64.
        seed, sample_index, position: integer scalars (0-dim tensors).

    Returns:
        fp32 [num_tokens], in (-2.82, 21.49).
    """
    counter = torch.empty(4, token_ids.shape[0], dtype=torch.int64, device=token_ids.device)
    counter[0] = sample_index
    counter[1] = position & _MASK32
    counter[2] = position >> 32
    counter[3] = token_ids
    key = torch.stack([seed & _MASK32, (seed >> 32) & _MASK32])[:, None]
    word = philox(counter, key)[0]
    uniform = ((word >> 1).float() * 2.0**-31).clamp(2.0**-31, 1 - 2.0**-24)
    return -elementwise(torch.log, -elementwise(torch.log1p, -uniform))


def philox(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Philox 4x32-10.

    Args:
        counter: int64 [4, n], words in [0, 2**32).
        key: int64 [2, n] or [2, 1], words in [0, 2**32).

    Returns:
        int64 [4, n], words in [0, 2**32).
    """
    multipliers = counter.new_tensor(_PHILOX_MULTIPLIERS)[:, None]
    key_steps = counter.new_tensor(_PHILOX_KEY_STEPS)[:, None]
    even, odd = counter[0::2], counter[1::2]
    for _ in range(_PHILOX_ROUNDS):
        # The 64-bit product wraps into the sign bit; shift and mask read its halves as unsigned.
        product = even * multipliers
        high, low = (product >> 32) & _MASK32, product & _MASK32
        even, odd = high.flip(0) ^ odd ^ key, low.flip(0)
        key = (key + key_steps) & _MASK32
    return torch.stack([even[0], odd[0], even[1], odd[1]])


def log_probs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the raw distribution: no penalty, bias, temperature or filter.

    Args:
        logits: [R, vocab_size], floating point; R may be 0.
        token_ids: [R] int64, the tokens to score.
        num_top: how many of the most probable tokens to report; at most vocab_size are.

    Returns:
        chosen: [R] fp32, log-probability of `token_ids`.
        ranks: [R] int64, 1 for the most probable token.
        top_values, top_ids: [R, min(num_top, vocab_size)] fp32 and int64, most probable first.
        Equal logits rank by ascending id. A row without a finite maximum gives NaN, rank 0 and ids -1.

    Raises:
        KernelArgumentError: `logits` is not 2-D, or its vocabulary is above MAX_VOCAB_SIZE.
    """
    check_logits(logits)
    num_rows, vocab_size = logits.shape
    num_top = min(num_top, vocab_size)
    logits = logits.float()
    chosen = logits.new_full((num_rows,), torch.nan)
    ranks = token_ids.new_zeros(num_rows)
    top_values = logits.new_full((num_rows, num_top), torch.nan)
    top_ids = token_ids.new_full((num_rows, num_top), -1)
    all_ids = torch.arange(vocab_size, device=logits.device)
    for row in finite_rows(logits).nonzero()[:, 0].tolist():
        x = logits[row] - logits[row].max()
        log_sum = (_mass(x).sum().double() / _MASS_ONE).log()
        x_chosen = x[token_ids[row]]
        chosen[row] = x_chosen.double() - log_sum
        ranks[row] = 1 + ((x > x_chosen) | ((x == x_chosen) & (all_ids < token_ids[row]))).sum()
        if num_top:
            # topk leaves open which of equal logits it returns, so it only gives the threshold.
            candidates = (x >= x.topk(num_top).values[-1]).nonzero()[:, 0]
            top, order = x[candidates].sort(descending=True, stable=True)
            top_values[row] = top[:num_top].double() - log_sum
            top_ids[row] = candidates[order[:num_top]]
    return chosen, ranks, top_values, top_ids


def _mass(x: torch.Tensor) -> torch.Tensor:
    """exp(x) in fixed point (module docstring); x [n] fp32, at most 0."""
    return (elementwise(torch.exp, x) * _MASS_ONE).long()


def _keep(mask: torch.Tensor, token_ids: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return token_ids[mask], x[mask]


def check_logits(logits: torch.Tensor) -> None:
    """Refuse logits that are not [rows, vocab_size] with a vocabulary that fixed-point mass serves."""
    if logits.ndim != 2 or not logits.is_floating_point() or not 0 < logits.shape[1] <= MAX_VOCAB_SIZE:
        raise KernelArgumentError(
            f"sampling: logits must be floating point [rows, vocab_size] with 1 to {MAX_VOCAB_SIZE} tokens; "
            f"got {logits.dtype} {tuple(logits.shape)}"
        )


def check_sampling(logits: torch.Tensor, batch: SamplingBatch) -> None:
    """Refuse a batch whose fields do not fit `logits`."""
    check_logits(logits)
    for name, tensor in vars(batch).items():
        if tensor is None:
            continue
        expected = tuple(logits.shape[: 2 if name in ("prompt_mask", "output_counts", "bias") else 1])
        if tensor.shape != expected:
            raise KernelArgumentError(f"sampling: {name} must have shape {expected}; got {tuple(tensor.shape)}")

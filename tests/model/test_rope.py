"""RotaryEmbedding against golden vectors, against transformers token by token, and against itself in company."""

import math

import pytest
import torch
from transformers import LlamaConfig as HFConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_fast.config import LlamaConfig
from llama_fast.errors import ConfigError, KernelArgumentError
from llama_fast.model.rope import RotaryEmbedding

M = 32
LENGTHS = (1, 2, M - 1, M, M + 1, M + 16, 2 * M)


def settings(rope_scaling=None, *, head_dim=16, theta=10000.0, max_len=M, **kwargs):
    return {
        "hidden_size": 4 * head_dim,
        "num_attention_heads": 4,
        "max_position_embeddings": max_len,
        "rope_theta": theta,
        "rope_scaling": rope_scaling,
        **kwargs,
    }


def longrope(head_dim=16, **kwargs):
    half = head_dim // 2
    short, long = [1.0 + 0.01 * i for i in range(half)], [1.0 + 0.5 * i for i in range(half)]
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long, **kwargs}


LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# id -> keyword arguments of both LlamaConfigs; every rope type, with the head sizes of tiny and of real models.
CASES = {
    "R1_default": settings(),
    "R1_default_head128": settings(head_dim=128, theta=500000.0),
    "R2_linear": settings({"rope_type": "linear", "factor": 4.0}),
    "R2_linear_type_alias": settings({"type": "linear", "factor": 2.5}, head_dim=64),
    "R3_dynamic": settings({"rope_type": "dynamic", "factor": 2.0}),
    "R3_dynamic_head128": settings({"rope_type": "dynamic", "factor": 2.3}, head_dim=128, theta=500000.0),
    "R3_dynamic_int_factor_head4": settings({"rope_type": "dynamic", "factor": 8}, head_dim=4),
    "R4_yarn": settings({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": M}),
    "R4_yarn_original_unset": settings({"rope_type": "yarn", "factor": 3.0}, head_dim=64, max_len=2048),
    "R4_yarn_untruncated": settings({"rope_type": "yarn", "factor": 4.0, "truncate": False}, head_dim=64, max_len=2048),
    "R4_yarn_betas": settings({"rope_type": "yarn", "factor": 4.0, "beta_fast": 20.0, "beta_slow": 2.0}, head_dim=128),
    "R4a_yarn_mscale": settings({"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.3}),
    "R4a_yarn_mscale_alone": settings({"rope_type": "yarn", "factor": 40.0, "mscale": 0.7}),
    "R4a_yarn_attention_factor": settings({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25}),
    "R5_longrope": settings(longrope(factor=4.0)),
    "R5_longrope_attention_factor": settings(longrope(factor=4.0, attention_factor=1.5)),
    "R5_longrope_original_in_dict": settings(longrope(original_max_position_embeddings=M), max_len=4 * M),
    "R5_longrope_original_at_top": settings(longrope(), max_len=4 * M, original_max_position_embeddings=M),
    "R5_longrope_factor_and_original": settings(
        longrope(factor=2.0, original_max_position_embeddings=M), max_len=4 * M
    ),
    "R5_longrope_no_factor": settings(longrope()),
    "R6_llama3": settings(LLAMA31, head_dim=128, theta=500000.0, max_len=131072),
    "R6_llama3_tiny": settings({**LLAMA31, "original_max_position_embeddings": 16}, head_dim=16),
}
DEPENDS_ON_LENGTH = [name for name in CASES if name.startswith(("R3", "R5"))]


def both(name, style):
    """Our embedding and transformers' from the same fields, in the spelling of v4 or v5."""
    fields = CASES[name]
    if style == "v5":
        scaling = fields["rope_scaling"] or {"rope_type": "default"}
        parameters = {("rope_type" if k == "type" else k): v for k, v in scaling.items()}
        parameters["rope_theta"] = fields["rope_theta"]
        fields = {k: v for k, v in fields.items() if k not in ("rope_theta", "rope_scaling")}
        fields["rope_parameters"] = parameters
    theirs = LlamaRotaryEmbedding(HFConfig(**{k: dict(v) if isinstance(v, dict) else v for k, v in fields.items()}))
    return RotaryEmbedding(LlamaConfig(**fields)), theirs


def rows(inv_freq, num_tokens):
    return inv_freq.expand(num_tokens, inv_freq.shape[-1])


def lengths_alone(prompt_len, total):
    """rope_lens of a sequence: one prompt, then token by token."""
    return torch.tensor([prompt_len] * prompt_len + list(range(prompt_len + 1, total + 1)))


GOLDEN = {
    "R1_default": (settings(), M, "1 .316227766 .1 .0316227766 .01 .00316227766 .001 .000316227766", 1.0),
    "R2_linear": (
        settings({"rope_type": "linear", "factor": 4.0}),
        *(M, ".25 .0790569415 .025 .00790569415 .0025 .000790569415 .00025 7.90569415e-05", 1.0),
    ),
    "R3_dynamic_L48": (
        settings({"rope_type": "dynamic", "factor": 2.0}),
        *(48, "1 .286414971 .0820335356 .0234956327 .00672950096 .00192742982 .000552044757 .000158113883", 1.0),
    ),
    "R3_dynamic_L64": (
        settings({"rope_type": "dynamic", "factor": 2.0}),
        *(64, "1 .270296126 .0730599956 .0197478337 .00533776295 .00144277665 .000389976938 .000105409255", 1.0),
    ),
    "R4_yarn": (
        settings({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        *(M, "1 .197642354 .025 .00790569415 .0025 .000790569415 .00025 7.90569415e-05", 1.138629436),
    ),
    "R5_longrope_L33": (
        settings(longrope(factor=4.0)),
        *(33, "1 .210818511 .05 .0126491106 .00333333333 .000903507903 .00025 7.02728369e-05", 1.183215957),
    ),
}


@pytest.mark.parametrize(("fields", "rope_len", "expected", "scaling"), GOLDEN.values(), ids=GOLDEN)
def test_golden_vectors(fields, rope_len, expected, scaling):
    rope = RotaryEmbedding(LlamaConfig(**fields))
    inv_freq = rows(rope.inv_freq(torch.tensor([rope_len])), 1)[0]
    expected = torch.tensor([float(x) for x in expected.split()], dtype=torch.float64)
    # Nine printed digits, and a handful of fp32 roundings (each 2**-24) in pow, products and quotients.
    torch.testing.assert_close(inv_freq.double(), expected, rtol=8 * 2**-24, atol=0)
    assert rope.attention_scaling == pytest.approx(scaling, rel=1e-9)


def test_golden_vectors_of_real_head_sizes():
    yarn = settings({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, head_dim=128)
    expected = {
        "R4": (yarn, {0: 1.0, 20: 0.0494860366, 30: 0.00773442431, 40: 0.000885437745, 63: 2.88695496e-05}),
        "R6": (
            settings(LLAMA31, head_dim=128, theta=500000.0, max_len=131072),
            {0: 1.0, 28: 0.00321144599, 30: 0.00137189357, 32: 0.000524846161, 35: 9.55621235e-05}
            | {40: 3.4281022e-05, 63: 3.06892599e-07},
        ),
    }
    for fields, values in expected.values():
        inv_freq = RotaryEmbedding(LlamaConfig(**fields)).inv_freq(torch.tensor([1]))
        for index, value in values.items():
            # Blending subtracts from 1, which magnifies the rounding of its weight a few times over.
            assert inv_freq[index].item() == pytest.approx(value, rel=32 * 2**-24)
    plain = RotaryEmbedding(LlamaConfig(**settings(head_dim=128, theta=500000.0))).inv_freq(torch.tensor([1]))
    assert torch.equal(inv_freq[:29], plain[:29])


@pytest.mark.parametrize("style", ["v4", "v5"])
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers_alone(name, style):
    """inv_freq bit for bit and cos, sin within rounding at every step of prompt, then token by token."""
    for prompt_len in LENGTHS if name in DEPENDS_ON_LENGTH else (M + 1,):
        ours, theirs = both(name, style)  # a fresh model: its RoPE has no history
        total = prompt_len + 2 * M + 3
        rope_lens, positions = lengths_alone(prompt_len, total), torch.arange(total)
        cos, sin = ours(positions, rope_lens)
        inv_freq = rows(ours.inv_freq(rope_lens), total)
        calls = [positions[:prompt_len], *positions[prompt_len:].split(1)]
        for call in calls:
            their_cos, their_sin = theirs(torch.zeros(1), call[None])
            assert torch.equal(inv_freq[call], rows(theirs.inv_freq, len(call)))
            # Equal angles; PyTorch's vector and scalar cos each err by at most 1 ulp (2**-24 below 1), the product
            # with the scaling rounds once more.
            atol = (2 * 2**-24 + 2**-24) * ours.attention_scaling
            torch.testing.assert_close(cos[call], their_cos[0], rtol=0, atol=atol)
            torch.testing.assert_close(sin[call], their_sin[0], rtol=0, atol=atol)


@pytest.mark.parametrize("name", DEPENDS_ON_LENGTH)
def test_R3a_R5a_crossing_differs_from_one_long_prompt(name):
    """The negative control of the test above: the lengths matter."""
    ours, _ = both(name, "v4")
    total = 4 * M
    positions = torch.arange(total)
    stepwise = ours(positions, lengths_alone(M, total))[0]
    at_once = ours(positions, lengths_alone(total, total))[0]
    assert not torch.equal(stepwise[1:M], at_once[1:M])
    assert torch.equal(stepwise[-1], at_once[-1])


@pytest.mark.parametrize("name", CASES)
def test_R3a_R5a_bits_do_not_depend_on_company(name):
    ours, _ = both(name, "v4")
    generator = torch.Generator().manual_seed(0)
    # Large positions too: there cos takes another path, and a neighbour in the same register could choose it.
    positions = torch.randint(0, 2**20, (257,), generator=generator)
    rope_lens = positions + 1 + torch.randint(0, 100, (257,), generator=generator)
    positions[::3], rope_lens[::3] = positions[::3] % (2 * M), positions[::3] % (2 * M) + 1
    alone = [ours(positions[i : i + 1], rope_lens[i : i + 1]) for i in range(257)]
    alone_cos, alone_sin = torch.cat([cos for cos, _ in alone]), torch.cat([sin for _, sin in alone])
    for size in (2, 3, 17, 257):
        order = torch.randperm(257, generator=generator)[:size]
        cos, sin = ours(positions[order], rope_lens[order])
        assert torch.equal(cos, alone_cos[order])
        assert torch.equal(sin, alone_sin[order])


def test_large_calls_on_several_threads_keep_the_bits():
    """Past 32,768 elements PyTorch cuts a call for its threads, in the middle of a row if it must."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ours, _ = both("R3_dynamic_head128", "v4")
        positions = torch.arange(1500)
        whole = ours(positions, positions + 1)[0]
        parts = torch.cat([ours(part, part + 1)[0] for part in positions.split(7)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, parts)


def test_plain_pow_depends_on_company():
    """Negative control: a vector through the same pow has other bits than its elements one by one."""
    growth = 1 + torch.arange(1, 258) / 32
    together, alone = growth ** (16 / 14), torch.stack([g ** (16 / 14) for g in growth])
    if torch.equal(together, alone):
        pytest.skip("this machine's pow has the same bits in vectors and alone")
    ours, _ = both("R3_dynamic", "v4")
    inv_freq = ours.inv_freq(M + torch.arange(1, 258))
    exponents = torch.arange(0, 16, 2) / 16
    assert not torch.equal(inv_freq, 1.0 / (10000.0 * together)[:, None] ** exponents)


def test_state_is_what_a_rotation_depends_on():
    positions = torch.arange(8)
    for name in CASES:
        ours, _ = both(name, "v4")
        seen: dict = {}
        for rope_len in (8, M - 1, M, M + 1, M + 2, 4 * M, 4 * M + 1):
            cos, _ = ours(positions, torch.full((8,), rope_len))
            first = seen.setdefault(ours.state(rope_len), cos)
            assert torch.equal(first, cos)
        if name not in DEPENDS_ON_LENGTH:
            assert list(seen) == [()]
    dynamic, longrope_ = both("R3_dynamic", "v4")[0], both("R5_longrope", "v4")[0]
    assert [dynamic.state(n) for n in (1, M, M + 1)] == [M, M, M + 1]
    assert [longrope_.state(n) for n in (1, M, M + 1)] == ["short", "short", "long"]


def test_R4a_attention_scaling_multiplies_cos_and_sin():
    plain, scaled = (both(name, "v4")[0] for name in ("R4_yarn", "R4a_yarn_attention_factor"))
    positions = torch.arange(9)
    for a, b in zip(plain(positions, positions + 1), scaled(positions, positions + 1), strict=True):
        # Each product rounds once.
        torch.testing.assert_close(a / plain.attention_scaling, b / 1.25, rtol=0, atol=2 * 2**-24)
    assert plain.attention_scaling == 0.1 * math.log(4.0) + 1.0


def test_partial_rotary_factor_rotates_the_first_dimensions():
    fields = settings(head_dim=32, partial_rotary_factor=0.5)
    rope, smaller = RotaryEmbedding(LlamaConfig(**fields)), RotaryEmbedding(LlamaConfig(**settings(head_dim=16)))
    positions = torch.arange(5)
    assert rope.rotary_dim == 16
    assert torch.equal(rope(positions, positions + 1)[0], smaller(positions, positions + 1)[0])


def test_built_on_the_meta_device_in_bf16():
    expected = RotaryEmbedding(LlamaConfig())
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            rope = RotaryEmbedding(LlamaConfig())
    finally:
        torch.set_default_dtype(default)
    positions = torch.arange(3)
    cos, sin = rope(positions, positions + 1)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, expected(positions, positions + 1)[0])


def test_no_tokens():
    for name in CASES:
        ours, _ = both(name, "v4")
        empty = torch.empty(0, dtype=torch.int64)
        assert ours(empty, empty)[0].shape == (0, ours.rotary_dim)


def test_shapes_are_checked():
    rope = RotaryEmbedding(LlamaConfig())
    with pytest.raises(KernelArgumentError, match=r"\(3,\) and \(2,\)"):
        rope(torch.arange(3), torch.arange(2))


def test_configuration_changed_to_nonsense_is_refused():
    config = LlamaConfig(**settings({"rope_type": "linear", "factor": 2.0}))
    del config.rope_parameters["factor"]
    with pytest.raises(ConfigError, match="lacks factor"):
        RotaryEmbedding(config)

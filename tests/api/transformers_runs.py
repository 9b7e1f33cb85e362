"""Tiny random checkpoints that transformers writes, and transformers run on them as the oracle.

Weights are drawn so that logits have a spread of 1 to 10: an absolute bound on their difference then means something.
"""

import json
from pathlib import Path

import torch
import transformers
from hypothesis import strategies as st
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM as HFModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_fast import LlamaForCausalLM
from llama_fast.config import ACTIVATIONS
from tests.tiny import RecordingEngine, make_request

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()  # what is odd about a drawn configuration is meant

# "Logits equal transformers' in fp32 within this."
LOGITS_ATOL = 1e-4
# Where dynamic and longrope change their frequencies.
BORDER = 40
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# Transformers rotates a whole batch as its longest row needs it (BEHAVIOURS R3a, R5a).
DEPENDS_ON_BATCH = ("dynamic", "longrope")


@st.composite
def rope_parameters(draw, rope_type, head_dim):
    """`rope_parameters` of config.json with this type; optional keys there or not."""
    number = lambda *values: st.sampled_from(values)  # noqa: E731
    factor = number(1.0, 2.5, 8)
    original = {"original_max_position_embeddings": st.just(BORDER)}
    extensions = st.lists(st.floats(1.0, 6.0, width=16), min_size=head_dim // 2, max_size=head_dim // 2)
    required, optional = {
        "default": ({}, {}),
        "linear": ({"factor": factor}, {}),
        "dynamic": ({"factor": factor}, {}),
        "yarn": (
            {"factor": factor},
            original
            | {"attention_factor": number(0.8, 1.3), "beta_fast": number(16.0, 32), "beta_slow": number(1, 2.0)}
            | {"mscale": number(0.7, 1.0), "mscale_all_dim": number(0.5, 1.2), "truncate": st.booleans()},
        ),
        "longrope": (
            original | {"short_factor": extensions, "long_factor": extensions},
            {"factor": factor, "attention_factor": number(0.9, 1.4)},
        ),
        "llama3": (
            original | {"factor": factor, "low_freq_factor": number(1.0, 0.5), "high_freq_factor": number(4.0, 2)},
            {},
        ),
    }[rope_type]
    drawn = draw(st.fixed_dictionaries(required, optional=optional))
    return {"rope_type": rope_type, "rope_theta": draw(number(10000.0, 500000.0, 100.0)), **drawn}


@st.composite
def configurations(draw, rope_type):
    """Fields of a Llama with this RoPE, odd widths and heads that need not fill hidden_size."""
    num_kv_heads, group = draw(st.sampled_from([(4, 1), (1, 4), (2, 2), (2, 3), (3, 1), (1, 1)]))
    num_heads = num_kv_heads * group
    head_dim = draw(st.sampled_from([4, 6, 16, 32]))
    return {
        "vocab_size": draw(st.sampled_from([33, 97, 128])),
        "hidden_size": num_heads * draw(st.sampled_from([5, 8, head_dim])),
        "intermediate_size": draw(st.sampled_from([1, 33, 64])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "max_position_embeddings": BORDER if rope_type == "dynamic" else 4 * BORDER,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": draw(st.sampled_from([None, 0])),
        "rope_parameters": draw(rope_parameters(rope_type, head_dim)),
    }


def tiny_fields(rope=None, **changes):
    """A fixed configuration: GQA with 48 hidden in 6 heads of 16, no eos."""
    return {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 33,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4 * BORDER,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **(rope or {})},
        **changes,
    }


def save_checkpoint(fields, folder, *, style="v5", sharded=False, seed=0, dtype=torch.float32):
    """A random model with these fields, written by transformers to `folder`; returned as it was written."""
    torch.manual_seed(seed)
    model = HFModel(HFConfig(**{**fields, "rope_parameters": dict(fields["rope_parameters"])})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1 or parameter.shape[-1] < 16:
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 1.2 * parameter.shape[-1] ** -0.5)
    model_bytes = sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
    model.to(dtype).save_pretrained(folder, max_shard_size=model_bytes // 3 if sharded else "5GB")
    assert (Path(folder) / "model.safetensors.index.json").exists() == sharded
    if style != "v5":
        rewrite_as_v4(folder, type_key="type" if style == "v4, type" else "rope_type")
    return model


def rewrite_as_v4(folder, type_key="rope_type"):
    """Spell the folder's config.json as transformers v4 did: rope_theta, rope_scaling, torch_dtype."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope_type = rope.pop("rope_type")
    config["rope_scaling"] = None if rope_type == "default" else {type_key: rope_type, **rope}
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))


def forget_lengths(model):
    """Dynamic RoPE remembers the longest sequence it has seen; each run must start from nothing."""
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)


@torch.no_grad()
def logits_alone(model, token_ids, position_ids=None):
    """Transformers' logits [seq_len, vocab_size] of one row, run by itself; token_ids, position_ids [seq_len]."""
    forget_lengths(model)
    # A mask of ones: without one, positions with gaps would be taken for several packed sequences.
    mask = torch.ones_like(token_ids)[None]
    positions = None if position_ids is None else position_ids[None]
    return model(token_ids[None], attention_mask=mask, position_ids=positions).logits[0]


def left_padded(prompts, pad_token_id=0):
    """input_ids and attention_mask [batch_size, longest] of lists of ids."""
    longest = max(map(len, prompts))
    ids = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def their_greedy(model, prompts, new_tokens, **kwargs):
    """Transformers' new tokens [batch_size, new_tokens] and the raw logits of each step, [batch_size, steps, vocab]."""
    forget_lengths(model)
    input_ids, mask = left_padded(prompts)
    out = model.generate(
        input_ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return out.sequences[:, input_ids.shape[1] :], torch.stack(out.logits, dim=1)


def our_greedy(model, prompts, new_tokens, **kwargs):
    """Our new tokens [batch_size, new_tokens]."""
    input_ids, mask = left_padded(prompts)
    out = model.generate(input_ids, mask, max_new_tokens=new_tokens, do_sample=False, **kwargs)
    assert torch.equal(out[:, : input_ids.shape[1]], input_ids)
    return out[:, input_ids.shape[1] :]


def compare_greedy(ours: LlamaForCausalLM, theirs: HFModel, prompts, new_tokens, *, together=True):
    """Assert that greedy tokens are equal, and count them.

    A different token is excused only where the reference had no clear winner: its two best logits are closer than
    twice the largest logit difference at that step, which itself must be within LOGITS_ATOL. Behind an excused token
    both continue from the reference's tokens.

    Args:
        together: transformers runs the prompts as one left-padded batch, else one by one. Ours always is one batch.

    Returns:
        (tokens compared, tokens excused).
    """
    if together:
        expected, logits = their_greedy(theirs, prompts, new_tokens)
    else:
        runs = [their_greedy(theirs, [prompt], new_tokens) for prompt in prompts]
        expected, logits = (torch.cat(parts) for parts in zip(*runs, strict=True))
    got = our_greedy(ours, prompts, new_tokens)
    compared, excused = 0, 0
    for row, prompt in enumerate(prompts):
        compared += expected.shape[1]
        if torch.equal(got[row], expected[row]):
            continue
        step = int((got[row, : expected.shape[1]] != expected[row, : got.shape[1]]).nonzero()[0])
        check_near_tie(ours, prompt, logits[row, : step + 1])
        excused += 1
        compared -= expected.shape[1] - step
        if rest := expected.shape[1] - step - 1:
            prefix = [*prompt, *expected[row, : step + 1].tolist()]
            more_compared, more_excused = compare_greedy(ours, theirs, [prefix], rest, together=True)
            compared, excused = compared + more_compared, excused + more_excused
    return compared, excused


def check_near_tie(ours, prompt, their_logits):
    """Fail unless the last step of `their_logits` [steps, vocab_size] is too close to call.

    Our logits are those that generation sampled from, not a forward over the same tokens: under dynamic RoPE these
    differ by design.
    """
    steps = len(their_logits)
    engine = RecordingEngine(ours, max_batch=1)
    request = make_request(ours, prompt, max_tokens=steps, max_seq_len=engine.max_seq_len, temperature=0.0)
    _, our_logits = engine.generate([request])[0, 0]
    difference = (our_logits[-1] - their_logits[-1]).abs().max().item()
    best, second = their_logits[-1].topk(2).values.tolist()
    assert difference <= LOGITS_ATOL, f"step {steps}: logits differ by {difference}"
    assert best - second < 2 * difference, f"step {steps}: {best - second} between the two best, {difference} apart"

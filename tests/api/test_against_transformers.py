"""Logits of whole sequences equal transformers' in fp32, over random configurations, checkpoints and paddings."""

import json
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_fast import LlamaForCausalLM
from llama_fast.config import ACTIVATIONS
from llama_fast.errors import UnsupportedError
from tests.api.transformers_runs import (
    BORDER,
    DEPENDS_ON_BATCH,
    LOGITS_ATOL,
    ROPE_TYPES,
    configurations,
    logits_alone,
    save_checkpoint,
    tiny_fields,
)

SEQ_LENS = st.sampled_from([1, 2, BORDER - 1, BORDER, BORDER + 1, 65]) | st.integers(3, 80)


@st.composite
def batches(draw, vocab_size):
    """input_ids, attention_mask and position_ids (both may be None) of one to three padded rows."""
    seq_len, batch_size = draw(SEQ_LENS), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    input_ids = torch.randint(vocab_size, (batch_size, seq_len), generator=generator)
    padding = draw(st.sampled_from(["none", "left", "right", "holes"]))
    mask = torch.ones_like(input_ids)
    for row in mask if padding != "none" else ():
        num_pads = draw(st.integers(0, seq_len - 1))
        if padding == "holes":
            row[torch.randperm(seq_len, generator=generator)[:num_pads]] = 0
        elif num_pads:
            row[slice(num_pads) if padding == "left" else slice(-num_pads, None)] = 0
    positions = {
        "default": None,
        "shifted": torch.arange(3, 3 + seq_len)[None],
        # What generate passes: cumsum - 1, 1 at padding.
        "counted": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1),
    }[draw(st.sampled_from(["default", "shifted", "counted"]))]
    return input_ids, None if padding == "none" and positions is None else mask, positions


@torch.no_grad()
def their_logits(model, input_ids, mask, position_ids):
    """[batch_size, seq_len, vocab_size]; row by row where transformers' rows would change each other's rotation."""
    if model.config.rope_parameters["rope_type"] not in DEPENDS_ON_BATCH:
        return model(input_ids, attention_mask=mask, position_ids=position_ids).logits
    kept = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    positions = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
    positions = positions.expand_as(input_ids)
    logits = torch.zeros(*input_ids.shape, model.config.vocab_size)
    for row, kept_row in enumerate(kept):
        logits[row, kept_row] = logits_alone(model, input_ids[row, kept_row], positions[row, kept_row])
    return logits


def largest_difference(ours, theirs, batch):
    """Over the logits of unpadded positions."""
    input_ids, mask, position_ids = batch
    expected = their_logits(theirs, *batch)
    logits = ours(input_ids, attention_mask=mask, position_ids=position_ids).logits
    assert logits.shape == expected.shape
    assert logits.dtype == torch.float32
    kept = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    assert not logits[~kept].any()
    return (logits - expected)[kept].abs().max().item()


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@settings(max_examples=9, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_logits_equal_on_random_configurations(rope_type, data):
    fields = data.draw(configurations(rope_type))
    batch = data.draw(batches(fields["vocab_size"]))
    style = data.draw(st.sampled_from(["v5", "v4", "v5", "v4, type"]))
    sharded, seed = data.draw(st.booleans()), data.draw(st.integers(0, 1000))
    with tempfile.TemporaryDirectory() as folder:
        theirs = save_checkpoint(fields, folder, style=style, sharded=sharded, seed=seed)
        ours = LlamaForCausalLM.from_pretrained(folder, device="cpu")
        difference = largest_difference(ours, theirs, batch)
    assert difference <= LOGITS_ATOL


def test_long_rows_cross_pages_and_splits(tmp_path):
    """300 tokens: five pages of the cache, two splits of the reduction."""
    theirs = save_checkpoint(tiny_fields(max_position_embeddings=512), tmp_path)
    ours = LlamaForCausalLM.from_pretrained(tmp_path, device="cpu")
    input_ids = torch.randint(97, (2, 300), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    mask[1, :37] = 0
    assert largest_difference(ours, theirs, (input_ids, mask, None)) <= LOGITS_ATOL


def test_a_row_of_padding_only_leaves_the_others_alone(tmp_path):
    save_checkpoint(tiny_fields(), tmp_path)
    ours = LlamaForCausalLM.from_pretrained(tmp_path, device="cpu")
    input_ids = torch.arange(14).view(2, 7)
    logits = ours(input_ids, attention_mask=torch.tensor([[0] * 7, [1] * 7])).logits
    assert torch.equal(logits[1:], ours(input_ids[1:]).logits)
    assert not logits[0].any()


def longrope(head_dim=16):
    half = head_dim // 2
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.01 * i for i in range(half)],
        "long_factor": [1.0 + 0.5 * i for i in range(half)],
        "original_max_position_embeddings": BORDER,
    }


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": BORDER}


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_C7_every_activation(tmp_path, hidden_act):
    theirs = save_checkpoint(tiny_fields(hidden_act=hidden_act), tmp_path)
    ours = LlamaForCausalLM.from_pretrained(tmp_path, device="cpu")
    assert largest_difference(ours, theirs, (torch.arange(30).view(2, 15), None, None)) <= LOGITS_ATOL


@pytest.mark.parametrize("seq_len", [BORDER - 1, BORDER, BORDER + 1])
@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0}, longrope()], ids=["R3", "R5a"])
def test_border_of_the_frequencies(tmp_path, rope, seq_len):
    theirs = save_checkpoint(tiny_fields(rope, max_position_embeddings=BORDER), tmp_path)
    ours = LlamaForCausalLM.from_pretrained(tmp_path, device="cpu")
    assert largest_difference(ours, theirs, (torch.arange(seq_len)[None], None, None)) <= LOGITS_ATOL


# --- the comparison finds errors -------------------------------------------------------------------------------------


def swap_kv_heads(model):
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.copy_(projection.weight.unflatten(0, (2, -1)).flip(0).flatten(0, 1))


def interleave_rope_pairs(model):
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            heads = projection.weight.unflatten(0, (-1, 2, 8))
            projection.weight.copy_(heads.transpose(1, 2).flatten(0, 2))


def drop_a_bias(model):
    model.model.layers[0].self_attn.o_proj.bias.zero_()


def skip_the_last_layer(model):
    model.config.num_hidden_layers -= 1


def take_another_activation(model):
    for layer in model.model.layers:
        layer.hidden_act = "gelu"
    model.refresh()


def raise_eps(model):
    model.model.norm.eps *= 100


PLANTED = (swap_kv_heads, interleave_rope_pairs, drop_a_bias, skip_the_last_layer, take_another_activation, raise_eps)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_negative_control_planted_errors_are_found(tmp_path, plant):
    theirs = save_checkpoint(tiny_fields(attention_bias=True, rms_norm_eps=1e-4), tmp_path)
    ours = LlamaForCausalLM.from_pretrained(tmp_path, device="cpu")
    batch = (torch.arange(30).view(2, 15), None, None)
    assert largest_difference(ours, theirs, batch) <= LOGITS_ATOL
    plant(ours)
    assert largest_difference(ours, theirs, batch) > 10 * LOGITS_ATOL


SCALED = {
    "R2_linear": {"rope_type": "linear", "factor": 2.0},
    "R3_dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "R4_yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": BORDER},
    "R5_longrope": longrope(),
    "R6_llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
}


@pytest.mark.parametrize("rope", SCALED.values(), ids=SCALED)
def test_negative_control_ignored_rope_scaling_is_found(tmp_path, rope):
    theirs = save_checkpoint(tiny_fields(rope, max_position_embeddings=BORDER), tmp_path)
    batch = (torch.arange(BORDER + 9)[None], None, None)
    ours = LlamaForCausalLM.from_pretrained(tmp_path, device="cpu")
    assert largest_difference(ours, theirs, batch) <= LOGITS_ATOL

    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    path.write_text(json.dumps(config))
    unscaled = LlamaForCausalLM.from_pretrained(tmp_path, device="cpu")
    assert largest_difference(unscaled, theirs, batch) > 10 * LOGITS_ATOL


# --- positions -------------------------------------------------------------------------------------------------------


def test_M3_default_positions_are_columns_not_counted_from_the_mask(tmp_path):
    """In a padded row, counting from the mask would stay below the border of dynamic RoPE; its columns cross it."""
    theirs = save_checkpoint(tiny_fields(SCALED["R3_dynamic"], max_position_embeddings=BORDER), tmp_path)
    ours = LlamaForCausalLM.from_pretrained(tmp_path, device="cpu")
    num_pads, seq_len = 20, BORDER + 10
    input_ids = torch.arange(seq_len)[None]
    mask = (input_ids >= num_pads).long()
    columns = torch.arange(num_pads, seq_len)

    default = ours(input_ids, attention_mask=mask).logits[0, num_pads:]
    expected = logits_alone(theirs, input_ids[0, num_pads:], columns)
    torch.testing.assert_close(default, expected, rtol=0, atol=LOGITS_ATOL)

    counted = logits_alone(theirs, input_ids[0, num_pads:])
    assert (default - counted).abs().max() > 10 * LOGITS_ATOL
    given = ours(input_ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[0, num_pads:]
    torch.testing.assert_close(given, counted, rtol=0, atol=LOGITS_ATOL)


def test_M3_positions_given_as_columns_change_no_bit(tmp_path):
    save_checkpoint(tiny_fields(longrope()), tmp_path)
    ours = LlamaForCausalLM.from_pretrained(tmp_path, device="cpu")
    input_ids = torch.randint(97, (2, BORDER + 1), generator=torch.Generator().manual_seed(0))
    default = ours(input_ids).logits
    for position_ids in (torch.arange(BORDER + 1)[None], torch.arange(BORDER + 1).expand(2, -1)):
        assert torch.equal(ours(input_ids, position_ids=position_ids).logits, default)


@pytest.mark.parametrize("rope", [None, SCALED["R3_dynamic"], SCALED["R5_longrope"]], ids=["R1", "R3a", "R5a"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_G6_padded_rows_equal_the_rows_alone_bitwise(tmp_path, rope, side):
    """With positions counted from the mask, as generate counts them; one row crosses the border, the others do not."""
    save_checkpoint(tiny_fields(rope, max_position_embeddings=BORDER), tmp_path)
    ours = LlamaForCausalLM.from_pretrained(tmp_path, device="cpu")
    longest = BORDER + 5
    input_ids = torch.randint(97, (4, longest), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    for row, num_pads in enumerate((30, 0, 5, 44)):
        mask[row, slice(num_pads) if side == "left" else slice(longest - num_pads, None)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = ours(input_ids, attention_mask=mask, position_ids=positions).logits
    for row, kept in enumerate(mask.bool()):
        assert torch.equal(logits[row, kept], ours(input_ids[row, kept][None]).logits[0])


def test_M14_restarting_positions_are_refused_without_a_mask(tmp_path):
    """Whether they pack sequences depends in transformers on a cache; with a mask they never do."""
    theirs = save_checkpoint(tiny_fields(), tmp_path)
    ours = LlamaForCausalLM.from_pretrained(tmp_path, device="cpu")
    input_ids = torch.arange(20)[None]
    positions = torch.cat((torch.arange(12), torch.arange(8)))[None]
    with pytest.raises(UnsupportedError, match="packed sequences"):
        ours(input_ids, position_ids=positions)
    assert largest_difference(ours, theirs, (input_ids, torch.ones_like(input_ids), positions)) <= LOGITS_ATOL

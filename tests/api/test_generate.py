"""generate(): budgets, masks, padding, eos, penalties and argument checks, row by row as on the page."""

import warnings

import numpy as np
import pytest
import torch

from tests.api.transformers_runs import left_padded, our_greedy, their_greedy

PAD = 96
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20], [30, 31, 32, 33], list(range(40, 90))]


def ids_of(*prompts):
    return torch.tensor(prompts)


# --- how much --------------------------------------------------------------------------------------------------------


def test_G1_twenty_new_tokens_with_a_warning(pair):
    ours, theirs = pair
    input_ids = ids_of([1, 2, 3])
    with pytest.warns(UserWarning, match="max_new_tokens"):
        out = ours.generate(input_ids)
    assert out.shape == (1, 23)
    assert torch.equal(out, theirs.generate(input_ids, do_sample=False))


def test_G1_the_unasked_budget_ends_with_the_context(load):
    ours, theirs = load(max_position_embeddings=16)
    input_ids = torch.arange(1, 11)[None]
    with pytest.warns(UserWarning, match="max_new_tokens"):
        out = ours.generate(input_ids)
    assert torch.equal(out, theirs.generate(input_ids, do_sample=False))
    assert out.shape == (1, 16)


def test_G1_max_new_tokens_beats_max_length(pair):
    ours, _ = pair
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.generate(ids_of([1, 2, 3]), max_new_tokens=5, max_length=7).shape == (1, 8)
        assert ours.generate(ids_of([1, 2, 3]), max_length=7).shape == (1, 7)


def test_G1_max_length_counts_the_padded_prompt(pair):
    ours, theirs = pair
    input_ids, mask = left_padded(PROMPTS[:3], PAD)
    out = ours.generate(input_ids, mask, max_length=12, do_sample=False)
    expected = theirs.generate(input_ids, attention_mask=mask, max_length=12, do_sample=False)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("max_length", [2, 3])
def test_G1_input_that_fills_max_length_is_refused(pair, max_length):
    with pytest.raises(ValueError, match=f"3 tokens, max_length={max_length}"):
        pair[0].generate(ids_of([1, 2, 3]), max_length=max_length)


# --- generation_config.json ------------------------------------------------------------------------------------------


def test_G2_generation_config_applies_under_explicit_arguments(load):
    ours, theirs = load({"max_new_tokens": 6, "repetition_penalty": 1.7})
    plain = their_greedy(theirs, [PROMPTS[0]], 12)[0]
    penalized = their_greedy(theirs, [PROMPTS[0]], 12, repetition_penalty=1.7)[0]
    assert not torch.equal(plain, penalized)
    input_ids = ids_of(PROMPTS[0])
    prompt_len = input_ids.shape[1]
    assert torch.equal(ours.generate(input_ids)[:, prompt_len:], penalized[:, :6])
    assert torch.equal(ours.generate(input_ids, max_new_tokens=12)[:, prompt_len:], penalized)
    explicit = ours.generate(input_ids, max_new_tokens=12, repetition_penalty=1.0)
    assert torch.equal(explicit[:, prompt_len:], plain)
    assert ours.generate(input_ids, max_length=prompt_len + 2).shape == (1, prompt_len + 2)


def test_G2_do_sample_of_the_file_yields_to_the_argument(load):
    ours, theirs = load({"do_sample": True, "temperature": 5.0, "top_p": 0.9, "max_new_tokens": 12})
    input_ids = ids_of(PROMPTS[0])
    greedy = their_greedy(theirs, [PROMPTS[0]], 12)[0]
    assert torch.equal(our_greedy(ours, [PROMPTS[0]], 12), greedy)
    sampled = ours.generate(input_ids, seed=1)
    assert not torch.equal(sampled[:, input_ids.shape[1] :], greedy)
    assert torch.equal(sampled, ours.generate(input_ids, do_sample=True, temperature=5.0, top_p=0.9, seed=1))
    assert not torch.equal(sampled, ours.generate(input_ids, seed=2))


# --- masks and padding -----------------------------------------------------------------------------------------------


def test_G3_a_missing_mask_is_inferred_from_pad_tokens(load):
    ours, theirs = load(pad_token_id=PAD)
    input_ids, mask = left_padded(PROMPTS[:3], PAD)
    inferred = ours.generate(input_ids, max_new_tokens=8)
    assert torch.equal(inferred, ours.generate(input_ids, mask, max_new_tokens=8))
    assert torch.equal(inferred, theirs.generate(input_ids, max_new_tokens=8, do_sample=False))
    assert not torch.equal(inferred, ours.generate(input_ids, torch.ones_like(mask), max_new_tokens=8))


def test_G3_pad_that_is_eos_counts_as_text_with_a_warning(load):
    ours, theirs = load(pad_token_id=PAD, eos_token_id=[3, PAD])
    input_ids, mask = left_padded(PROMPTS[:3], PAD)
    with pytest.warns(UserWarning, match="attention_mask"):
        out = ours.generate(input_ids, max_new_tokens=8)
    assert torch.equal(out, ours.generate(input_ids, torch.ones_like(mask), max_new_tokens=8))
    assert torch.equal(out, theirs.generate(input_ids, max_new_tokens=8, do_sample=False))


def test_G3_without_a_pad_token_every_id_is_text(pair):
    """No pad, no eos: whatever fills ended rows must not be taken for padding of prompts, 0 included."""
    ours, theirs = pair
    input_ids = ids_of([0, 4, 0, 0, 7])
    out = ours.generate(input_ids, max_new_tokens=8)
    assert torch.equal(out, ours.generate(input_ids, torch.ones_like(input_ids), max_new_tokens=8))
    assert torch.equal(out, theirs.generate(input_ids, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_G6_padded_rows_equal_the_rows_alone(pair, side):
    """Bit for bit: the same tokens from logits that are compared in tests/engine; here through padding and masks."""
    ours, _ = pair
    longest = max(map(len, PROMPTS))
    input_ids = torch.full((len(PROMPTS), longest), 1)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(PROMPTS):
        pads = longest - len(prompt)
        start = {"left": pads, "right": 0, "middle": pads // 2}[side]
        input_ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    together = ours.generate(input_ids, mask, max_new_tokens=20)
    assert torch.equal(together[:, :longest], input_ids)
    for row, prompt in enumerate(PROMPTS):
        alone = ours.generate(ids_of(prompt), max_new_tokens=20)
        assert torch.equal(together[row, longest:], alone[0, len(prompt) :])


def test_G6_negative_control_attended_padding_changes_the_text(pair):
    ours, _ = pair
    input_ids, mask = left_padded([PROMPTS[1], PROMPTS[3]], 1)
    right = ours.generate(input_ids, mask, max_new_tokens=20)
    wrong = ours.generate(input_ids, torch.ones_like(mask), max_new_tokens=20)
    assert not torch.equal(right[0], wrong[0])
    assert torch.equal(right[1], wrong[1])


def ending_ids(theirs, prompts):
    """Two ids that end some of these rows early, at different steps."""
    tokens, _ = their_greedy(theirs, prompts, 20)
    return [tokens[0, 3].item(), tokens[1, 9].item()]


def test_G8_ended_rows_are_filled_with_pad(pair):
    ours, theirs = pair
    eos = ending_ids(theirs, PROMPTS)
    input_ids, mask = left_padded(PROMPTS, PAD)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": eos, "pad_token_id": PAD}
    out = ours.generate(input_ids, mask, **options)
    assert torch.equal(out, theirs.generate(input_ids, attention_mask=mask, **options))
    new = out[:, input_ids.shape[1] :]
    ended = (new == PAD).any(-1)
    assert ended[:2].all()
    assert not ended.all(), "one row must outlast the others"


def test_G8_generation_ends_when_all_rows_have_ended(pair):
    ours, theirs = pair
    eos = ending_ids(theirs, PROMPTS)
    out = our_greedy(ours, PROMPTS[:2], 20, eos_token_id=eos, pad_token_id=PAD)
    assert torch.equal(out, their_greedy(theirs, PROMPTS[:2], 20, eos_token_id=eos, pad_token_id=PAD)[0])
    assert out.shape[1] < 20


FORMS = {
    "list": list,
    "tuple": tuple,
    "array": np.array,
    "tensor": torch.tensor,
    "int": lambda ids: ids[0],
    "int64": lambda ids: np.int64(ids[0]),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_G4_an_unset_pad_is_the_first_eos(pair, form):
    ours, theirs = pair
    first, second = ending_ids(theirs, PROMPTS)
    eos = form([first, second])
    out = our_greedy(ours, PROMPTS, 20, eos_token_id=eos)
    theirs_eos = [int(token_id) for token_id in eos] if np.ndim(eos) else int(eos)
    assert torch.equal(out, their_greedy(theirs, PROMPTS, 20, eos_token_id=theirs_eos)[0])
    step = out[0].tolist().index(first)
    assert (out[0, step:] == first).all()
    assert step < 19


def test_G4_eos_of_config_and_generation_config(load):
    """generation_config.json's list wins over config.json's id; without the file config.json's counts (C35)."""
    _, theirs = load()
    first, second = ending_ids(theirs, PROMPTS)
    ended = [their_greedy(theirs, PROMPTS[:1], 20, eos_token_id=eos)[0] for eos in (first, [second, first])]
    ours, _ = load(eos_token_id=first)
    assert torch.equal(our_greedy(ours, PROMPTS[:1], 20), ended[0])
    ours, _ = load({"eos_token_id": [second, first]}, eos_token_id=95)
    assert torch.equal(our_greedy(ours, PROMPTS[:1], 20), ended[1])


def test_G9_ties_go_to_the_lowest_id(load):
    ours, theirs = load()
    with torch.no_grad():
        for model in (ours, theirs):
            model.lm_head.weight[:] = 0  # every logit is 0
    expected = their_greedy(theirs, PROMPTS[:2], 3)[0]
    assert torch.equal(our_greedy(ours, PROMPTS[:2], 3), expected)
    assert not expected.any()


@pytest.mark.parametrize("min_new_tokens", [1, 5, 12])
def test_G10_min_new_tokens_forbids_eos(pair, min_new_tokens):
    ours, theirs = pair
    options = {"eos_token_id": ending_ids(theirs, PROMPTS), "min_new_tokens": min_new_tokens}
    assert torch.equal(our_greedy(ours, PROMPTS, 20, **options), their_greedy(theirs, PROMPTS, 20, **options)[0])


@pytest.mark.parametrize("penalty", [0.6, 1.3, 2.5])
def test_G10_repetition_penalty_counts_prompt_and_generated_tokens(pair, penalty):
    """Row by row: in a batch transformers penalizes the padding's id as if the prompt held it."""
    ours, theirs = pair
    together = our_greedy(ours, PROMPTS, 24, repetition_penalty=penalty)
    for row, prompt in enumerate(PROMPTS):
        expected = their_greedy(theirs, [prompt], 24, repetition_penalty=penalty)[0]
        assert torch.equal(together[row], expected[0])
        assert not torch.equal(expected, their_greedy(theirs, [prompt], 24)[0])

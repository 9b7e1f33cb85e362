"""generate(): samples, one model over many calls, and what is refused."""

import pytest
import torch

from llama_fast import LlamaForCausalLM
from llama_fast.errors import RequestError, UnsupportedError
from tests.api.transformers_runs import left_padded, our_greedy, save_checkpoint, their_greedy, tiny_fields

PAD = 96
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20], [30, 31, 32, 33]]


def ids_of(prompt):
    return torch.tensor([prompt])


# --- samples ---------------------------------------------------------------------------------------------------------


def test_G21_samples_of_a_prompt_stand_together(pair):
    ours, _ = pair
    input_ids, mask = left_padded(PROMPTS, PAD)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 12}
    out = ours.generate(input_ids, mask, seed=7, **options)
    assert torch.equal(out[:, : input_ids.shape[1]], input_ids.repeat_interleave(3, dim=0))
    new = out[:, input_ids.shape[1] :]
    assert len({tuple(row) for row in new.tolist()}) == 9
    for index, prompt in enumerate(PROMPTS):
        alone = ours.generate(ids_of(prompt), seed=7 + index, **options)
        assert torch.equal(new[3 * index : 3 * index + 3], alone[:, len(prompt) :])


def test_G21_greedy_with_several_samples_is_refused(pair):
    with pytest.raises(ValueError, match="greedy"):
        pair[0].generate(ids_of([1, 2]), max_new_tokens=2, do_sample=False, num_return_sequences=2)


def test_G12_unseeded_samples_follow_torchs_generator(pair):
    ours, _ = pair
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(ours.generate(ids_of(PROMPTS[0]), do_sample=True, max_new_tokens=12))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


# --- one model, many calls -------------------------------------------------------------------------------------------


def test_inference_mode_may_come_and_go(tmp_path, pair):
    """Of the calls, and of the load."""
    save_checkpoint(tiny_fields(), tmp_path)
    input_ids = ids_of(PROMPTS[0])
    expected = pair[0].generate(input_ids, max_new_tokens=5)
    with torch.inference_mode():
        ours = LlamaForCausalLM.from_pretrained(tmp_path, device="cpu")
        assert torch.equal(ours.generate(input_ids, max_new_tokens=5), expected)
    assert torch.equal(ours.generate(input_ids, max_new_tokens=5), expected)


def test_inference_mode_inside_does_not_break_calls_outside(load):
    ours, _ = load()
    input_ids = ids_of(PROMPTS[0])
    with torch.inference_mode():
        inside = ours.generate(input_ids, max_new_tokens=5)
    assert torch.equal(ours.generate(input_ids, max_new_tokens=5), inside)


def test_C4_num_hidden_layers_truncates_the_stack_and_back(load):
    ours, theirs = load()
    for num_layers in (1, 2):
        ours.config.num_hidden_layers = theirs.config.num_hidden_layers = num_layers
        assert torch.equal(our_greedy(ours, PROMPTS[:1], 8), their_greedy(theirs, PROMPTS[:1], 8)[0])


def test_the_dtype_may_change_between_calls(load):
    ours, _ = load()
    first = our_greedy(ours, PROMPTS, 8)
    our_greedy(ours.double(), PROMPTS, 8)
    assert torch.equal(our_greedy(ours.float(), PROMPTS, 8), first)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("stopping_criteria", []),
        ("logits_processor", []),
        ("streamer", object()),
        ("stop_strings", ["."]),
        ("past_key_values", object()),
        ("return_dict_in_generate", True),
        ("no_repeat_ngram_size", 2),
        ("max_newtokens", 5),
    ],
)
def test_unsupported_arguments_are_refused_by_name(pair, name, value):
    with pytest.raises(UnsupportedError, match=rf"generate\({name}="):
        pair[0].generate(ids_of([1, 2]), max_new_tokens=2, **{name: value})


@pytest.mark.parametrize(
    ("input_ids", "options", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, "not empty"),
        (torch.tensor([1, 2]), {}, "batch_size, seq_len"),
        (torch.tensor([[1, 97]]), {}, r"\[1\]=97"),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.zeros(1, 2)}, "no tokens"),
        (torch.tensor([[1, 2]]), {"temperature": -1.0, "do_sample": True}, "temperature=-1.0"),
        (torch.tensor([[1, 2]]), {"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        (torch.tensor([[1, 2]]), {"num_return_sequences": 0}, "=0 is not accepted"),
        (torch.tensor([[1.5, 2.0]]), {}, "input_ids must be"),
        (torch.tensor([[1, 2]]), {"eos_token_id": "</s>"}, "eos_token_id"),
        (torch.tensor([[1, 2]]), {"max_new_tokens": None, "max_length": "9"}, "max_length='9'"),
    ],
)
def test_invalid_arguments_are_refused(pair, input_ids, options, message):
    with pytest.raises(RequestError, match=message):
        pair[0].generate(input_ids, **{"max_new_tokens": 2, **options})

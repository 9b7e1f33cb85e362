"""Loss, gradients, logits_to_keep and save_pretrained of LlamaForCausalLM against transformers."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import GenerationConfig
from transformers import LlamaForCausalLM as HFModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama_fast import LlamaConfig, LlamaForCausalLM, demo
from llama_fast.errors import ConfigError, RequestError, UnsupportedError
from tests.api.transformers_runs import BORDER, LOGITS_ATOL, left_padded, save_checkpoint, tiny_fields

BIASED = {"attention_bias": True, "mlp_bias": True}
EPS = torch.finfo(torch.float32).eps


def both(folder, **changes):
    theirs = save_checkpoint(tiny_fields(**changes), folder)
    return LlamaForCausalLM.from_pretrained(folder, device="cpu"), theirs


def trainable(folder, **options):
    return LlamaForCausalLM.from_pretrained(folder, device="cpu", **options).requires_grad_(True)


def labelled_batch(side="right"):
    """input_ids, attention_mask and labels of three rows; padding, and a few tokens more, are ignored."""
    rows = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [2, 7, 1, 8, 2, 8], [1, 6, 1, 8, 0, 3, 3, 9, 8, 8]]
    input_ids, mask = left_padded(rows)
    if side == "right":
        for row, ids in enumerate(rows):
            input_ids[row], mask[row] = input_ids[row].roll(len(ids)), mask[row].roll(len(ids))
    labels = input_ids.masked_fill(mask == 0, -100)
    if side == "left":
        # Padding predicts the first real token, with logits that mean nothing.
        labels[torch.arange(3), mask.argmax(-1)] = -100
    labels[0, 4:7] = -100
    return input_ids, mask, labels


# --- L4: loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_L4_loss_equals_transformers(tmp_path, side):
    ours, theirs = both(tmp_path)
    input_ids, mask, labels = labelled_batch(side)
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask=mask, labels=labels)
        out = ours(input_ids, attention_mask=mask, labels=labels)
    assert out.loss.dtype == torch.float32
    kept = mask.bool()
    difference = (out.logits - expected.logits)[kept].abs().max().item()
    assert difference <= LOGITS_ATOL
    # Cross entropy moves by at most twice what its logits move by; both means round a few times.
    assert abs(out.loss - expected.loss) <= 2 * difference + 4 * EPS * expected.loss


def test_L4_what_padding_would_predict_is_not_scored(tmp_path):
    """Labels -100 at padding only, as a collator makes them: under left padding the first token has no predictor."""
    ours, _ = both(tmp_path)
    input_ids, mask, labels = labelled_batch("left")
    unmasked = labels.clone()
    first = (torch.arange(3), mask.argmax(-1))
    unmasked[first] = input_ids[first]
    assert not torch.equal(labels, unmasked)
    assert torch.equal(
        ours(input_ids, attention_mask=mask, labels=unmasked).loss,
        ours(input_ids, attention_mask=mask, labels=labels).loss,
    )


def test_L4_position_t_predicts_label_t_plus_1(tmp_path):
    """By hand: the loss of one scored label, and its difference from the unshifted one."""
    ours, _ = both(tmp_path)
    input_ids = torch.tensor([[3, 1, 4, 1, 5]])
    labels = torch.full_like(input_ids, -100)
    labels[0, 3] = 42
    out = ours(input_ids, labels=labels)
    logprobs = out.logits.double().log_softmax(-1)[0, :, 42]
    assert out.loss.item() == pytest.approx(-logprobs[2].item(), rel=8 * EPS)
    assert out.loss.item() != pytest.approx(-logprobs[3].item(), rel=1e-2)


def test_L4_all_labels_ignored_is_nan(tmp_path):
    ours, theirs = both(tmp_path)
    input_ids = torch.tensor([[3, 1, 4]])
    for model in (ours, theirs):
        assert model(input_ids, labels=torch.full_like(input_ids, -100)).loss.isnan()
        assert model(input_ids[:, :1], labels=input_ids[:, :1]).loss.isnan()
    assert ours(input_ids).loss is None


@pytest.mark.parametrize("name", ["num_items_in_batch", "shift_labels", "past_key_values", "inputs_embeds", "label"])
def test_unsupported_arguments_are_refused_by_name(tmp_path, name):
    ours, _ = both(tmp_path)
    with pytest.raises(UnsupportedError, match=rf"forward\({name}="):
        ours(torch.tensor([[1, 2]]), **{name: torch.tensor([[1, 2]])})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": torch.tensor([[1, 2, 3]])}, "labels must be"),
        ({"attention_mask": torch.ones(2, 2)}, "attention_mask has shape"),
        ({"position_ids": torch.arange(3)[None]}, "position_ids has shape"),
        ({"labels": torch.tensor([[1, 2]]), "logits_to_keep": 1}, "leave logits_to_keep at 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(tmp_path, options, message):
    ours, _ = both(tmp_path)
    with pytest.raises(RequestError, match=message):
        ours(torch.tensor([[1, 2]]), **options)


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(model, batch):
    input_ids, mask, labels = batch
    return gradients_of(model(input_ids, attention_mask=mask, labels=labels).loss, model)


def gradients_of(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


def worst_error(grads, exact):
    """Over all elements, relative to the largest gradient of the same parameter."""
    assert grads.keys() == exact.keys()
    return max(((grads[name] - exact[name]).abs().max() / exact[name].abs().max()).item() for name in exact)


def exact_gradients(theirs, ours, batch, monkeypatch):
    """Transformers in fp64, where its norms and loss do not round to fp32; cos and sin, fp32 in both, are ours."""

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(x, position_ids):
        lengths = position_ids.amax(-1, keepdim=True).expand_as(position_ids) + 1
        cos, sin = ours.model.rotary(position_ids.flatten(), lengths.flatten())
        return cos.view(*position_ids.shape, -1).to(x.dtype), sin.view(*position_ids.shape, -1).to(x.dtype)

    exact = copy.deepcopy(theirs).double()
    with monkeypatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", norm)
        patch.setattr(exact.model.rotary_emb, "forward", rotary)
        input_ids, mask, labels = batch
        logits = exact(input_ids, attention_mask=mask).logits
        return gradients_of(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), exact)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, BIASED, {"num_key_value_heads": 1, "hidden_act": "gelu_new", "head_dim": 8}],
    ids=["gqa", "tied", "biased", "mqa_gelu"],
)
def test_gradients_of_all_parameters(tmp_path, monkeypatch, changes, side):
    theirs = save_checkpoint(tiny_fields(**changes), tmp_path)
    ours, batch = trainable(tmp_path), labelled_batch(side)
    exact = exact_gradients(theirs, ours, batch, monkeypatch)
    error, their_error = worst_error(gradients(ours, batch), exact), worst_error(gradients(theirs, batch), exact)
    assert sum(gradient.numel() for gradient in exact.values()) >= 4096
    # At most twice PyTorch's own error, plus an ulp.
    assert error <= 2 * their_error + EPS
    # In fp64 the same count of roundings, each 2**29 times smaller, in either of the two that are compared.
    assert worst_error(gradients(trainable(tmp_path, dtype="float64"), batch), exact) <= 4 * their_error * 2**-29


def test_negative_control_a_wrong_gradient_is_found(tmp_path, monkeypatch):
    theirs = save_checkpoint(tiny_fields(), tmp_path)
    ours, batch = trainable(tmp_path), labelled_batch()
    exact = exact_gradients(theirs, ours, batch, monkeypatch)
    ours.model.norm.eps = 1e-3
    assert worst_error(gradients(ours, batch), exact) > 100 * worst_error(gradients(theirs, batch), exact)


def test_a_training_step_reaches_generate_and_leaves_the_file_alone(tmp_path):
    theirs = save_checkpoint(tiny_fields(), tmp_path)
    ours = trainable(tmp_path)
    input_ids, mask, labels = labelled_batch()
    before = ours.generate(input_ids[:1], max_new_tokens=10)
    file_bytes = (tmp_path / "model.safetensors").read_bytes()
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(input_ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    after = ours.generate(input_ids[:1], max_new_tokens=10)
    assert not torch.equal(before, after)
    assert torch.equal(after, theirs.generate(input_ids[:1], max_new_tokens=10, do_sample=False))
    assert (tmp_path / "model.safetensors").read_bytes() == file_bytes


# --- L2: logits_to_keep ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [0, 1, 3, 14, 20, torch.tensor([0, 5, 5, 2]), torch.tensor([-1, 7])], ids=str)
def test_L2_logits_to_keep(tmp_path, keep, side):
    ours, theirs = both(tmp_path)
    input_ids, mask, _ = labelled_batch(side)
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask=mask, logits_to_keep=keep).logits
    logits = ours(input_ids, attention_mask=mask, logits_to_keep=keep).logits
    assert logits.shape == expected.shape
    kept_columns = torch.arange(14)[slice(-keep, None) if isinstance(keep, int) else keep]
    kept = mask.bool()[:, kept_columns]
    assert kept.any()
    torch.testing.assert_close(logits[kept], expected[kept], rtol=0, atol=LOGITS_ATOL)
    assert torch.equal(logits, ours(input_ids, attention_mask=mask).logits[:, kept_columns])


# --- F11, L5: saving -------------------------------------------------------------------------------------------------


def stored_tensors(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 -- a safetensors file is no mapping
                assert name not in tensors
                tensors[name] = file.get_tensor(name)
    return tensors


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB", 9000])
@pytest.mark.parametrize("tied", [True, False])
def test_F11_transformers_loads_what_we_save_and_back(tmp_path, dtype, max_shard_size, tied):
    first, second, third = (tmp_path / name for name in ("theirs", "ours", "back"))
    theirs = save_checkpoint(tiny_fields(tie_word_embeddings=tied, **BIASED), first, dtype=dtype)
    ours = LlamaForCausalLM.from_pretrained(first, device="cpu")
    ours.save_pretrained(second, max_shard_size=max_shard_size)
    assert (second / "model.safetensors.index.json").exists() == (max_shard_size != "5GB")
    # L5: a tied head is stored once.
    assert ("lm_head.weight" in stored_tensors(second)) == (not tied)
    assert_same_weights(stored_tensors(first), stored_tensors(second))

    reloaded, info = HFModel.from_pretrained(second, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_weights(theirs.state_dict(), reloaded.state_dict())
    reloaded.save_pretrained(third)
    back = LlamaForCausalLM.from_pretrained(third, device="cpu")
    assert back.dtype == dtype
    assert_same_weights(ours.state_dict(), back.state_dict())


def test_F11_a_model_from_a_config_saves_and_loads(tmp_path):
    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=33, num_hidden_layers=2, num_attention_heads=6
    )
    torch.manual_seed(0)
    ours = LlamaForCausalLM(config)
    ours.save_pretrained(tmp_path)
    theirs = HFModel.from_pretrained(tmp_path, dtype="auto").eval()
    assert_same_weights(ours.state_dict(), theirs.state_dict())
    input_ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids).logits, theirs(input_ids).logits, rtol=0, atol=LOGITS_ATOL)


ORIGINAL = {"original_max_position_embeddings": BORDER}
ROPES = {
    "R1_default": {"rope_type": "default", "rope_theta": 500000.0},
    "R2_linear": {"rope_type": "linear", "factor": 2.5},
    "R3_dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "R4_yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20.0, **ORIGINAL},
    "R5_longrope": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0, 2.5] * 4, **ORIGINAL},
    "R6_llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_F11_transformers_computes_the_same_from_our_config(tmp_path, rope):
    theirs = save_checkpoint(
        tiny_fields(rope, rms_norm_eps=1e-4, hidden_act="gelu", eos_token_id=[3, 4], pad_token_id=5, **BIASED), tmp_path
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4], "temperature": 0.6}))
    LlamaForCausalLM.from_pretrained(tmp_path, device="cpu").save_pretrained(tmp_path / "ours")
    reloaded = HFModel.from_pretrained(tmp_path / "ours", dtype="auto").eval()
    input_ids = torch.randint(97, (1, BORDER + 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids).logits, theirs(input_ids).logits)
    assert (reloaded.config.eos_token_id, reloaded.config.pad_token_id) == ([3, 4], 5)
    assert reloaded.config.architectures == ["LlamaForCausalLM"]
    generation_config = GenerationConfig.from_pretrained(tmp_path / "ours")
    assert (generation_config.eos_token_id, generation_config.temperature) == ([3, 4], 0.6)


def test_what_cannot_be_written_is_told_before_the_weights_are(tmp_path):
    model = LlamaForCausalLM.from_pretrained(demo.PATH)
    model.save_pretrained(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    model.config.hidden_act = torch.relu
    with pytest.raises(ConfigError, match="hidden_act"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before

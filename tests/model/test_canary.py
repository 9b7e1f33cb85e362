"""The canary of int4 files: silent for other roundings of the same weights, and it names the layer that is wrong."""

import json

import pytest
import torch
from safetensors import safe_open

from llama_fast import Int4Config, LlamaForCausalLM, demo
from llama_fast.errors import CheckpointFormatError
from llama_fast.model.canary import FINGERPRINT, KEY, Canary, fingerprint, make_canary, replay
from llama_fast.model.int4_modules import int4_linears
from llama_fast.model.verify import verify_checkpoint
from llama_fast.ops import reference

DEMO = demo.__path__[0]
PROMPT = [5, 100, 7, 1999, 30, 2, 77, 500]


def load(quantization=None, **arguments):
    model = LlamaForCausalLM.from_pretrained(DEMO, quantization=quantization, backend="reference", **arguments)
    model.prepare(reference)
    return model


@pytest.fixture(scope="module")
def made():
    model = load("int4")
    return make_canary(model, reference, PROMPT, load())


def spoil(model, layer, kind):
    """What a reader that is wrong would make of one layer."""
    for _, linear in int4_linears(model.model.layers[layer]):
        if kind == "zero":
            linear.weight_zero_point.data += 1
        elif kind == "order":
            linear.weight_packed.data = linear.weight_packed.data.flip(1)
        elif kind == "scales":
            linear.weight_scale.data = linear.weight_scale.data.roll(1, 0)
        else:
            assert kind == "nibbles"
            words = linear.weight_packed.data.view(torch.uint8)
            linear.weight_packed.data = ((words >> 4) | (words << 4)).view(torch.int32)
    model.refresh()
    model.prepare(reference)


def test_the_same_model_agrees_bit_for_bit(made):
    again = Canary.from_json(made.to_json(), "file")
    assert again == made
    result = replay(again, load("int4"), reference, "file")
    assert not result.problem and max(result.deviations) == result.logits_deviation == 0
    assert len(made.errors) == 4 and all(0.001 < error < 0.3 for error in made.errors), made.errors


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_roundings_agree(made, dtype):
    # The same integers, and scales that both dtypes hold; sums and activations round otherwise.
    model = load("int4").to(getattr(torch, dtype))
    model.prepare(reference)
    result = replay(made, model, reference, "file")
    assert not result.problem and 0 < max(result.deviations) < min(made.errors)


@pytest.mark.parametrize("skip", ["layers.0", "self_attn", "mlp"])
def test_a_layer_that_is_its_original_is_no_problem(skip):
    """Its distance from the original is 0, and other backends round otherwise all the same."""
    from llama_fast.ops import select_backend

    config = Int4Config(32, skip=[skip])
    canary = make_canary(load(config), reference, PROMPT, load())
    assert min(canary.errors) == 0 or skip != "layers.0"
    for dtype in (torch.bfloat16, torch.float32):
        model = load(config).to(dtype)
        ops = select_backend("auto", model.device, dtype)
        model.prepare(ops)
        assert not replay(canary, model, ops, "file").problem


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("kind", ["zero", "order", "scales", "nibbles"])
def test_what_is_read_wrongly_is_found_and_its_layer_named(layer, kind):
    asymmetric = Int4Config(symmetric=False)
    canary = make_canary(load(asymmetric), reference, PROMPT, load())
    model = load(asymmetric)
    spoil(model, layer, kind)
    result = replay(canary, model, reference, "file")
    assert result.problem.startswith(f"layer {layer} disagrees: it is off by")
    assert all(deviation == 0 for deviation in result.deviations[:layer])


def test_a_wrong_head_is_found():
    head = Int4Config(lm_head="int4")
    model = load(head)
    canary = make_canary(model, reference, PROMPT, load())
    model.lm_head.weight_scale.data = model.lm_head.weight_scale.data * 1.5
    model.refresh()
    model.prepare(reference)
    assert replay(canary, model, reference, "file").problem.startswith(
        "the layers agree, but the logits are off by 0.5"
    )


def test_signs_of_the_fingerprint():
    signs = torch.stack([fingerprint(row) for row in torch.eye(512)], 1) * FINGERPRINT**0.5
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    gram = signs.T @ signs / FINGERPRINT - torch.eye(512)
    # As independent signs have: none alike, sums of 64 of them about 8.
    assert gram.abs().max() < 0.7 and 0.11 < gram.pow(2).mean().sqrt() < 0.14
    difference = torch.randn(2048)
    assert 0.6 < fingerprint(difference).norm() / difference.norm() < 1.5


def test_saved_files_carry_one_and_verify_replays_it(tmp_path):
    load("int4").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        content = json.loads(file.metadata()[KEY])
    assert content["errors"] is None and len(content["layers"]) == 4 and len(content["noise"]) == 5
    report = verify_checkpoint(tmp_path)
    # Noted by the reference backend, and replayed by the one that is fastest here.
    assert not report.problems and report.canary_deviation < 0.05

    model = load("int4")
    spoil(model, 1, "order")
    from llama_fast.model.saving import save_model

    save_model(model, tmp_path, canary=Canary.from_json(json.dumps(content), "x"))
    (problem,) = verify_checkpoint(tmp_path).problems
    assert problem.startswith("canary: layer 1 disagrees: it is off by")


def test_a_float_checkpoint_has_none(tmp_path):
    load().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert verify_checkpoint(tmp_path).canary_deviation is None


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"layers": [[0.0] * 3]},
        {"layers": 5},
        {"logits": ["a"]},
        {"token_ids": []},
        {"errors": [0.1]},
        {"noise": [0.1]},
        {"noise": [float("inf")] * 5},
        {"noise": [-1.0] * 5},
        {"token_ids": [1] * 257},
        {"vocab_ids": [1] * 1025, "logits": [0.5] * 1025},
        {"vocab_ids": [], "logits": []},
        {"more": 1},
    ],
)
def test_a_malformed_one(made, change):
    content = json.loads(made.to_json()) | change
    with pytest.raises(CheckpointFormatError, match="file: the canary cannot be read"):
        Canary.from_json(json.dumps(content), "file")
    for text in ("[]", "{", "5", "{}"):
        with pytest.raises(CheckpointFormatError, match="file: the canary cannot be read"):
            Canary.from_json(text, "file")


def test_one_of_another_model(made):
    for content in (
        {"token_ids": [9999]},
        {"vocab_ids": [-1] * len(made.vocab_ids)},
        {"layers": made.layers[:3], "noise": made.noise[:4]},
    ):
        other = Canary.from_json(json.dumps({**json.loads(made.to_json()), "errors": None, **content}), "file")
        with pytest.raises(CheckpointFormatError, match="canary is of another model"):
            replay(other, load("int4"), reference, "file")

"""What LLM makes of files that disagree with each other, and how it loads them."""

import json

import pytest
import torch

from llama_fast import LLM, LlamaForCausalLM, LlamaTokenizer, SamplingParams, cli
from llama_fast.errors import CheckpointMismatchError, ConfigError, RequestError
from llama_fast.model.checkpoint import CheckpointFiles
from tests.byte_model import save_byte_model

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture
def folder(tmp_path):
    return save_byte_model(tmp_path)


@pytest.fixture
def reads(monkeypatch):
    """Names of the tensors that were read."""
    names = []
    for method in ("tensor", "copy", "chunks"):
        monkeypatch.setattr(CheckpointFiles, method, lambda self, name, *_: names.append(name))
    return names


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _add_token(folder, token, token_id):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"][token] = token_id
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_A14_tokens_beyond_the_embedding_are_named(folder, reads):
    _add_token(folder, "\x1b[2Jä", 258)
    _add_token(folder, "more", 259)
    message = (
        r"2 tokens of the tokenizer .* vocab_size=258 of config.json: \\x1b\[2J\\xe4 \(258\), more \(259\); remove"
    )
    with pytest.raises(CheckpointMismatchError, match=message):
        LLM(folder)
    assert reads == []


def test_A14_a_pad_token_may_lie_beyond(folder, caplog):
    """As in Llama 2's first release; a prompt that holds it is refused."""
    _add_token(folder, "<pad>", 258)
    _edit(folder / "tokenizer_config.json", pad_token="<pad>")
    llm = LLM(folder)
    assert "the pad token '<pad>' has no row in the embedding" in caplog.text
    assert llm.generate("abc", SamplingParams(max_tokens=2))[0].outputs[0].token_ids
    with pytest.raises(RequestError, match="258"):
        llm.generate([97, 258])
    _add_token(folder, "more", 259)
    with pytest.raises(CheckpointMismatchError, match=r"<pad> \(258\), more \(259\)"):
        LLM(folder)


def test_A14_a_tokenizer_may_be_smaller(tmp_path):
    """Rows beyond the tokenizer can be drawn; they give no text and take nothing from their neighbours'."""
    folder = save_byte_model(tmp_path)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.config.vocab_size = 300
    for weight in (model.model.embed_tokens, model.lm_head):
        weight.weight = torch.nn.Parameter(torch.cat([weight.weight, torch.zeros(42, 32)]), requires_grad=False)
    model.save_pretrained(folder)
    llm = LLM(folder)
    assert len(LlamaTokenizer.from_pretrained(folder)) == 258
    only = llm.generate("abc", SamplingParams(max_tokens=5, logit_bias={299: 100.0}))[0].outputs[0]
    assert (only.token_ids, only.text, only.finish_reason) == ([299] * 5, "", "length")
    assert llm.tokenizer.decode([*llm.tokenizer.encode("é")[1:], 299, *llm.tokenizer.encode("x")[1:]]) == "éx"


@pytest.mark.parametrize("load", [LLM, LlamaForCausalLM.from_pretrained])
def test_A16_generation_config_names_an_id_that_is_not_there(folder, reads, load):
    _edit(folder / "generation_config.json", eos_token_id=[257, 258])
    with pytest.raises(ConfigError, match="eos_token_id=258 is not below vocab_size=258"):
        load(folder)
    assert reads == []


def test_copied_and_mapped_weights_give_the_same_tokens(folder, capsys):
    mapped, copied = LLM(folder), LLM(folder, load="copy")
    prompt = "Grüße"
    assert copied.generate(prompt, PARAMS)[0].outputs == mapped.generate(prompt, PARAMS)[0].outputs
    assert cli.main(["generate", "--model", str(folder), "--load=copy", "--max-tokens=8", "--ignore-eos", prompt]) == 0
    assert capsys.readouterr().out == f"{prompt}{mapped.generate(prompt, PARAMS)[0].outputs[0].text}\n"
    ids = torch.tensor([[1, 2, 3]])
    logits = [LlamaForCausalLM.from_pretrained(folder, load=load)(ids).logits for load in ("mmap", "copy")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("load", [LLM, LlamaForCausalLM.from_pretrained])
def test_unknown_ways_to_load(folder, load):
    with pytest.raises(ConfigError, match="load='disk'"):
        load(folder, load="disk")

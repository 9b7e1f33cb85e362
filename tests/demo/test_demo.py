"""The bundled model: what its folder holds, how well it predicts stories, and that its training script works."""

import json
import math
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers import LlamaForCausalLM as HFLlamaForCausalLM

from llama_fast import LlamaForCausalLM, LlamaTokenizer, demo
from llama_fast.demo import train as training
from llama_fast.errors import RequestError

_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def report():
    return json.loads((demo.PATH / "training.json").read_text())


@pytest.fixture(scope="module")
def heldout():
    """Token ids [seq_len] of the held-out stories, from bos to eos."""
    tokenizer = LlamaTokenizer.from_pretrained(demo.PATH)
    stories = (demo.PATH / "heldout.txt").read_text(encoding="utf-8").split("<|endoftext|>\n")[:-1]
    return [torch.tensor([*tokenizer.encode(story.strip()), tokenizer.eos_token_id]) for story in stories]


@pytest.fixture
def story_file(tmp_path):
    """The smallest text that can be trained on, and the folder to train into."""
    shutil.copy(demo.PATH / "heldout.txt", tmp_path / "stories.txt")
    return tmp_path / "stories.txt"


def test_shape_and_size():
    model = LlamaForCausalLM.from_pretrained(demo.PATH)
    config = model.config
    assert model.dtype == torch.bfloat16
    assert 1e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 4e6
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim in (32, 64)
    assert config.max_position_embeddings >= 512
    assert sum(path.stat().st_size for path in demo.PATH.iterdir() if path.is_file()) <= 8_000_000


def test_loads_in_transformers():
    text = "Lily's dog said, “Hi!”\nThey ran 123 miles.  Ünï 🐶 <|end_of_text|>"
    ours, theirs = LlamaTokenizer.from_pretrained(demo.PATH), AutoTokenizer.from_pretrained(demo.PATH)
    assert ours.encode(text) == theirs(text, split_special_tokens=True).input_ids
    assert ours.decode(ours.encode(text), skip_special_tokens=True) == text
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert len(ours) == len(theirs) == LlamaForCausalLM.from_pretrained(demo.PATH).config.vocab_size

    # In fp32: in bf16 the two may round a near-tie differently.
    their_model = HFLlamaForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32)
    our_model = LlamaForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32)
    assert their_model.generation_config.eos_token_id == ours.eos_token_id
    input_ids = torch.tensor([ours.encode("Once upon a time")])
    expected = their_model.generate(input_ids, do_sample=False, max_new_tokens=40)
    actual = our_model.generate(input_ids, do_sample=False, max_new_tokens=40)
    assert ours.decode(actual[0]) == ours.decode(expected[0])


@torch.no_grad()
def test_heldout_perplexity(report, heldout):
    """training.json's number, from transformers and from this package, both in fp32."""
    theirs = HFLlamaForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32)
    total = 0.0
    for input_ids in heldout:
        logits = theirs(input_ids[None, :512]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, input_ids[1:512], reduction="sum").item()
    expected = math.exp(total / sum(min(512, len(input_ids)) - 1 for input_ids in heldout))

    ours = LlamaForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32)
    assert math.exp(training.mean_loss(ours, heldout)) == pytest.approx(expected, rel=1e-5)
    assert report["heldout_perplexity"] == pytest.approx(expected, rel=1e-3)


def test_readme_quotes_the_report(report):
    readme = (demo.PATH / "README.md").read_text(encoding="utf-8")
    for figure in (
        f"{report['parameters']:,}",
        f"{report['steps']:,} steps",
        f"{report['tokens']:,} tokens",
        f"{report['seconds'] / 60:.0f} minutes",
        f"{report['heldout_perplexity']:.2f}",
        report["text_sha256"],
    ):
        assert figure in readme


def test_text_has_heldout_stories(shared_data, report):
    """The file that the model was trained from still splits into the same stories."""
    stories = training.read_stories(shared_data / "text" / "tinystories_2MB.txt")
    heldout = (demo.PATH / "heldout.txt").read_text(encoding="utf-8").split("\n<|endoftext|>\n")[:-1]
    assert stories[20::80] == heldout
    assert report["stories"]["heldout"] == len(heldout)


def test_training_changes_what_generate_says(tmp_path, heldout):
    """generate sees a training step, exactly as a model loaded from the saved weights does."""
    model = LlamaForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32)
    prompt = heldout[0][None, :8]
    before = model.generate(prompt, do_sample=False, max_new_tokens=16)
    model.requires_grad_()
    model(heldout[1][None, :64], labels=heldout[1][None, :64]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    after = model.generate(prompt, do_sample=False, max_new_tokens=16)
    assert after.tolist() != before.tolist()

    model.save_pretrained(tmp_path)
    fresh = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():  # gradients take another, not bitwise equal, route
        assert torch.equal(fresh(prompt).logits, model(prompt).logits)
    assert fresh.generate(prompt, do_sample=False, max_new_tokens=16).tolist() == after.tolist()
    # The step was written to private pages: the bundled file is as it was.
    again = LlamaForCausalLM.from_pretrained(demo.PATH, dtype=torch.float32)
    assert again.generate(prompt, do_sample=False, max_new_tokens=16).tolist() == before.tolist()


def test_train_command(story_file, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # of the whole test run
    out = story_file.parent / "new" / "model"
    training.main(["--text", str(story_file), "--out", str(out), "--steps", "3"])
    assert "held-out perplexity" in capsys.readouterr().out
    report = json.loads((out / "training.json").read_text())
    assert report["steps"] == 3
    assert report["tokens"] == 3 * training.TOKENS_PER_STEP
    model = LlamaForCausalLM.from_pretrained(out)
    assert {name: tuple(tensor.shape) for name, tensor in load_file(out / "model.safetensors").items()} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }
    assert HFLlamaForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_train_learns_and_repeats(story_file, tmp_path):
    def trained(name: str, steps: int, seed: int = 0) -> tuple[dict, dict[str, torch.Tensor]]:
        report = training.train(story_file, tmp_path / name, steps=steps, seed=seed, **_SMALL)
        return report, load_file(tmp_path / name / "model.safetensors")

    short, _ = trained("short", 1)
    long, weights = trained("long", 30)
    assert long["train_loss"] < short["train_loss"]
    assert long["validation_loss"][-1][1] < short["validation_loss"][-1][1]
    assert long["heldout_perplexity"] < short["heldout_perplexity"] < 1.1 * training.VOCAB_SIZE

    _, repeated = trained("repeated", 30)
    assert all(torch.equal(weights[name], repeated[name]) for name in weights)
    _, other = trained("other", 30, seed=1)
    assert not torch.equal(weights["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_interrupted_training_is_saved(story_file, tmp_path, monkeypatch):
    data = training.batches

    def interrupted(*args):
        for count, batch in enumerate(data(*args)):
            if count == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(training, "batches", interrupted)
    report = training.train(story_file, tmp_path / "out", steps=30, **_SMALL)
    assert report["steps"] == 2
    assert report["validation_loss"] == []
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_train_without_matplotlib(story_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    training.train(story_file, tmp_path / "out", steps=1, **_SMALL)
    assert not (tmp_path / "out" / "loss.png").exists()
    assert "pip install 'llama-fast[bench]'" in capsys.readouterr().out


def test_train_refuses(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("one<|endoftext|>two<|endoftext|>unfinished")
    with pytest.raises(RequestError, match="holds 2 stories .* at least 21"):
        training.train(text, tmp_path)
    with pytest.raises(RequestError, match="at least 1 is needed"):
        training.train(text, tmp_path, steps=0)
    text.write_bytes(b"\xff")
    with pytest.raises(RequestError, match="give a UTF-8 text file"):
        training.train(text, tmp_path)
    with pytest.raises(SystemExit):
        training.main(["--text", str(tmp_path / "absent"), "--out", str(tmp_path), "--threads", "1"])
    assert "absent cannot be read" in capsys.readouterr().err


def test_batches_train_every_position():
    stories = [torch.full((100,), index) for index in range(7)]
    generator = torch.Generator().manual_seed(0)
    stream = training.batches(stories, generator)
    rows = [next(stream) for _ in range(8)]
    assert [row.shape[1] for row in rows] == [256, 256, 256, 512] * 2
    assert all(row.numel() == training.TOKENS_PER_STEP for row in rows)
    # 23 epochs of 700 tokens and a rest: every story as often as every other, give or take one.
    counts = torch.cat([row.flatten() for row in rows]).bincount(minlength=7)
    assert counts.max() - counts.min() <= 100

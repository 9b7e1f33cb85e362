"""The equality matrix: it passes where there is one answer, and finds a fault in the path that has it."""

import datetime
import json
from dataclasses import replace

import pytest
import torch

import llama_fast
from llama_fast.config import LlamaConfig
from llama_fast.engine import certify_identity, certify_paths
from llama_fast.engine.certificate import certificate
from llama_fast.engine.certify import Certification
from llama_fast.engine.certify_identity import sources_identity, weights_identity
from llama_fast.engine.certify_loading import load
from llama_fast.engine.certify_locate import first_difference
from llama_fast.engine.certify_paths import paths_of
from llama_fast.engine.certify_recording import RecordingEngine
from llama_fast.engine.certify_requests import MEDIUM, SMALL, make_requests, size_of
from llama_fast.engine.certify_runner import Outcome, SampleOutcome
from llama_fast.engine.decode_graph import DecodeGraph
from llama_fast.engine.prefix_cache import PrefixCache
from llama_fast.errors import OutOfMemoryError
from llama_fast.model.kv_cache import PagedKVCache
from llama_fast.model.llama import LlamaLM
from llama_fast.ops import cpu, reference
from tests.byte_model import save_byte_model
from tests.engine.graph_double import capturing
from tests.tiny import make_model, op_by_op, to_int4

SIZES = {"page_size": 8, "split_size": 32, "size": SMALL}
SMALLEST = replace(SMALL, short=(1, 3), borders=((1, 0, 1), (0, 1, 1)), growing=2, prefix=1, new_tokens=4, most_rows=3)
CAPTURED = {"graphs", "eager"}


@pytest.fixture(scope="module")
def tiny():
    return make_model()


def run(model, *only, **options):
    certification = Certification(model, **{**SIZES, "backend": "cpu", **options})
    certification.run(show_progress=False, only=only or None)
    return certification, {one.path: one for one in certification.results}


def named(results, result):
    return {path for path, one in results.items() if one.result == result}


# --- where there is one answer ----------------------------------------------------------------------------------------


def test_the_tiny_model_passes(tiny):
    before = torch.get_num_threads()
    certification, results = run(tiny)
    assert certification.passed and not named(results, "failed"), results
    assert named(results, "skipped") == CAPTURED
    assert all(one.requests and one.draws for one in results.values() if one.result == "passed")
    assert results["graphs"].reason == "steps are captured on a GPU only"
    assert list(results)[:3] == ["alone", "alone again", "together"]
    assert torch.get_num_threads() == before


def test_the_reference_passes(tiny):
    """Without two threads, which take it many times as long where others keep the second core."""
    names = [path.name for path in paths_of(Certification(tiny, **SIZES).runner) if path.name != "threads 2"]
    _, results = run(tiny, *names, backend="reference", size=SMALLEST)
    assert list(results) == ["alone", *names] and not named(results, "failed"), results
    assert named(results, "skipped") == {*CAPTURED, "op by op"}


@pytest.mark.parametrize(
    "model",
    [
        lambda: make_model(torch.bfloat16),
        lambda: to_int4(make_model(intermediate_size=64, hidden_size=64)),
        lambda: make_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    ],
    ids=["bf16", "int4", "dynamic"],
)
def test_other_models_pass(model):
    certification, results = run(model())
    assert certification.passed, results


def test_captured_steps_are_compared_where_there_are_any(tiny, monkeypatch):
    made = capturing(monkeypatch)
    certification, results = run(tiny)
    assert certification.passed, results
    assert {results[path].result for path in CAPTURED} == {"passed"}
    assert any(getattr(maker, "captured", 0) for maker in made)


def test_a_baseline_is_known_by_its_answers(tiny):
    whole, again, other = (run(one, "alone")[0].answers_sha256() for one in (tiny, make_model(), make_model(seed=1)))
    assert whole == again != other


def test_a_short_context_leaves_requests_out():
    certification, results = run(make_model(max_position_embeddings=30))
    assert max(spec.max_len for spec in certification.runner.requests.specs) <= 30
    assert all(results[path].reason.startswith("not taken: ") for path in named(results, "failed"))
    assert {"together", "preempted", "every row"} <= named(results, "passed")


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_planted_sum_is_found_and_named(tiny):
    certification, results = run(tiny, planted=True)
    assert not certification.passed
    assert results["alone again"].result == "passed"
    assert named(results, "failed") >= {"together", "every row", "batch sizes", "chunks of 1"}
    location = results["together"].location
    assert (location.layer, location.op) == (1, "linear_residual (down_proj)")
    assert location.logits_off_by > 0 and "token" in location.at
    assert "layer 1, linear_residual (down_proj)" in results["together"].reason
    # It was planted in these engines only.
    assert run(tiny, "together")[1]["together"].result == "passed"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_it_is_planted_on_every_backend(tiny, backend):
    model = make_model(torch.bfloat16, attention_bias=True, mlp_bias=True)
    _, results = run(model, "together", backend=backend, planted=True)
    assert results["together"].location.op == "linear_residual (down_proj)"


def test_a_fault_of_one_row_is_found_with_its_op(tiny, monkeypatch):
    """What runs in the third row of a decoding step is a little off."""
    plain = cpu.attention

    def attention(q, pages, batch):
        out = plain(q, pages, batch)
        if batch.generated and len(out) > 2:
            out[2, 0] *= 1 + 2**-20
        return out

    op_by_op(monkeypatch, cpu)
    monkeypatch.setattr(cpu, "attention", attention)
    _, results = run(tiny, "alone again", "every row", "batch sizes")
    assert results["alone again"].result == "passed"
    assert results["every row"].result == results["batch sizes"].result == "failed"
    location = results["every row"].location
    assert (location.op, location.layer) == ("attention", 0)
    assert location.at == "generated token 0"


@pytest.mark.parametrize("copy", ["copy_out", "copy_in"])
def test_a_fault_on_the_way_to_the_host_is_found_where_requests_are_preempted(tiny, monkeypatch, copy):
    plain = getattr(PagedKVCache, copy)

    def wrong(self, *args):
        kept = plain(self, *args)
        if copy == "copy_out":
            kept[..., 0].mul_(2)
        else:
            self.pool[:, :, args[1]] *= 2
        return kept

    monkeypatch.setattr(PagedKVCache, copy, wrong)
    _, results = run(tiny)
    assert "preempted" in named(results, "failed") <= {"preempted", "all at once"}
    location = results["preempted"].location
    assert (location.op, location.layer) == ("K and V in the cache", 0)


def test_a_fault_of_shared_pages_is_found_where_prefixes_are_shared(tiny, monkeypatch):
    plain, engines = PrefixCache.find, []
    monkeypatch.setattr(
        RecordingEngine,
        "make_ready",
        lambda self, plain=RecordingEngine.make_ready: (engines.append(self), plain(self))[1],
    )

    def find(self, *args):
        page = plain(self, *args)
        if page is not None:
            engines[-1].cache.pool[0, 0, page, 0, 0] += 1
        return page

    monkeypatch.setattr(PrefixCache, "find", find)
    _, results = run(tiny)
    assert "shared prefixes" in named(results, "failed") <= {"shared prefixes", "after an abort", "all at once"}
    assert results["shared prefixes"].location.op == "K and V in the cache"


def test_a_fault_of_draws_names_the_sampler(tiny, monkeypatch):
    """Noise by row and not by seed: the logits are the same, the tokens are not."""
    plain = reference.sample

    def sample(logits, batch):
        return plain(logits, batch.__class__(**{**vars(batch), "seeds": torch.arange(logits.shape[0])}))

    monkeypatch.setattr(reference, "sample", sample)
    _, results = run(tiny, "together", backend="reference")
    assert results["together"].location.op == "sample" and results["together"].location.what == "token"


def test_a_fault_of_the_head_is_named(tiny, monkeypatch):
    plain = cpu.norm_lm_head

    def norm_lm_head(x, *args):
        logits = plain(x, *args)
        return logits * (1 + 2**-20) if len(x) > 3 else logits

    monkeypatch.setattr(cpu, "norm_lm_head", norm_lm_head)
    _, results = run(tiny, "together")
    assert results["together"].location.op == "norm_lm_head"


def test_a_fault_of_captured_steps_alone_is_told_as_such(tiny, monkeypatch):
    capturing(monkeypatch)
    plain = DecodeGraph.run

    def run_step(self, size, full):
        plain(self, size, full)
        if self.captures and full:
            self.logits += 1

    monkeypatch.setattr(DecodeGraph, "run", run_step)
    _, results = run(tiny, "together", "graphs", "eager")
    assert results["eager"].result == "passed" and results["graphs"].result == "failed"
    location = results["together"].location
    assert location.op is None and location.logits_off_by == pytest.approx(1) and "captured" in location.note


def test_a_guess_that_is_taken_unseen_is_found(tiny, monkeypatch):
    from llama_fast.engine.decoder import Decoder

    plain = Decoder._read_guesses

    def trusting(self, draw, token_ids, scores):
        for place, guess in draw.guesses.items():
            for one, token_id in zip([place, *guess.places], guess.token_ids, strict=False):
                token_ids[one] = token_id
        return plain(self, draw, token_ids, scores)

    monkeypatch.setattr(Decoder, "_read_guesses", trusting)
    _, results = run(tiny)
    assert "prompt lookup" in named(results, "failed") <= {"prompt lookup", "all at once"}


# --- what is not shown ------------------------------------------------------------------------------------------------


def test_a_path_that_was_not_taken_has_not_passed(tiny, monkeypatch):
    from llama_fast.engine.prompt_lookup import PromptLookup

    for kind in (PromptLookup, certify_paths._KnownAnswer):
        monkeypatch.setattr(kind, "guess", lambda self, most: [])
    certification, results = run(tiny)
    assert not certification.passed
    assert named(results, "failed") == {"prompt lookup"}
    assert results["prompt lookup"].reason == "not taken: no guess was right"


def test_an_error_of_a_path_is_told(tiny, monkeypatch):
    plain = RecordingEngine.__init__

    def init(self, *args, **options):
        if options["prefix_caching"]:
            raise OutOfMemoryError("no room")
        plain(self, *args, **options)

    monkeypatch.setattr(RecordingEngine, "__init__", init)
    certification, results = run(tiny)
    assert results["shared prefixes"].reason == "OutOfMemoryError: no room"
    assert results["together"].result == "passed" and not certification.passed


def test_a_baseline_without_answers_ends_it():
    model = make_model()
    model.lm_head.weight[5] = torch.nan
    certification, results = run(model)
    assert list(results) == ["alone"] and not certification.passed
    assert "NaN" in results["alone"].reason


# --- the parts --------------------------------------------------------------------------------------------------------


def _outcome(**changes):
    fields = {"token_ids": (1, 2), "digests": (b"a", b"b"), "logprobs": [{1: 0}, {2: 0}], "finish_reason": "length"}
    sample = SampleOutcome(**{**fields, "stop_reason": None, "text": "x", **changes})
    return Outcome((sample,), None, None)


@pytest.mark.parametrize(
    ("changes", "token", "what"),
    [
        ({"digests": (b"a", b"c")}, 1, "logits"),
        ({"token_ids": (1, 3)}, 1, "token"),
        ({"token_ids": (1,), "digests": (b"a",)}, 1, "logits"),
        ({"logprobs": [{1: 0}, {2: 1}]}, 1, "log probabilities"),
        ({"finish_reason": "stop"}, None, "finish_reason"),
        ({"stop_reason": 2}, None, "stop_reason"),
        ({"text": "y"}, None, "text"),
        ({"digests": None}, None, None),
    ],
)
def test_what_is_compared(changes, token, what):
    found = first_difference(_outcome(), _outcome(**changes))
    assert (found and (found.token, found.what)) == (what and (token, what))


def test_errors_and_prompt_log_probabilities_are_compared():
    scored = Outcome((), [None, {1: 0}], None)
    assert first_difference(scored, Outcome((), [None, {1: 1}], None)).what == "prompt log probabilities"
    assert first_difference(scored, Outcome((), [None, {1: 0}], "boom")).what == "error: boom"


def test_requests_are_the_same_every_time_and_cover_what_they_should(tiny):
    first, second = (make_requests(tiny, None, MEDIUM, 8, 32).specs for _ in range(2))
    assert first == second
    lengths = {len(spec.prompt) for spec in first}
    assert {1, 7, 8, 9, 16, 30, 33} <= lengths
    params = [spec.params for spec in first]
    for name in ("logprobs", "prompt_logprobs", "top_k", "min_p", "repetition_penalty", "stop_token_ids", "logit_bias"):
        assert any(getattr(one, name) for one in params), name
    assert {one.n for one in params} == {1, 2, 3} and any(one.temperature == 0 for one in params)
    assert any(one.min_tokens for one in params)


def test_sizes(tiny):
    assert size_of(tiny, "cpu", True).name == "medium" and size_of(tiny, "cpu", False).name == "large"
    assert size_of(tiny, "reference", True).name == "small" and size_of(tiny, "reference", False).name == "medium"
    with torch.device("meta"):
        big = LlamaLM(LlamaConfig(hidden_size=2048, num_hidden_layers=4, vocab_size=50000))
    assert size_of(big, "cpu", True).name == "small" and size_of(big, "cpu", False).name == "medium"


# --- the certificate --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_byte_model(tmp_path)
    return tmp_path


def test_a_certificate_says_what_it_is_about(folder):
    model, tokenizer = load(folder, device="cpu", dtype=None)
    certification = Certification(model, tokenizer, backend="cpu", size=SMALL)
    certification.run(show_progress=False)
    told = json.loads(json.dumps(certificate(certification, folder, "bytes"), allow_nan=False))
    assert told["passed"] and told["complete"] and told["planted_fault"] is None
    assert told["model"]["name"] == "bytes" and told["model"]["dtype"] == "float32"
    assert told["model"]["weights"] == weights_identity(folder)
    assert (told["backend"], told["device"]["type"], told["device"]["interpreted"]) == ("cpu", "cpu", False)
    assert told["versions"]["torch"] == torch.__version__ and told["versions"]["llama_fast"] == llama_fast.__version__
    assert told["sources_sha256"] == sources_identity()
    assert datetime.datetime.fromisoformat(told["date"]).tzinfo is not None
    assert told["settings"]["size"]["name"] == "small" and told["settings"]["split_size"] == 256
    assert len(told["requests"]) == len(certification.runner.requests.specs)
    assert {request["group"] for request in told["requests"]} >= {"short", "text", "looping", "scored"}
    paths = {one["path"]: one for one in told["paths"]}
    assert paths["together"]["result"] == "passed" and paths["together"]["draws"] > 0
    assert paths["graphs"]["result"] == "skipped" and "GPU" in paths["graphs"]["reason"]
    assert str(folder) not in json.dumps(told)


def test_a_certificate_of_a_fault_tells_where_it_is(folder):
    model, _ = load(folder, device="cpu", dtype=None)
    certification = Certification(model, backend="cpu", size=SMALL, planted=True)
    certification.run(show_progress=False, only=["together"])
    told = certificate(certification, folder, "bytes")
    assert not told["passed"] and not told["complete"] and "layer 1 sums in two halves" in told["planted_fault"]
    assert told["paths"][1]["location"]["op"] == "linear_residual (down_proj)"


def test_the_hash_of_weights_is_of_config_and_bytes(folder, monkeypatch):
    before = weights_identity(folder)
    assert before == weights_identity(folder) and "every byte" in before["sha256_of"]
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config + " ")
    assert weights_identity(folder)["sha256"] != before["sha256"]
    (folder / "config.json").write_text(config)
    assert weights_identity(folder) == before
    monkeypatch.setattr(certify_identity, "MAX_HASHED_BYTES", 1000)
    sampled = weights_identity(folder)
    assert "64 KiB of every 64 MiB" in sampled["sha256_of"] and sampled["sha256"] != before["sha256"]
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    monkeypatch.undo()
    assert weights_identity(folder)["sha256"] != before["sha256"]


def test_the_hash_of_sources_is_of_every_module():
    told = sources_identity()
    assert all(len(told[name]) == 64 for name in ("python", "csrc")) and told["binaries"]


def test_a_model_without_a_tokenizer_has_no_texts(folder):
    (folder / "tokenizer.json").unlink()
    model, tokenizer = load(folder, device="cpu", dtype=None)
    assert tokenizer is None
    assert not make_requests(model, None, SMALL).of("text")

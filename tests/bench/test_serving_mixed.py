"""bench_throughput.py --mixed: seeded requests, the ideal schedule, steps by their parts, llama.cpp's slots."""

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from llama_fast.model.llama import LlamaLM

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "bench_throughput.py"


@pytest.fixture(scope="module")
def bench():
    """The module; its data classes want it imported by its name."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        yield importlib.import_module("serving_mixed")
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture
def part(bench):
    """Function: a module beside the bench."""
    return importlib.import_module


@pytest.fixture
def throughput(part, monkeypatch):
    """bench_throughput.py on a machine of known rates."""
    rates = part("serving_bounds").Rates(1e9, 1e12)
    monkeypatch.setattr(part("serving_session"), "measure_rates", lambda *_: rates)
    return part("bench_throughput")


@pytest.fixture
def session(part):
    """A session of a tiny model, as bench_throughput.py opens it."""
    config = part("shapes").SHAPES["tiny"]
    model = part("shapes").build_model(
        part("serving_session").LlamaConfig(**config),
        torch.device("cpu"),
        torch.float32,
        0,
        part("serving_session").LlamaForCausalLM,
    )
    args = argparse.Namespace(graphs=True, backend="auto", seed=0, slots=[2], all_slots=False, repeats=1)
    peers = types.SimpleNamespace(running={})
    meter = part("energy").EnergyMeter(torch.device("cpu"))
    return part("serving_session").Session(args, "tiny", model, part("serving_bounds").Rates(1e9, 1e12), meter, peers)


# --- requests ---------------------------------------------------------------------------------------------------------


def test_requests_come_from_the_seed(part):
    requests = part("serving_requests")
    mix = requests.Mix((3, 9), (2, 5))
    drawn = requests.Requests.draw(mix, 200, vocab_size=50, seed=7)
    assert drawn == requests.Requests.draw(mix, 200, vocab_size=50, seed=7)
    assert drawn.first(20) == requests.Requests.draw(mix, 20, vocab_size=50, seed=7)
    other = requests.Requests.draw(mix, 200, vocab_size=50, seed=8)
    assert other.prompt_lens != drawn.prompt_lens and other.output_lens != drawn.output_lens
    assert set(drawn.prompt_lens) == set(range(3, 10)) and set(drawn.output_lens) == set(range(2, 6))
    assert {token_id for prompt in drawn.prompts for token_id in prompt} == set(range(50))


def test_what_requests_add_up_to(part):
    requests = part("serving_requests").Requests([[1, 2], [3, 4, 5, 6]], [3, 2])
    assert (requests.prompt_tokens, requests.generated, requests.decoded, requests.longest) == (6, 5, 3, 6)
    # Prompt tokens attend to 1, 2 and 1, 2, 3, 4; steps run a token that attends to 3, 4 and to 5.
    assert requests.attended == pytest.approx(13 / 6)
    assert requests.context == pytest.approx((3 + 4 + 5) / 3)


def test_shortened_requests_keep_their_proportions(part):
    requests = part("serving_requests")
    some = requests.Requests([[1] * 100, [2] * 50, [3] * 7, [4]], [40, 20, 10, 2])
    short = requests.shortened(some, 2, most_prompt=20, most_output=10)
    assert [(len(prompt), length) for prompt, length in short] == [(20, 10), (10, 5), (1, 2), (1, 2)]
    whole = requests.shortened(some, 2, most_prompt=200, most_output=100)
    assert whole == list(zip(some.prompts, some.output_lens, strict=True))


def test_a_mix_is_read_as_it_is_written(part):
    mix = part("serving_requests").Mix
    assert mix.parse("32-512/16-128") == mix((32, 512), (16, 128))
    assert str(mix((1, 1), (2, 2))) == "1-1/2-2" and mix((32, 512), (16, 128)).longest == 640


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--mixed", "512/128"], "'512/128' is not prompts/outputs like 32-512/16-128"),
        (["--mixed", "9-8/2-4"], "'9-8/2-4' is not prompts/outputs like 32-512/16-128"),
        (["--mixed", "0-8/2-4"], "of 1 and 2 tokens at least"),
        (["--mixed", "1-8/1-4"], "of 1 and 2 tokens at least"),
        (["--mixed", "32-500/1x-64"], "'32-500/1x-64' is not prompts/outputs"),
        (["--mixed", "32-500/16-64"], "--mixed 32-500/16-64: takes up to 564 tokens and the model is made for 512"),
        (["--mixed", "--lengths", "8/8"], "--lengths and --mixed: give one of them"),
        (["--mixed", "--slots", "0"], "--slots 0: give at least 1"),
    ],
)
def test_wrong_usage(throughput, capsys, args, message):
    with pytest.raises(SystemExit, match="2"):
        throughput.main(args)
    assert message in capsys.readouterr().err


def test_a_mix_that_fits_the_model_is_chosen(throughput, part, monkeypatch):
    seen = []
    monkeypatch.setattr(throughput, "run_bench", lambda args, run: seen.append((args, run)) or 0)
    assert throughput.main(["--mixed", "--peers", "llama.cpp", "transformers"]) == 0
    assert throughput.main(["--mixed", "--shape", "llama-1b-32k", "--requests", "8", "--peers", "none"]) == 0
    (demo, run), (large, _) = seen
    assert run is part("serving_mixed").run
    assert (str(demo.mixed), demo.requests, demo.peers, demo.left_out) == (
        "32-256/16-128",
        64,
        ["llama.cpp"],
        ["transformers"],
    )
    assert (str(large.mixed), large.requests, large.peers) == ("32-512/16-128", 8, [])


def test_bounds_of_a_mix_by_hand(part, session):
    bounds, requests = part("serving_bounds"), part("serving_requests")
    model = session.model
    some = requests.Requests([[1] * 10, [1] * 4, [1] * 4], [3, 9, 2])
    weights, decode = bounds.decode_weight_bytes(model), bounds.decode_work(model, 11, some.context)
    prompts = [bounds.prefill_work(model, 1, length) for length in (10, 4, 4)]
    alone = requests.phases(model, some, 1)
    assert alone["prompts"].num_bytes == sum(work.num_bytes for work in prompts)
    assert alone["decoding"].num_bytes == decode.num_bytes + 10 * weights
    # The longest output takes 8 steps behind its prompt, which are more than 11 tokens fill two at once.
    (together,) = requests.phases(model, some, 2).values()
    kv_bytes = decode.num_bytes - weights + bounds.decode_kv_bytes(model, 1, 18)
    assert together.num_bytes == pytest.approx(kv_bytes + 9 * weights)
    assert together.flops == sum(work.flops for work in prompts) + decode.flops
    assert together.flops == alone["prompts"].flops + alone["decoding"].flops
    # 200 tokens fill 100 steps of two.
    (filled,) = requests.phases(model, requests.Requests([[1]] * 100, [3] * 100), 2).values()
    kv_bytes = bounds.decode_kv_bytes(model, 1, 100 + 200 * 2.5)
    assert filled.num_bytes == pytest.approx(101 * weights + kv_bytes)


def test_nothing_is_answered_from_the_cache(part, session, monkeypatch):
    common, generate = part("serving_common"), part("bench_generate")
    prompt = list(range(200))
    engine = session.engine(1, 256)
    for _ in range(2):
        common.serve(engine, [prompt], 4)
    stats = engine.stats()
    assert (engine.prefix_caching, stats.prompt_tokens, stats.shared_tokens) == (False, 400, 0)

    made, engine_class = [], generate.Engine

    def make(model, **options):
        made.append(options)
        return engine_class(model, **{**options, "backend": "auto"})

    for module in (generate, part("gpu_report_engine")):
        monkeypatch.setattr(module, "Engine", make)
    generate.run_batch(session.model, [prompt], 2, "auto")
    part("gpu_report_engine").make_engine(session.model, max_batch=1, max_seq_len=64)
    assert [options["prefix_caching"] for options in made] == [False, False]


# --- the ideal schedule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "kinds", "work", "seconds", "steps"),
    [
        # One by one: four chunks and six steps.
        (1, [(1, 0, 2.0), (0, 10, 5.0)], (40, 6, 3), 32.0, {(1, 0): 6, (0, 10): 4}),
        # Two chunks beside three sequences each; the other 20 tokens fill five steps.
        (4, [(4, 0, 1.0), (3, 100, 3.0)], (200, 26, 5), 11.0, {(4, 0): 5, (3, 100): 2}),
        # Half the chunk is cheaper, with what decodes beside it: 4 * 1.2 + 3.5 < 2 * 3 + 5.
        (4, [(4, 0, 1.0), (3, 100, 3.0), (3, 50, 1.2)], (200, 26, 5), 8.3, {(4, 0): 3.5, (3, 50): 4}),
        # Parts of steps count as parts.
        (4, [(4, 0, 1.0), (3, 100, 3.0)], (50, 1.5 + 2, 1), 2.0, {(4, 0): 0.5, (3, 100): 0.5}),
        # The longest output wants five steps: behind the prompt's four with a sequence each.
        (4, [(4, 0, 1.0), (1, 0, 0.5), (3, 10, 2.0)], (10, 7, 5), 4.0, {(1, 0): 4, (3, 10): 1}),
        # ... and three: two steps with two each are cheaper than a full one beside some with one.
        (4, [(4, 0, 1.0), (2, 0, 0.5), (1, 0, 0.5), (3, 10, 2.0)], (10, 7, 3), 3.0, {(2, 0): 2, (3, 10): 1}),
        # Smaller steps do not count while full ones are enough, however cheap they are.
        (4, [(4, 0, 1.0), (2, 0, 0.1), (3, 10, 2.0), (1, 10, 0.1)], (10, 7, 2), 3.0, {(4, 0): 1, (3, 10): 1}),
        # Steps of more sequences than there are places do not either.
        (2, [(4, 0, 1.0), (2, 0, 1.0), (3, 10, 1.0), (1, 10, 1.5)], (20, 6, 2), 5.0, {(2, 0): 2, (1, 10): 2}),
        # A backend that runs prompts apart.
        (4, [(4, 0, 1.0), (0, 100, 2.0)], (150, 10, 2), 5.5, {(4, 0): 2.5, (0, 100): 1.5}),
    ],
)
def test_ideal_schedules_by_hand(part, places, kinds, work, seconds, steps):
    ideal = part("serving_ideal")
    found = ideal.ideal_schedule([ideal.Kind(*kind) for kind in kinds], places, *work)
    assert found.seconds == pytest.approx(seconds)
    assert {(kind.rows, kind.prompt_tokens): count for kind, count in found.steps} == pytest.approx(steps)
    assert found.num_steps == pytest.approx(sum(steps.values())) and found.num_steps >= work[2] - 1e-9


@pytest.mark.parametrize(
    ("kinds", "work"),
    [
        ([(4, 0, 1.0)], (10, 7, 2)),
        # More steps than tokens.
        ([(4, 0, 1.0), (3, 10, 2.0)], (10, 3, 9)),
        ([], (10, 3, 9)),
    ],
)
def test_steps_that_cannot_do_the_work(part, kinds, work):
    ideal = part("serving_ideal")
    with pytest.raises(ValueError, match=f"run {work[0]} prompt and {work[1]} other tokens"):
        ideal.ideal_schedule([ideal.Kind(*kind) for kind in kinds], 4, *work)


# --- steps ------------------------------------------------------------------------------------------------------------


def test_parts_of_a_step_count_once(part, session, monkeypatch):
    steps, common = part("serving_steps"), part("serving_common")
    engine = session.engine(2, 128)
    now = [0.0]
    monkeypatch.setattr(steps.time, "perf_counter", lambda: now[0])
    scheduler = steps.Scheduler

    def slow(owner, name, seconds):
        function = getattr(owner, name)

        def call(*args, **options):
            now[0] += seconds
            return function(*args, **options)

        monkeypatch.setattr(owner, name, call)

    # A decoding step runs the logits inside of the graph's step; a prompt's run has them outside.
    slow(session.model, "logits", 10.0)
    slow(engine.decoder.graph, "run", 100.0)
    slow(steps.running, "run_works", 1000.0)
    slow(scheduler, "plan", 1.0)
    slow(scheduler, "finish", 2.0)
    slow(steps.running.Running, "_take", 0.25)
    before = scheduler.must_preempt
    with steps.StepClock(engine) as clock:
        answer = common.serve(engine, [[1, 2, 3]], 3)
    assert clock.device_s == [1010.0, 110.0, 110.0]
    assert clock.scheduler_s == [1.0, 1.0, 3.0]
    assert clock.step_s == [1011.25, 111.25, 113.25]
    assert clock.scheduler_share == pytest.approx(5 / sum(clock.step_s))
    assert clock.host_share == pytest.approx(5.75 / sum(clock.step_s))
    assert answer.num_steps == 3
    # All is as it was.
    assert scheduler.must_preempt is before and "step" not in vars(engine)
    common.serve(engine, [[1, 2, 3]], 3)
    assert len(clock.step_s) == 3


def test_steps_are_sampled_by_what_is_in_them(part, session):
    steps, common = part("serving_steps"), part("serving_common")
    sizes = {"chunks": [7, 40, 600], "attended": 30, "context": 100}
    seq_len = steps.StepTimes.seq_len(**sizes)
    assert seq_len == 601
    engine = session.engine(4, seq_len)
    expected = common.serve(engine, [[1, 2, 3]] * 3, 4).token_ids
    times = steps.StepTimes(engine, [1, 4], **sizes, seed=0)
    times.sample()
    times.sample()
    kinds = {(kind.rows, kind.prompt_tokens): kind.seconds for kind in times.kinds()}
    # A step's budget is 512 tokens, of the sequences that decode too.
    beside = {(rows, chunk) for rows in (0, 3) for chunk in (7, 40, 512 - rows)}
    assert set(kinds) == beside | {(rows, 0) for rows in (1, 2, 3, 4)}
    assert all(seconds > 0 for seconds in kinds.values())
    counts = {of: len(samples) for of, samples in times._samples.items()}
    assert {counts[of] for of in beside} == {4} and counts[4, 0] == 6
    # The engine serves on as before.
    assert not engine.has_work
    assert common.serve(engine, [[1, 2, 3]] * 3, 4).token_ids == expected


# --- rounds -----------------------------------------------------------------------------------------------------------


def test_smoke_prints_the_bound_first_and_json_last(tmp_path):
    picture = tmp_path / "mixed.png"
    plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--mixed", "--device", "cpu", "--threads", "1", *plot],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["requests", *["bound"] * 3, "mixed"]
    assert not plot or picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(lines[-1])
    assert (result["bench"], result["model"], result["mix"]) == ("throughput_mixed", "tiny", "40-100/4-40")
    assert result["checks"] == {
        "batch_equals_alone": "passed",
        "graphs_equal_eager": "not run: no GPU",
        "nothing_new_while_timed": "passed",
    }
    assert [(row["batch_size"], row["program"]) for row in result["rows"]] == [(1, "llama_fast"), (3, "llama_fast")]
    for row in result["rows"]:
        assert row["output_tokens_per_s"]["median"] > 0 and row["ideal_s"] > 0
        assert row["share_of_ideal"] == pytest.approx(row["ideal_s"] / row["seconds"]["median"])
        assert row["share_of_bound"] == pytest.approx(row["bound_s"] / row["seconds"]["median"])
        work = sum(count * prompt_tokens for _, prompt_tokens, _, count in row["ideal_steps"])
        assert work == pytest.approx(row["prompt_tokens"])
        decoded = sum(count * rows for rows, _, _, count in row["ideal_steps"])
        assert decoded == pytest.approx(row["output_tokens"] - row["num_requests"])
        assert 0 < row["scheduler_share"] < row["host_share"] < 1
        assert row["ttft_s"]["p50"] <= row["ttft_s"]["p90"] <= row["ttft_s"]["p99"]
        # Two repeats.
        assert row["ttft_s"]["count"] == 2 * row["num_requests"]
        assert row["itl_s"]["count"] == 2 * (row["output_tokens"] - row["num_requests"])
        # Nothing of an earlier run is known to a later one.
        grown = result["engine_stats_grown"][f"{row['batch_size']} at once"]
        assert (grown["prompt_tokens"], grown["shared_tokens"]) == (2 * row["prompt_tokens"], 0)
    assert result["rows"][0]["times_one_by_one"] == {"median": 1.0, "p10": 1.0, "p90": 1.0}


def test_refuses_to_time_batches_that_change_the_answer(throughput, monkeypatch, capsys):
    logits = LlamaLM.logits
    monkeypatch.setattr(LlamaLM, "logits", lambda model, x, ops: logits(model, x, ops) * (1 + 1e-4 * (len(x) > 1)))
    assert throughput.main(["--smoke", "--mixed", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "refusing to time: prompt 0 alone and in a batch of 4" in err


def test_refuses_a_run_with_other_tokens(bench, part, session):
    requests = part("serving_requests").Requests([[1, 2], [3, 4, 5], [6]], [4, 3, 2])
    rounds = bench.Rounds(session, requests, [1, 2])
    rounds.turn()
    assert [row["batch_size"] for row in rounds.rows()] == [1, 2]
    first = rounds.answers[bench.Contender("llama_fast", 1)][0]
    first.token_ids[1] = [0, 0, 0]
    with pytest.raises(part("serving_session").Refused, match="at once gave other tokens than the first run"):
        rounds.turn()
    # What was complete before it is still said.
    assert [row["num_requests"] for row in rounds.rows()] == [3, 3]


class PretendedPeers:
    """llama.cpp with two good slots, best in one cache, and a vLLM that fails in the second round."""

    seconds = {(2, False): 4.0, (3, False): 8.0, (2, True): 2.0, (3, True): 1.0}  # noqa: RUF012

    def __init__(self, args, model, folder, stack):
        self.running = dict.fromkeys(["llama.cpp", "vllm"])
        self.versions, self.checks, self.left_out = {}, {}, {}
        self.judged, self.asked = [], []
        type(self).last = self

    def guarded(self, name):
        import contextlib

        from compare_process import Failed

        @contextlib.contextmanager
        def guard():
            try:
                yield
            except Failed as error:
                self.left_out[name] = str(error)
                del self.running[name]

        return guard()

    def serve_mixed(self, name, prompts, output_lens, max_batch, **options):
        from compare_process import Failed
        from serving_peers import Answer

        self.asked.append((name, len(prompts), max_batch, options))
        if name == "vllm" and sum(asked[0] == "vllm" for asked in self.asked) > 2:
            raise Failed("out of luck")
        seconds = 1.0 if name == "vllm" else self.seconds[max_batch, options["unified"]]
        tokens = [[1] * length for length in output_lens]
        return Answer(tokens, [[0.5 * seconds] * length for length in output_lens], seconds)

    def judge(self, name, prompt, token_ids, model):
        self.judged.append((name, len(prompt), len(token_ids)))


@pytest.mark.parametrize("every", [False, True])
def test_llama_cpp_is_timed_as_it_was_best_in_a_trial(throughput, part, monkeypatch, capsys, every):
    monkeypatch.setattr(part("serving_session"), "Peers", PretendedPeers)
    args = ["--smoke", "--mixed", "--device", "cpu", "--peers", "llama.cpp", "vllm"]
    assert throughput.main([*args, *["--all-slots"] * every]) == 0
    out, _ = capsys.readouterr()
    result, peers = json.loads(out.splitlines()[-1]), PretendedPeers.last
    generated = result["rows"][0]["output_tokens"]
    rates = {(trial["slots"], trial["unified"]): trial["output_tokens_per_s"] for trial in result["slot_trials"]}
    assert rates == {(2, False): generated / 4, (3, False): generated / 8, (2, True): generated / 2}
    timed = [(row["batch_size"], row["unified"]) for row in result["rows"] if row["program"] == "llama.cpp"]
    assert timed == ([(2, True), (3, True)] if every else [(2, True)])
    assert "2 at once, one cache" in out
    # A peer that failed in one of the rounds has no row, and is named.
    assert result["peers_left_out"] == {"vllm": "out of luck"}
    assert {row["program"] for row in result["rows"]} == {"llama_fast", "llama.cpp"}
    ours = min(row["seconds"]["median"] for row in result["rows"] if row["program"] == "llama_fast")
    theirs = next(row for row in result["rows"] if row["program"] == "llama.cpp")
    assert theirs["ours_to_it"]["median"] == pytest.approx(2.0 / ours, rel=0.5) and theirs["ours_at_once"] in (1, 3)
    # Three requests of each trial.
    assert len(peers.judged) == 3 * (3 + 1)


# --- llama.cpp's slots ------------------------------------------------------------------------------------------------


def test_slots_are_filled_as_they_become_free(part):
    slots = part("serving_slots").Slots([[10, 11, 12], [20], [30, 31]], [2, 4, 1], num_slots=2, batch_size=3)
    # A batch is full: the second prompt waits.
    assert slots.next_batch() == [(10, 0, 0, False), (11, 1, 0, False), (12, 2, 0, True)]
    assert slots.take([13], 1.0) == []
    # What decodes comes first, then prompts.
    assert slots.next_batch() == [(13, 3, 0, True), (20, 0, 1, True)]
    assert slots.num_wanted == 2
    assert slots.take([14, 21], 2.0) == [0]
    # The free slot has the third request at once, from its own first position.
    assert slots.next_batch() == [(21, 1, 1, True), (30, 0, 0, False), (31, 1, 0, True)]
    assert slots.take([22, 32], 3.0) == [0]
    for now, token_id in ((4.0, 23), (5.0, 24)):
        assert slots.next_batch() == [(token_id - 1, int(now) - 2, 1, True)]
        assert slots.take([token_id], now) == [1] * (now == 5.0)
    assert slots.next_batch() == []
    assert slots.token_ids == [[13, 14], [21, 22, 23, 24], [32]]
    assert slots.times == [[1.0, 2.0], [2.0, 3.0, 4.0, 5.0], [3.0]]


def test_a_prompt_runs_in_chunks_of_a_batch(part):
    slots = part("serving_slots").Slots([[1], list(range(10, 17))], [3, 1], num_slots=2, batch_size=3)
    sizes = []
    while tokens := slots.next_batch():
        sizes.append((len(tokens), [token.position for token in tokens if token.sequence == 1]))
        slots.take([5] * slots.num_wanted, 0.0)
    assert sizes == [(3, [0, 1]), (3, [2, 3]), (3, [4, 5]), (1, [6])]


class PretendedLlamaCpp(types.ModuleType):
    """llama_cpp with a model whose next token is the sum of all tokens so far; its cache must be used properly."""

    __version__ = "0"

    def __init__(self, n_batch):
        super().__init__("llama_cpp")
        self.n_batch, self.cells, self.made, self.freed, self.batches = n_batch, {}, [], 0, []
        self.llama_print_system_info = lambda: b"pretended"
        self.llama_log_callback = lambda function: function
        self.llama_log_set = lambda *_: None
        self.llama_context_default_params = lambda: types.SimpleNamespace(n_batch=n_batch)
        self.llama_n_batch = lambda context: context.n_batch
        self.llama_get_memory = lambda context: context
        self.llama_memory_clear = lambda memory, data: self.cells.clear()
        self.llama_batch_free = lambda batch: None
        self.llama_synchronize = lambda context: None

    def llama_init_from_model(self, model, params):
        self.made.append(vars(params))
        return params

    def llama_free(self, context):
        self.freed += 1

    def llama_batch_init(self, num_tokens, embd, num_sequences):
        names = ("token", "pos", "n_seq_id", "logits")
        batch = types.SimpleNamespace(**{name: [None] * num_tokens for name in names})
        batch.seq_id = [[None] * num_sequences for _ in range(num_tokens)]
        return batch

    def llama_decode(self, context, batch):
        assert batch.n_tokens <= self.n_batch
        self.batches.append(batch.n_tokens)
        rows = []
        for place in range(batch.n_tokens):
            sequence = batch.seq_id[place][0]
            cells = self.cells.setdefault(sequence, [])
            assert sequence < context.n_seq_max and batch.pos[place] == len(cells)
            cells.append(batch.token[place])
            assert len(cells) <= context.n_ctx // context.n_seq_max
            if batch.logits[place]:
                rows += [float(token_id == sum(cells) % 50) for token_id in range(50)]
        self.logits = (ctypes.c_float * len(rows))(*rows)
        return 0

    def llama_get_logits(self, context):
        return ctypes.cast(self.logits, ctypes.POINTER(ctypes.c_float))

    def llama_memory_seq_rm(self, memory, sequence, begin, end):
        assert (begin, end) == (-1, -1)
        del self.cells[sequence]


@pytest.mark.parametrize(("slots", "n_batch"), [(1, 7), (3, 7), (8, 64)])
def test_llama_cpp_batches_continuously(part, monkeypatch, slots, n_batch):
    monkeypatch.setitem(sys.modules, "llama_cpp", lib := PretendedLlamaCpp(n_batch))
    workers, requests = part("serving_workers"), part("serving_requests")
    program = workers.LlamaCpp(argparse.Namespace(device="cpu", threads=1))
    program.model, program.vocab_size = object(), 50
    some = requests.Requests.draw(requests.Mix((1, 20), (2, 9)), 12, vocab_size=50, seed=3)
    answer = program.serve_mixed(some.prompts, some.output_lens, slots, unified=True)
    for prompt, length, token_ids, times in zip(
        some.prompts, some.output_lens, answer["token_ids"], answer["times"], strict=True
    ):
        cells = list(prompt)
        for _ in range(length):
            cells.append(sum(cells) % 50)
        assert token_ids == cells[len(prompt) :]
        assert len(times) == length and times == sorted(times) and times[-1] <= answer["seconds"]
    # Every token but each request's last was run once; nothing is left in the cache.
    assert sum(lib.batches) == some.prompt_tokens + some.decoded
    assert lib.cells == {}
    sizes = {"n_ctx": 256 * slots, "n_seq_max": slots, "n_batch": n_batch, "kv_unified": True}
    assert [{name: made[name] for name in sizes} for made in lib.made] == [sizes]

    # The context is kept for the next time, and given back for another one.
    again = program.serve_mixed(some.prompts, some.output_lens, slots, unified=True)
    assert again["token_ids"] == answer["token_ids"] and len(lib.made) == 1
    other = program.serve_mixed(some.prompts, some.output_lens, slots)
    assert other["token_ids"] == answer["token_ids"]
    assert (lib.made[1]["kv_unified"], lib.freed) == (False, 1)

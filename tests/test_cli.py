"""The command line: what it prints equals what LLM.generate returns, and what it refuses is one message."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import llama_fast
from llama_fast import LLM, LlamaForCausalLM, LlamaTokenizer, SamplingParams, cli, demo
from llama_fast.engine.engine import Engine
from llama_fast.engine.perplexity import load_for_perplexity, perplexity
from tests.byte_model import save_byte_model

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Grüße, 世界"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def generated(folder):
    """`generated(prompt, **sampling)` is what LLM.generate returns for it."""
    llm = LLM(folder)
    return lambda prompt=PROMPT, **sampling: llm.generate([prompt], SamplingParams(**sampling))[0]


@pytest.fixture
def run(folder, capsys):
    """`run(*args)` is `llama-fast generate --model FOLDER args` in this process: (status, stdout, stderr)."""

    def run(*args, command="generate"):
        model = ["--model", str(folder)] if command == "generate" else [str(folder)]
        status = cli.main([command, *model, *args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def start(*args, environment=None, **popen):
    """`llama-fast args` in a process of its own, with Ctrl-C as in a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "llama_fast", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **popen,
    )


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}, {"stop": ["\ufffd\ufffd"]}])
def test_streamed_stdout_is_prompt_and_text(run, generated, sampling):
    flags = [f"--{name.replace('_', '-')}={value[0] if name == 'stop' else value}" for name, value in sampling.items()]
    text = generated(max_tokens=40, **sampling).outputs[0].text
    status, out, err = run(PROMPT, "--max-tokens=40", *flags)
    assert (status, out) == (0, f"{PROMPT}{text}\n")
    assert run(PROMPT, "--max-tokens=40", "--no-echo", *flags)[:2] == (0, f"{text}\n")
    assert re.fullmatch(
        r"llama-fast: \d+ prompt tokens, \d+ generated, first after \d+\.\d{3} s, \d+\.\d tokens/s, seed \d+\n", err
    )


def test_text_is_written_as_it_becomes_final(folder, monkeypatch):
    flushed = []

    class Stdout(io.StringIO):
        def flush(self):
            flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Stdout())
    assert cli.main(["generate", "--model", str(folder), "abc", "--max-tokens", "30", "--quiet"]) == 0
    assert len(set(flushed)) > 10


def test_every_sampling_option_reaches_the_engine(run, generated):
    sampling = {
        "n": 2,
        "max_tokens": 24,
        "min_tokens": 3,
        "temperature": 1.3,
        "top_k": 40,
        "top_p": 0.8,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "stop": ["zz", "\n\n"],
        "ignore_eos": True,
        "seed": 3,
        "logprobs": 2,
    }
    args = ["-n=2", "--ignore-eos", "--stop=zz", "--stop=\n\n"]
    args += [
        f"--{name.replace('_', '-')}={value}"
        for name, value in sampling.items()
        if name not in ("n", "stop", "ignore_eos")
    ]
    parsed = vars(cli._parser().parse_args(["generate", "x", "--json", *args]))
    assert {name: parsed[name] for name in sampling} == sampling
    told = json.loads(run(PROMPT, "--json", *args)[1])
    expected = generated(**sampling)
    assert told["prompt"] == PROMPT
    assert told["prompt_token_ids"] == expected.prompt_token_ids
    assert told["seed"] == 3
    assert told["outputs"] == json.loads(json.dumps([asdict(sample) for sample in expected.outputs]))
    assert told["metrics"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert told["metrics"]["generated_tokens"] == sum(len(sample.token_ids) for sample in expected.outputs)
    assert told["metrics"]["time_to_first_token_s"] > 0
    assert told["metrics"]["decode_tokens_per_s"] > 0


def test_the_drawn_seed_is_told_and_repeats_the_text(run):
    told = [json.loads(run("a", "--json", "--temperature=1", "--max-tokens=20")[1]) for _ in range(2)]
    assert told[0]["outputs"][0]["token_ids"] != told[1]["outputs"][0]["token_ids"]
    _, out, _ = run("a", "--temperature=1", "--max-tokens=20", f"--seed={told[0]['seed']}")
    assert out == f"a{told[0]['outputs'][0]['text']}\n"


def test_samples_are_printed_one_after_the_other(run, generated):
    samples = generated(n=3, temperature=1.0, seed=1, max_tokens=9, ignore_eos=True).outputs
    _, out, _ = run(PROMPT, "-n=3", "--temperature=1", "--seed=1", "--max-tokens=9", "--ignore-eos")
    assert out == "".join(f"--- sample {i} of 3 (length)\n{PROMPT}{s.text}\n" for i, s in enumerate(samples, start=1))


def test_no_new_tokens(run):
    status, out, err = run(PROMPT, "--max-tokens=0")
    assert (status, out) == (0, f"{PROMPT}\n")
    assert " 0 generated" in err


@pytest.mark.parametrize("source", ["file", "stdin", "dash", "file dash"])
@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_prompt_from_file_or_stdin(run, generated, tmp_path, monkeypatch, source, ending):
    data = f"{PROMPT}{ending}".encode()
    path = tmp_path / "prompt.txt"
    path.write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"" if source == "file" else data)))
    args = {"file": ["--file", str(path)], "stdin": [], "dash": ["-"], "file dash": ["--file", "-"]}[source]
    text = generated(max_tokens=4).outputs[0].text
    assert run(*args, "--max-tokens=4", "--quiet") == (0, f"{PROMPT}{text}\n", "")


def test_only_one_line_break_is_dropped(run, generated, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"a\n\n")
    told = json.loads(run("--file", str(tmp_path / "prompt.txt"), "--max-tokens=1", "--json")[1])
    assert told["prompt"] == "a\n"


def test_utf8_through_pipes_in_the_c_locale(folder, generated):
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    args = ["generate", "--model", folder, "--max-tokens", 4]
    expected = f"{PROMPT}{generated(max_tokens=4).outputs[0].text}\n".encode()
    piped = start(*args, environment=environment, stdin=subprocess.PIPE)
    out, err = piped.communicate(PROMPT.encode(), timeout=120)
    assert (piped.returncode, out) == (0, expected), err
    given = start(*args, PROMPT, environment=environment)
    assert given.communicate(timeout=120)[0] == expected


def test_the_demo_model_is_the_default(folder, generated, monkeypatch, capsys):
    monkeypatch.setattr(demo, "PATH", folder)
    assert cli.main(["generate", "abc", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out == f"abc{generated('abc', max_tokens=5).outputs[0].text}\n"


def test_interrupt_keeps_the_text(folder, generated):
    process = start("generate", "--model", folder, "abc", "--ignore-eos", "--max-tokens", 2000)
    first = os.read(process.stdout.fileno(), 4)  # unbuffered: communicate() reads on from there
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    told = re.fullmatch(r"llama-fast: interrupted: 4 prompt tokens, (\d+) generated, .*\n", err.decode())
    assert told, err
    assert 0 < int(told[1]) < 2000
    expected = generated("abc", max_tokens=int(told[1]), ignore_eos=True).outputs[0].text
    assert (first + out).decode() == f"abc{expected}\n"


@pytest.mark.parametrize("writes", range(2, 7))
def test_interrupt_while_printing_loses_nothing(folder, generated, monkeypatch, capsys, writes):
    """Ctrl-C may strike between two chunks as well as inside the model."""

    class Stdout(io.StringIO):
        left = writes

        def flush(self):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    out = Stdout()
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["generate", "--model", str(folder), "abc", "--max-tokens", "100"]) == 130
    told = re.match(r"llama-fast: interrupted: 4 prompt tokens, (\d+) generated", capsys.readouterr().err)
    text = generated("abc", max_tokens=int(told[1])).outputs[0].text
    assert len(text) > 1
    assert out.getvalue() == f"abc{text}\n"


def _interrupt_at_step(monkeypatch, number):
    step, steps = Engine.step, iter(range(number))

    def interrupted(engine):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)


@pytest.mark.parametrize("args", [["--json"], ["-n=2", "--temperature=1"]])
def test_interrupt_without_streaming_prints_what_there_is(run, generated, monkeypatch, args):
    sampling = {"n": 2, "temperature": 1.0, "seed": 3} if "-n=2" in args else {"seed": 3}
    expected = generated("abc", max_tokens=5, ignore_eos=True, **sampling).outputs
    _interrupt_at_step(monkeypatch, 5)
    status, out, err = run("abc", "--seed=3", "--ignore-eos", *args)
    assert status == 130
    assert err.startswith("llama-fast: interrupted: 4 prompt tokens, ")
    if "--json" in args:
        (sample,) = json.loads(out)["outputs"]
        assert (sample["finish_reason"], sample["token_ids"]) == ("abort", expected[0].token_ids)
    else:
        assert out == "".join(f"--- sample {s.index + 1} of 2 (abort)\nabc{s.text}\n" for s in expected)


def test_interrupt_before_the_first_token(run, monkeypatch):
    _interrupt_at_step(monkeypatch, 0)
    status, out, err = run("abc")
    assert (status, out) == (130, "abc\n")
    assert err.startswith("llama-fast: interrupted: 4 prompt tokens, 0 generated, seed ")


def test_interrupt_elsewhere_is_one_line(run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaTokenizer, "from_pretrained", interrupted)
    assert run("abc") == (130, "", "llama-fast: interrupted\n")


def test_reader_that_goes_away_ends_it_silently(folder):
    process = start("generate", "--model", folder, "abc", "--ignore-eos", "--max-tokens", 2000)
    os.read(process.stdout.fileno(), 4)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=120) == 141


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature=-1"], "temperature=-1.0"),
        (["--temperature=hot"], "invalid float value: 'hot'"),
        (["--max-tokens=2", "--min-tokens=3"], "min_tokens=3 exceeds max_tokens=2"),
        (["--file=x.txt"], "give one prompt"),
        (["--logprobs=1"], "add --json"),
        (["--num-beams=2"], "unrecognized arguments: --num-beams=2"),
    ],
)
def test_wrong_usage(run, capsys, args, message):
    with pytest.raises(SystemExit) as exit_info:
        run("abc", *args)
    captured = capsys.readouterr()
    assert (exit_info.value.code, captured.out) == (2, "")
    assert captured.err.splitlines()[0].startswith("usage: llama-fast")
    assert message in captured.err.splitlines()[-1]


def test_no_prompt_on_a_terminal(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "give one prompt: as PROMPT, in --file FILE, or on stdin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model=/no/such/folder"], "/no/such/folder"),
        (["--max-tokens=3000"], "max_tokens=3000 exceed"),
        (["-n=2"], "n=2 with greedy"),
        (["--device=abacus"], "device='abacus'"),
        (["--device=meta"], "device='meta'"),
        (["--device=mps"], "device='mps'"),
    ],
)
def test_error_is_one_line(run, args, message):
    status, out, err = run("abc", *args)
    assert (status, out) == (1, "")
    assert err.startswith("llama-fast: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    "argument", ["--dtype=int3", "--backend=magic", "--max-seq-len=0", "--max-seq-len=many", "--top-p=0", "--colour"]
)
def test_wrong_usage_exits_with_2(run, capsys, argument):
    with pytest.raises(SystemExit, match="2"):
        run("abc", argument)
    err = capsys.readouterr().err
    assert err.startswith("usage: llama-fast")
    assert argument.partition("=")[0].strip("-") in err.replace("_", "-")


def test_the_byte_order_mark_of_an_editor_is_no_text(run, tmp_path):
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfabc")
    told = json.loads(run("--file", str(tmp_path / "marked.txt"), "--json", "--max-tokens=1")[1])
    assert told["prompt"] == "abc"


def test_python_m_llama_fast_is_the_command():
    told = subprocess.run([sys.executable, "-m", "llama_fast", "--version"], capture_output=True, text=True, check=True)
    assert told.stdout == f"llama-fast {llama_fast.__version__}\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_a_closed_stream_is_no_crash(closed):
    command = f"{sys.executable} -m llama_fast generate abc --max-tokens 2 --seed 1 {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


def test_unusable_prompt_files(run, tmp_path):
    status, out, err = run("--file", str(tmp_path / "missing.txt"))
    assert (status, out) == (1, "")
    assert err == f"llama-fast: error: No such file or directory: '{tmp_path}/missing.txt'\n"
    (tmp_path / "latin1.txt").write_bytes("Grüße".encode("latin-1"))
    status, out, err = run("--file", str(tmp_path / "latin1.txt"))
    assert (status, out) == (1, "")
    assert "latin1.txt is not UTF-8: byte 2 is 0xfc; convert it" in err


def test_prompt_argument_that_is_not_utf8(folder):
    process = start("generate", "--model", folder, os.fsdecode(b"a\xff"))
    assert process.communicate(timeout=120)[1].startswith(b"llama-fast: error: PROMPT is not UTF-8: byte 1 is 0xff")
    assert process.returncode == 1


@pytest.mark.parametrize("args", [[], ["--json"]])
def test_broken_weights_are_an_error(folder, tmp_path, capsys, args):
    model = LlamaForCausalLM.from_pretrained(folder)
    model.lm_head.weight[:] = torch.nan
    model.save_pretrained(tmp_path)
    LlamaTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert cli.main(["generate", "--model", str(tmp_path), "abc", "--max-tokens=5", *args]) == 1
    assert re.fullmatch(r"llama-fast: error: the logits .*NaN.*float32.*\n", capsys.readouterr().err)


def test_traceback_on_request(run, monkeypatch):
    monkeypatch.setenv("LLAMA_FAST_TRACEBACK", "1")
    with pytest.raises(llama_fast.errors.CheckpointPathError):
        run("abc", "--model=/no/such/folder")


def _printed(capsys, *args):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(args)
    assert exit_info.value.code == 0
    return capsys.readouterr().out


def test_version(capsys):
    assert _printed(capsys, "--version") == f"llama-fast {llama_fast.__version__}\n"


@pytest.mark.parametrize("command", [[], ["generate"], ["perplexity"], ["plan"]])
def test_examples_of_help_are_accepted(capsys, command):
    examples = _printed(capsys, *command, "--help").partition("\nexamples:\n")[2].splitlines()
    assert len(examples) >= 3
    for example in examples:
        (call,) = (part for part in example.split(" | ") if part.split()[0] == "llama-fast")
        arguments = re.split(r"\s{4,}", call.strip().replace("$'", "'"))[0]  # without the remark beside it
        words = shlex.split(arguments)[1:]
        if "--help" in words:
            assert _printed(capsys, *words)
        else:
            assert cli._parser().parse_args(words).run in [command.run for command in cli._COMMANDS]


@pytest.mark.parametrize("args", [["--version"], ["--help"], ["generate", "--help"], ["generate", "x", "--top-p=2"]])
def test_what_needs_no_model_loads_no_torch(args):
    program = (
        "import sys; from llama_fast.cli import main\n"
        f"try: main({args})\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(f"{PROMPT}, {Path(__file__).read_text()[:300]}", encoding="utf-8")
    return path


@pytest.mark.parametrize("flags", [{}, {"context": 64}, {"context": 64, "stride": 32}])
def test_perplexity_of_a_file(run, folder, text_file, flags):
    result = perplexity(load_for_perplexity(folder, flags.get("context")), text_file.read_text("utf-8"), **flags)
    args = [str(text_file), *(f"--{name}={value}" for name, value in flags.items())]
    status, out, err = run(*args, command="perplexity")
    assert (status, out, err) == (0, f"{result}\n", "")
    told = json.loads(run(*args, "--json", command="perplexity")[1])
    assert told == {"model": str(folder), "file": str(text_file), **asdict(result)}


def test_perplexity_of_stdin(run, text_file, monkeypatch):
    with text_file.open(encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        piped = run("-", command="perplexity")
    assert piped == run(str(text_file), command="perplexity")


@pytest.mark.parametrize(
    ("args", "message"),
    [(["--context=1"], "context=1"), (["--stride=2048"], "stride=2048")],
)
def test_perplexity_errors(run, text_file, args, message):
    status, out, err = run(str(text_file), *args, command="perplexity")
    assert (status, out) == (1, "")
    assert re.fullmatch(rf"llama-fast: error: .*{message}.*\n", err)

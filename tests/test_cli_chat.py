"""llama-fast chat: answers equal LLM.generate on the same ids, and the conversation survives what goes wrong."""

import builtins
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llama_fast import LLM, SamplingParams, cli, demo
from llama_fast.engine.engine import Engine
from tests.byte_model import save_byte_model

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'poet' %}{{ raise_exception('no poets') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_byte_model(tmp_path_factory.mktemp("model"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder)


@pytest.fixture
def answers(llm):
    """`answers(texts, system, **sampling)`: the conversation that LLM.generate makes of the user's texts."""

    def answers(texts, system=None, **sampling):
        messages = [] if system is None else [{"role": "system", "content": system}]
        for text in texts:
            messages.append({"role": "user", "content": text})
            ids = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            output = llm.generate([ids], SamplingParams(**{"max_tokens": 6, **sampling}))[0].outputs[0]
            messages.append({"role": "assistant", "content": output.text})
        return messages

    return answers


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """`run(lines, *args)` is `llama-fast chat FOLDER args` with the lines on stdin: (status, stdout, stderr)."""

    def run(lines, *args, model=folder):
        data = "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        status = cli.main(["chat", *([] if model is None else [str(model)]), "--max-tokens=6", *args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def said(messages):
    return "".join(f"{message['content']}\n" for message in messages if message["role"] == "assistant")


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}])
@pytest.mark.parametrize("system", [None, "Be brief"])
def test_answers_are_those_of_generate(run, answers, sampling, system):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sampling.items()]
    flags += [] if system is None else ["--system", system]
    expected = answers(["Hi", "Grüße, 世界"], system, **sampling)
    assert run(["Hi", "", "Grüße, 世界"], *flags, "--quiet") == (0, said(expected), "")


def test_the_history_matters(answers):
    """Negative control: the second answer depends on the first turn."""
    assert answers(["Hi", "And you?"])[-1] != answers(["And you?"])[-1]


def test_the_answer_is_written_as_it_becomes_final(folder, monkeypatch):
    flushed = []

    class Stdout(io.StringIO):
        def flush(self):
            flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\n")))
    monkeypatch.setattr(sys, "stdout", Stdout())
    assert cli.main(["chat", str(folder), "--max-tokens=30", "--ignore-eos", "--quiet"]) == 0
    assert len(set(flushed)) > 10


def test_json(run, answers, llm):
    expected = answers(["Hi", "And you?"])
    status, out, _ = run(["Hi", "And you?"], "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [{"role": one["role"], "content": one["content"]} for one in told] == expected[1::2]
    assert told[1]["prompt_tokens"] == len(llm.tokenizer.apply_chat_template(expected[:3], add_generation_prompt=True))
    assert {(one["generated_tokens"], one["finish_reason"]) for one in told} <= {(6, "length"), (6, "stop")}


def test_commands(run, answers, tmp_path):
    file = tmp_path / "talk.json"
    lines = ["Hi", "/clear", "And you?", f"/save {file}", "/system Be brief", "Bye", "/exit", "not read"]
    status, out, err = run(lines, "--quiet")
    two = answers(["And you?"])
    assert json.loads(file.read_text()) == two
    assert not list(tmp_path.glob("*.tmp"))
    changed = answers([], "Be brief")
    assert changed == [{"role": "system", "content": "Be brief"}]
    assert (status, err) == (0, "")
    assert out.startswith(said(answers(["Hi"])) + said(two))
    assert out.count("\n") >= 3


def test_the_system_message_can_be_changed_and_taken_away(run, answers, tmp_path):
    for line, system in (("/system Be long", "Be long"), ("/system", None)):
        lines = [line, "Hi", f"/save {tmp_path / 'talk.json'}"]
        assert run(lines, "--system=Be brief", "--quiet")[0] == 0
        assert json.loads((tmp_path / "talk.json").read_text()) == answers(["Hi"], system)


def test_help(run):
    _, out, err = run(["/help"])
    assert out == ""
    for command in ("/clear", "/save FILE", "/system", "/exit", "Ctrl-C"):
        assert command in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/foo bar", "no command '/foo'; /help lists them"),
        ("/save", "/save needs a file name"),
        ("/save /no/such/folder/x.json", "/no/such/folder"),
        ("/save .", "cannot save to '.'"),
        ("/save a\0b", "cannot save to 'a\\x00b'"),
    ],
)
def test_a_mistake_does_not_end_the_conversation(run, answers, line, message):
    status, out, err = run(["Hi", line, "And you?"], "--quiet")
    assert (status, out) == (1, said(answers(["Hi", "And you?"])))
    assert err.startswith("llama-fast: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert "[Errno" not in err


def test_a_message_that_the_template_refuses(folder, run, answers, tmp_path):
    (tmp_path / "strict.jinja").write_text(
        "{% if 'bad' in messages[-1].content %}{{ raise_exception('mind your words') }}{% endif %}" + TEMPLATE
    )
    status, out, err = run(["bad", "Hi"], "--quiet", "--chat-template", str(tmp_path / "strict.jinja"))
    assert (status, out) == (1, said(answers(["Hi"])))
    assert "refuses these messages: mind your words" in err


def test_a_conversation_that_does_not_fit(run, answers):
    """Nothing is cut or dropped without a word."""
    status, out, err = run(["x" * 80, "Hi", "/clear", "Hi"], "--max-seq-len=64", "--quiet")
    assert (status, out) == (1, said(answers(["Hi"])) + said(answers(["Hi"])))
    assert "the context of 64" in err
    assert "this message was not taken, /clear starts anew" in err


def test_an_answer_that_is_cut_is_told(run):
    _, _, err = run(["Hi"], "--ignore-eos")
    assert "the answer was cut after 6 tokens" in err


def test_a_model_without_a_template(run, tmp_path, capsys):
    save_byte_model(tmp_path)
    status, out, err = run(["Hi"], model=tmp_path)
    assert (status, out) == (1, "")
    assert "has no chat template" in err
    assert "--chat-template FILE" in err


def test_a_template_from_a_file(run, answers, tmp_path):
    save_byte_model(tmp_path / "model")
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    args = ["--chat-template", str(tmp_path / "t.jinja"), "--quiet"]
    assert run(["Hi"], *args, model=tmp_path / "model") == (0, said(answers(["Hi"])), "")
    assert "No such file" in run(["Hi"], "--chat-template", "/no/such.jinja", model=tmp_path / "model")[2]


def test_the_demo_model_continues_what_it_is_given(run):
    llm = LLM(demo.PATH)
    params = SamplingParams(max_tokens=6, temperature=0)
    first = llm.generate(["Once upon a time"], params)[0].outputs[0].text
    second = llm.generate([f"Once upon a time\n{first}\nThe end"], params)[0].outputs[0].text
    status, out, err = run(["Once upon a time", "The end"], "--temperature=0", model=None)
    assert (status, out) == (0, f"{first}\n{second}\n")
    assert "the demo model continues stories" in err


def _interrupt_at_step(monkeypatch, number):
    """Ctrl-C at one step of the engine."""
    step, steps = Engine.step, iter(range(number + 1))

    def interrupted(engine):
        if next(steps, None) == number:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)


@pytest.mark.parametrize("args", [[], ["--json"]])
def test_interrupt_stops_the_answer_and_the_conversation_goes_on(run, answers, llm, monkeypatch, tmp_path, args):
    first = answers(["Hi"], max_tokens=4, ignore_eos=True)
    ids = llm.tokenizer.apply_chat_template([*first, {"role": "user", "content": "So?"}], add_generation_prompt=True)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    second = llm.generate([ids], params)[0].outputs[0].text
    _interrupt_at_step(monkeypatch, 4)
    lines = ["Hi", "So?", f"/save {tmp_path / 'talk.json'}"]
    status, out, _ = run(lines, "--ignore-eos", "--quiet", *args)
    talk = json.loads((tmp_path / "talk.json").read_text())
    assert talk == [*first, {"role": "user", "content": "So?"}, {"role": "assistant", "content": second}]
    assert status == 0
    if args:
        assert [json.loads(line)["finish_reason"] for line in out.splitlines()] == ["abort", "length"]
    else:
        assert out == said(talk)


@pytest.mark.parametrize("writes", range(1, 6))
def test_interrupt_while_printing_loses_nothing(folder, monkeypatch, tmp_path, writes):
    class Stdout(io.StringIO):
        left = writes

        def flush(self):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    out = Stdout()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"abc\n/save {tmp_path / 'talk.json'}\n".encode())))
    assert cli.main(["chat", str(folder), "--max-tokens=100", "--ignore-eos", "--quiet"]) == 0
    talk = json.loads((tmp_path / "talk.json").read_text())
    assert out.getvalue() == said(talk)
    assert 0 < len(talk[1]["content"]) < 100


def test_interrupt_of_a_process(folder, llm):
    """SIGINT as from a terminal: the answer ends, the next message is answered, the text so far is remembered."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_fast", "chat", str(folder), "--ignore-eos", "--max-tokens=2000"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdin.write(b"abc\n")
    process.stdin.flush()
    first = os.read(process.stdout.fileno(), 4)  # unbuffered: communicate() reads on from there
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    shown = (first + out).decode().removesuffix("\n")
    ids = llm.tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], add_generation_prompt=True)
    whole = llm.generate([ids], SamplingParams(max_tokens=2000, ignore_eos=True))[0].outputs[0].text
    assert 0 < len(shown) < len(whole)
    assert whole.startswith(shown.rstrip("\ufffd"))


@pytest.fixture
def terminal(folder, monkeypatch, capsys):
    """`terminal(lines, *args)`: as typed; a line that is an exception is raised where it would be typed."""

    def terminal(lines, *args):
        stdin = io.TextIOWrapper(io.BytesIO())
        stdin.isatty = lambda: True
        typed = iter(lines)

        def read(prompt=""):
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(builtins, "input", read)
        status = cli.main(["chat", str(folder), "--max-tokens=6", *args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return terminal


def test_a_terminal_gets_prompts_and_ends_with_ctrl_d(terminal, answers):
    status, out, err = terminal(["Hi", "/foo", "And you?"], "--seed=3")
    assert (status, out) == (0, said(answers(["Hi", "And you?"])))
    assert "seed 3; /help lists the commands" in err
    assert err.count("> ") == 4


def test_ctrl_c_at_the_prompt_leaves(terminal, answers):
    status, out, err = terminal(["Hi", KeyboardInterrupt()], "--quiet")
    assert (status, out) == (130, said(answers(["Hi"])))
    assert err.endswith("llama-fast: interrupted\n")


def test_a_line_that_is_not_utf8(terminal, run, answers, folder, monkeypatch, capsys):
    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    status, out, err = terminal([broken, "Hi"], "--quiet")
    assert (status, out) == (0, said(answers(["Hi"])))
    assert "the line is not UTF-8" in err
    monkeypatch.undo()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\nHi\n")))
    assert cli.main(["chat", str(folder), "--max-tokens=6", "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.out == said(answers(["Hi"]))
    assert "stdin is not UTF-8: byte 0 is 0xff" in captured.err


def test_wrong_usage(folder, capsys):
    for args in (["--temperature=-1"], ["--max-seq-len=0"], ["--top-p=2"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["chat", str(folder), *args])
        assert capsys.readouterr().err.startswith("usage: llama-fast chat")


def test_examples_of_help_are_accepted(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["chat", "--help"])
    examples = capsys.readouterr().out.partition("\nexamples:\n")[2].splitlines()
    assert len(examples) >= 3
    for example in examples:
        (call,) = (part for part in example.split(" | ") if part.split()[0] == "llama-fast")
        words = shlex.split(call.strip().partition("   ")[0])[1:]
        assert cli._parser().parse_args(words).run is cli.chat.run


def test_help_loads_no_torch():
    program = (
        "import sys; from llama_fast.cli import main\n"
        "try: main(['chat', '--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True).returncode == 0

"""Batches: what lines get, in which order, and that the bytes are those of one undisturbed run."""

import dataclasses
import errno
import gc
import itertools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from llama_fast import LLM, SamplingParams
from llama_fast.engine.engine import Engine
from llama_fast.engine.request import Request, Sample
from llama_fast.errors import EngineDeadError, GenerationInterrupted, RequestError
from llama_fast.serving import batch, batch_files, batch_lines
from llama_fast.serving.batch import BatchReport, fingerprint, run_batch
from llama_fast.serving.batch_files import BatchFiles
from llama_fast.serving.batch_lines import seed_of
from llama_fast.tokenizer import LlamaTokenizer
from tests.byte_model import save_byte_model

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_byte_model(tmp_path_factory.mktemp("model"))
    tokenizer = LlamaTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, max_batch=8, max_seq_len=256)


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


@pytest.fixture
def run(llm, folder, paths):
    """`run(lines)` answers them: (report, records, bytes of the output); without lines it goes on with the input."""

    def run(lines=None, *, llm=llm, resume=False, seed=0):
        source, target = paths
        if lines is not None:
            source.write_bytes(lines if isinstance(lines, bytes) else b"".join(encoded(line) for line in lines))
        with BatchFiles(source, target, resume=resume) as files:
            told = fingerprint(llm, folder, "tiny", seed)
            report = run_batch(llm, files, name="tiny", fingerprint=told, seed=seed)
        data = target.read_bytes()
        assert data.endswith(b"\n") or not data
        return report, [json.loads(line) for line in data.split(b"\n")[:-1]], data

    return run


def completion(index, prompt="abc", **body):
    line = {"custom_id": f"line {index}", "method": "POST", "url": "/v1/completions"}
    return {**line, "body": {"prompt": prompt, "max_tokens": 5, **body}}


def chat(index, content="hi", **body):
    line = {"custom_id": f"line {index}", "method": "POST", "url": "/v1/chat/completions"}
    return {**line, "body": {"messages": [{"role": "user", "content": content}], "max_tokens": 5, **body}}


def encoded(line):
    return (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"


def mixed(count, longest=90):
    """Lines of all kinds and of very different lengths, some of them wrong."""
    lines = []
    for i in range(count):
        length = {"max_tokens": longest} if i % 11 == 6 else {"max_tokens": i % 7, "min_tokens": i % 2 if i % 7 else 0}
        sampling = {"temperature": 1.2, "top_k": 50, "logprobs": i % 3 or None} if i % 2 else {}
        lines.append(completion(i, "abcdefgh"[: 1 + i % 8] * (1 + i % 5), **length, **sampling))
        if i % 5 == 2:
            lines[-1] = chat(i, "wörld" * (i % 9), temperature=0.9, n=2, logprobs=True, top_logprobs=2)
        if i % 13 == 5:
            lines[-1] = completion(i, [1, 2, 258 + i])
        if i % 17 == 8:
            lines[-1] = b"{not JSON " + str(i).encode()
    return lines


def text_of(record):
    (choice,) = record["response"]["body"]["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_what_generate_returns_in_the_order_of_the_input(llm, run):
    sampled = {"temperature": 1.1, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "frequency_penalty": 0.5}
    sampled |= {"presence_penalty": 0.1, "seed": 2**64 - 1, "top_k": 77, "logit_bias": {"65": 3}, "ignore_eos": True}
    bodies = [
        {"max_tokens": 60},
        {"max_tokens": 3},
        {"max_tokens": 40, **sampled},
        {"max_tokens": 0},
        {"max_tokens": 30, "stop": ["a", "\ufffd"]},
        {"max_tokens": 20, "min_tokens": 4, "stop_token_ids": [7], "skip_special_tokens": False, "temperature": 2},
        {"max_tokens": 9, "user": "me", "metadata": {"a": [1]}, "model": "mine", "stream": False, "n": None},
        {},
    ]
    lines = [completion(i, f"prompt {i}", **body) for i, body in enumerate(bodies)]
    del lines[-1]["body"]["max_tokens"]
    report, records, _ = run(lines)
    params = []
    for i, body in enumerate(bodies):
        ours = {name: value for name, value in body.items() if name not in ("user", "metadata", "model", "stream")}
        params.append(SamplingParams.from_dict({"seed": seed_of(i, 0), **ours}))
    expected = llm.generate([f"prompt {i}" for i in range(len(bodies))], params)
    assert [record["custom_id"] for record in records] == [line["custom_id"] for line in lines]
    assert [record["id"] for record in records] == [f"batch_req_{i}" for i in range(len(lines))]
    for record, output in zip(records, expected, strict=True):
        (sample,), body = output.outputs, record["response"]["body"]
        assert (record["error"], record["response"]["status_code"]) == (None, 200)
        (choice,) = body["choices"]
        assert choice == {"index": 0, "text": sample.text, "logprobs": None, "finish_reason": sample.finish_reason}
        counts = len(output.prompt_token_ids), len(sample.token_ids)
        assert body["usage"] == dict(
            zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*counts, sum(counts)), strict=True)
        )
        assert (body["object"], body["created"]) == ("text_completion", 0)
        assert body["model"] == ("mine" if record["custom_id"] == "line 6" else "tiny")
    assert {output.outputs[0].finish_reason for output in expected} == {"stop", "length"}
    assert (report.lines, report.written, report.resumed, report.errors) == (len(lines), len(lines), 0, 0)
    assert report.prompt_tokens == sum(len(output.prompt_token_ids) for output in expected)
    assert report.generated_tokens == sum(len(output.outputs[0].token_ids) for output in expected)
    assert report.tokens_per_s > 0


def test_chats_are_what_generate_returns(llm, run):
    lines = [
        chat(0, max_tokens=None, max_completion_tokens=12),
        chat(1, "Grüße", temperature=1, n=3, max_tokens=7, max_completion_tokens=7),
    ]
    lines[1]["body"]["messages"].insert(0, {"role": "system", "content": "be brief"})
    _, records, _ = run(lines)
    params = [SamplingParams(max_tokens=12), SamplingParams(temperature=1, n=3, max_tokens=7, seed=seed_of(1, 0))]
    expected = llm.generate([line["body"]["messages"] for line in lines], params)
    for record, output in zip(records, expected, strict=True):
        body = record["response"]["body"]
        assert (body["object"], body["id"]) == ("chat.completion", f"chatcmpl-{record['id']}")
        assert body["choices"] == [
            {
                "index": sample.index,
                "message": {"role": "assistant", "content": sample.text},
                "logprobs": None,
                "finish_reason": sample.finish_reason,
            }
            for sample in output.outputs
        ]
        assert body["usage"]["completion_tokens"] == sum(len(sample.token_ids) for sample in output.outputs)


def test_token_ids_are_a_prompt(llm, run):
    _, (ids, text), _ = run([completion(0, llm.tokenizer.encode("abc")), completion(1, "abc")])
    assert text_of(ids) == text_of(text)


def test_log_probabilities_of_a_completion(llm, run):
    _, records, _ = run([completion(i, temperature=1, seed=1, logprobs=top) for i, top in enumerate((0, 3))])
    (expected,) = llm.generate(["abc"], SamplingParams(max_tokens=5, temperature=1, seed=1, logprobs=3))
    positions = expected.outputs[0].logprobs
    chosen = [position[i] for position, i in zip(positions, expected.outputs[0].token_ids, strict=True)]
    none, three = (record["response"]["body"]["choices"][0]["logprobs"] for record in records)
    assert none == {**three, "top_logprobs": None}
    assert three["token_logprobs"] == [found.logprob for found in chosen]
    assert three["text_offset"] == [sum(map(len, three["tokens"][:i])) for i in range(5)]
    for top, position in zip(three["top_logprobs"], positions, strict=True):
        best = sorted((found.logprob for found in position.values()), reverse=True)[:3]
        assert next(iter(top.values())) == best[0] and set(top.values()) <= set(best)


def test_log_probabilities_of_a_chat(llm, run):
    _, records, _ = run([chat(i, logprobs=True, top_logprobs=top) for i, top in enumerate((None, 2))])
    (expected,) = llm.generate([[{"role": "user", "content": "hi"}]], SamplingParams(max_tokens=5, logprobs=2))
    none, two = (record["response"]["body"]["choices"][0]["logprobs"]["content"] for record in records)
    assert [{**token, "top_logprobs": []} for token in two] == none
    for token, position, token_id in zip(two, expected.outputs[0].logprobs, expected.outputs[0].token_ids, strict=True):
        assert token["logprob"] == position[token_id].logprob
        # Greedy: the token is the most probable one.
        assert token["top_logprobs"][0] == {name: token[name] for name in ("token", "logprob", "bytes")}
        assert len(token["top_logprobs"]) == 2
        text = llm.tokenizer.decode([token_id])
        assert (token["token"], token["bytes"]) == (text, None if "\ufffd" in text else list(text.encode()))


def test_seeds_follow_from_the_batch_and_the_place(run, paths):
    same = [completion(i, temperature=1, max_tokens=12) for i in range(3)]
    _, first, _ = run([*same, completion(3, temperature=1, max_tokens=12, seed=seed_of(1, 0))])
    assert len({text_of(record) for record in first}) == 3
    assert text_of(first[1]) == text_of(first[3])
    paths[1].unlink()
    _, second, _ = run(seed=1)
    assert text_of(first[0]) != text_of(second[0])
    assert text_of(first[3]) == text_of(second[3])
    assert 0 <= seed_of(0, 0) < 2**64 and len({seed_of(i, s) for i in range(50) for s in range(50)}) == 2500


@pytest.mark.parametrize("max_batch", [1, 3])
def test_bytes_do_not_depend_on_the_batch_size(run, folder, paths, max_batch):
    lines = [line for line in mixed(60) if b'"n": 2' not in encoded(line)]
    _, records, expected = run(lines)
    assert sum(record["error"] is not None for record in records) > 5
    paths[1].unlink()
    assert run(llm=LLM(folder, max_batch=max_batch, max_seq_len=256, prefill_chunk=7))[2] == expected


# --- lines ------------------------------------------------------------------------------------------------------------

LINE = completion(0)


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (b"oops", "invalid_json", "line 2: is not strict JSON"),
        (b"[1]", "invalid_json", "line 2: must hold a JSON object, {...}; it holds a list"),
        (b"null", "invalid_json", "it holds null"),
        (b"{} {}", "invalid_json", "Extra data"),
        (b'{"a": 1, "a": 2}', "invalid_json", "the key 'a' appears twice"),
        (b'{"a": NaN}', "invalid_json", "NaN is no JSON number"),
        (b'{"a": "\xff"}', "invalid_json", "is not UTF-8: byte 7 is 0xff"),
        (b'{"custom_id": "\\ud800"}', "invalid_json", "half of a surrogate pair"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "invalid_json", "is nested more than 64 deep"),
        (b"\x0c", "invalid_json", "line 2"),
        ({}, "invalid_request", "custom_id is missing"),
        ({**LINE, "custom_id": ""}, "invalid_request", "custom_id='' must be a text that is not empty"),
        ({**LINE, "custom_id": 5}, "invalid_request", "custom_id=5 must be a text"),
        ({**LINE, "custom_id": "first"}, "duplicate_custom_id", "line 2: an earlier line has the custom_id 'first'"),
        ({**LINE, "method": "GET"}, "invalid_request", "method='GET' must be \"POST\""),
        ({**LINE, "url": "/v1/embeddings"}, "invalid_request", "url='/v1/embeddings' must be \"/v1/completions\" or"),
        ({**LINE, "url": ["/v1/completions"]}, "invalid_request", "url=['/v1/completions'] must be"),
        ({**LINE, "body": None}, "invalid_request", "body=None must be an object"),
        ({**LINE, "extra": 1}, "invalid_request", "unknown fields: extra; a line has custom_id, method, url, body"),
        *(
            (completion(0, **body), code, message)
            for body, code, message in [
                ({"prompt": None}, "invalid_request", "body.prompt is missing"),
                ({"prompt": 5}, "invalid_request", "body.prompt=5 must be a text or a list of token ids"),
                ({"prompt": ["a", "b"]}, "invalid_request", "give each prompt a line of its own"),
                ({"prompt": [[1], [2]]}, "invalid_request", "give each prompt a line of its own"),
                ({"prompt": [True]}, "invalid_request", "body.prompt=[True] must be"),
                ({"prompt": [1.5]}, "invalid_request", "body.prompt=[1.5] must be"),
                ({"prompt": [{"role": "user", "content": "a"}]}, "invalid_request", "must be a text"),
                ({"prompt": []}, "invalid_request", "the prompt has no tokens"),
                ({"prompt": [1, 258]}, "invalid_request", "prompt_token_ids[1]=258 is not an id of the vocabulary"),
                ({"prompt": [-1]}, "invalid_request", "prompt_token_ids[0]=-1"),
                ({"messages": []}, "invalid_request", "takes prompt; use the url /v1/chat/completions"),
                ({"model": 7}, "invalid_request", "body.model=7 must be a text"),
                ({"stream": True}, "unsupported", "stream=true: not supported in a batch"),
                ({"stream": "no"}, "invalid_request", "body.stream='no' must be false"),
                ({"stream_options": {}}, "unsupported", "stream_options: not supported in a batch"),
                ({"prompt_logprobs": 1}, "unsupported", "prompt_logprobs: not supported in a batch"),
                ({"echo": True, "suffix": "a"}, "unsupported", "echo, suffix: not supported"),
                ({"best_of": 2}, "unsupported", "best_of: not supported"),
                ({"temprature": 1}, "invalid_request", "unknown fields: temprature; known are n, max_tokens"),
                ({"max_completion_tokens": 1}, "invalid_request", "unknown fields: max_completion_tokens"),
                ({"top_logprobs": 1}, "invalid_request", "unknown fields: top_logprobs"),
                ({"temperature": -1}, "invalid_request", "temperature=-1 is not accepted"),
                ({"temperature": "1"}, "invalid_request", "temperature='1' is not accepted"),
                ({"logprobs": True}, "invalid_request", "logprobs=True is not accepted"),
                ({"seed": 2**64}, "invalid_request", "seed=18446744073709551616 is not accepted"),
                ({"logit_bias": {"x": 1}}, "invalid_request", "logit_bias token id='x'"),
                ({"logit_bias": {"258": 1}}, "invalid_request", "logit_bias names token 258"),
                ({"n": 2}, "invalid_request", "n=2 with greedy decoding"),
                ({"n": 9, "temperature": 1}, "invalid_request", "n=9 exceeds max_batch=8"),
                ({"prompt": "a" * 300}, "context_length_exceeded", "exceed the context of 256"),
                ({"max_tokens": 253}, "context_length_exceeded", "4 prompt tokens + max_tokens=253 exceed"),
            ]
        ),
        *(
            (chat(0, **body), code, message)
            for body, code, message in [
                ({"messages": None}, "invalid_request", "body.messages is missing"),
                ({"messages": []}, "invalid_request", "body.messages=[] must be a list of objects"),
                ({"messages": "hi"}, "invalid_request", "body.messages='hi' must be"),
                ({"messages": [1, {"role": "user"}]}, "invalid_request", "must be a list of objects"),
                ({"messages": [{"role": "user"}]}, "invalid_request", "messages[0].content is missing"),
                ({"messages": [{"content": "a"}]}, "invalid_request", "messages[0].role must be"),
                ({"prompt": "a"}, "invalid_request", "takes messages; use the url /v1/completions"),
                ({"max_completion_tokens": 6}, "invalid_request", "max_tokens=5 and max_completion_tokens=6 differ"),
                ({"logprobs": 3}, "invalid_request", "body.logprobs=3 must be true or false in a chat"),
                ({"top_logprobs": 3}, "invalid_request", "body.top_logprobs needs logprobs=true"),
                ({"logprobs": True, "top_logprobs": 129}, "invalid_request", "logprobs=129 is not accepted"),
                ({"tools": []}, "unsupported", "tools: not supported"),
                ({"response_format": {"type": "text"}}, "unsupported", "response_format: not supported"),
            ]
        ),
    ],
)
def test_a_wrong_line_gets_an_error_and_the_others_go_on(run, paths, line, code, message):
    report, records, data = run([{**LINE, "custom_id": "first"}, line, {**LINE, "custom_id": "last"}])
    first, wrong, last = records
    assert text_of(first) == text_of(last)
    content = line if isinstance(line, dict) else {}
    custom_id = content.get("custom_id") or None
    assert wrong["custom_id"] == (custom_id if isinstance(custom_id, str) else None)
    assert (wrong["id"], wrong["response"]) == ("batch_req_1", None)
    assert wrong["error"]["code"] == code
    assert message in wrong["error"]["message"]
    assert len(wrong["error"]["message"]) < 1000
    assert str(ROOT) not in wrong["error"]["message"] and str(paths[0]) not in wrong["error"]["message"]
    assert (report.written, report.errors) == (3, 1)
    assert run(resume=True)[2] == data


def test_a_line_that_is_too_long_is_an_error_and_skipped(run, monkeypatch):
    for module in (batch_files, batch_lines):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 200)
    exact = encoded(completion(2, ""))[:-1]
    exact = exact.replace(b'""', b'"' + b"a" * (200 - len(exact)) + b'"')
    lines = [LINE, completion(1, "a" * 2_000_000), exact, completion(3, "b" * 200)]
    _, records, data = run(lines)
    assert [record["error"] is None for record in records] == [True, False, True, False]
    assert records[1]["error"]["code"] == "invalid_json"
    assert records[1]["error"]["message"] == "line 2 has more than 200 bytes; split or shorten it"
    assert run(resume=True)[2] == data
    changed = [LINE, completion(1, "a" * 1_999_999 + "b"), exact]
    with pytest.raises(RequestError, match="line 2 of the input has changed"):
        run(changed, resume=True)


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda lines: b"\n".join(lines),
        lambda lines: b"\r\n".join([*lines, b""]),
        lambda lines: b"\xef\xbb\xbf" + b"\n".join(lines),
        lambda lines: b"\xef\xbb\xbf\n \n\t\r\n" + b"\n\r\n\n".join(lines) + b"\n\n  \n  ",
        lambda lines: b"\n".join(b"  " + line + b"\t " for line in lines),
    ],
    ids=["no newline at the end", "CRLF", "BOM", "blank lines", "spaces"],
)
def test_line_ends_blank_lines_and_marks_change_nothing(run, paths, spoilt):
    lines = [encoded(completion(i, temperature=1))[:-1] for i in range(4)]
    _, records, expected = run(b"".join(line + b"\n" for line in lines))
    assert len(records) == 4
    paths[1].unlink()
    report, _, data = run(spoilt(lines))
    assert (data, report.lines) == (expected, 4)


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b" \r\n\n"])
def test_an_empty_input_has_an_empty_output(run, content):
    assert run(content) == (BatchReport(seconds=pytest.approx(0, abs=5)), [], b"")


def test_unicode_line_separators_end_no_line(llm, run):
    prompt = "a\u2028b\u2029c\x85d\x0b\x1c"
    line = json.dumps({**completion(0, prompt), "custom_id": "x\u2028y\u0085"}, ensure_ascii=False).encode()
    assert line.count(b"\n") == 0 and len(line.decode().splitlines()) > 1
    _, (record,), data = run(line + b"\n")
    assert record["custom_id"] == "x\u2028y\u0085"
    assert text_of(record) == llm.generate(prompt, SamplingParams(max_tokens=5))[0].outputs[0].text
    assert len(data.decode("ascii").splitlines()) == 1


def test_a_request_that_fails_is_an_error_and_the_others_have_their_bytes(run, paths, monkeypatch):
    lines = [completion(i, "abcdef"[i], temperature=1, max_tokens=9) for i in range(6)]
    _, expected, _ = run(lines)
    append, count = Sample.append, iter(range(1000))

    def failing(sample, token_id):
        if sample.request.prompt == "c" and next(count) == 4:
            raise ValueError("boom at 0x7f12345678\n in /usr/lib/python3/x.py")
        append(sample, token_id)

    monkeypatch.setattr(Sample, "append", failing)
    paths[1].unlink()
    report, records, _ = run()
    error = records[2].pop("error")
    assert (records[2]["response"], error["code"], report.errors) == (None, "request_failed", 1)
    assert error["message"] == "prompt 2: ValueError: boom at 0x... in ..."
    assert [r for r in records if r["id"] != "batch_req_2"] == [r for r in expected if r["id"] != "batch_req_2"]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_few_requests_and_answers_are_in_memory(folder, run, monkeypatch):
    """The first line is answered last: what ends meanwhile waits, but not without bound."""
    monkeypatch.setattr(batch, "LINES_AHEAD", 10)
    alive, read, numbers = [], [], {}
    step, lines_of = Engine.step, BatchFiles.lines

    def requests():
        gc.collect()  # a request and its samples refer to each other
        return sum(type(one) is Request for one in gc.get_objects())

    def counted_step(engine):
        if len(read) % 16 == 15:
            alive.append(requests())
        read.append(numbers["read"] - numbers["files"].count)
        return step(engine)

    def counted_lines(files):
        numbers["files"] = files
        for line in lines_of(files):
            numbers["read"] = line.index + 1
            yield line

    monkeypatch.setattr(Engine, "step", counted_step)
    monkeypatch.setattr(BatchFiles, "lines", counted_lines)
    before = requests()
    lines = [completion(0, max_tokens=150, ignore_eos=True)] + [completion(i, max_tokens=1) for i in range(1, 200)]
    report, records, _ = run(lines, llm=LLM(folder, max_batch=2, max_seq_len=256))
    assert (report.errors, len(records)) == (0, 200)
    # One that ended is held by a variable until the next ends.
    assert 2 <= max(alive) - before <= batch.REQUESTS_ALIVE * 2 + 1
    assert max(read) == 20


# --- going on ---------------------------------------------------------------------------------------------------------


def test_killed_at_twenty_random_moments_the_bytes_are_the_same(folder, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(map(encoded, mixed(250, longest=30))))
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.batch_kills", folder, source, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["statuses"] == [0, 0] and told["equal"]
    # The kills struck at different places, not all before the first line or behind the last.
    assert len({size for size in told["sizes"] if 0 < size < told["size"]}) >= 5, told["sizes"]


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_partial_last_line_is_written_anew(run, paths, where):
    _, records, expected = run(mixed(12))
    ends = [i + 1 for i, byte in enumerate(expected) if byte == ord("\n")]
    begin, end = {"first": (0, ends[0]), "middle": (ends[5], ends[6]), "last": (ends[-2], ends[-1])}[where]
    for length in {begin, begin + 1, begin + 9, begin + 30, (begin + end) // 2, end - 1, end}:
        paths[1].write_bytes(expected[:length])
        report, _, data = run(resume=True)
        assert data == expected
        assert report.resumed == expected[:length].count(b"\n")
        assert report.errors == sum(record["error"] is not None for record in records)


def test_nothing_of_a_partial_line_stays(run, paths):
    """Where no line is whole it may be of a run with other settings, and longer than all that is written now."""
    _, _, expected = run([completion(0)])
    paths[1].write_bytes(b'{"id": "batch_req_0", "custom_id": "line 0"' + b"x" * 5000)
    assert run(resume=True)[2] == expected


def test_duplicates_of_lines_that_are_written_are_found(run, paths):
    lines = [completion(0), b"oops", completion(0), completion(3, body="x"), completion(3)]
    _, records, expected = run(lines)
    assert [r["error"] and r["error"]["code"] for r in records][2::2] == ["duplicate_custom_id"] * 2
    for count in range(6):
        paths[1].write_bytes(b"".join(expected.splitlines(True)[:count]))
        assert run(resume=True)[2] == expected


def test_going_on_without_an_output_begins(run):
    assert run([LINE], resume=True)[0].written == 1


def _other_line(lines):
    return [*lines[:2], completion(2, "other"), *lines[3:]]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (_other_line, {}, "out.jsonl, line 3: line 3 of the input has changed since it was answered; go on as"),
        (lambda lines: lines[1:], {}, "line 1 answers 'batch_req_0' with custom_id 'line 0', but line 1 of the input"),
        (lambda lines: lines[:3], {}, "out.jsonl, line 4: the input has only 3 lines"),
        (lambda lines: lines, {"seed": 1}, "line 1 was written with another --seed or --max-seq-len; go on as"),
    ],
)
@pytest.mark.parametrize("end", [b"", b'{"id": "batch_req_4", "cus'])
def test_another_input_or_seed_is_refused_and_the_output_untouched(run, paths, change, options, message, end):
    lines = [completion(0), b"oops", completion(2), completion(3), completion(4)]
    _, _, data = run(lines)
    kept = b"".join(data.splitlines(True)[:4]) + end
    paths[1].write_bytes(kept)
    with pytest.raises(RequestError, match=message):
        run(change(lines), resume=True, **options)
    assert paths[1].read_bytes() == kept


def test_an_error_that_was_mended_in_the_input_is_another_input(run):
    run([completion(0, temperature=-1)])
    with pytest.raises(RequestError, match="line 1 of the input has changed"):
        run([completion(0, temperature=1)], resume=True)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"dtype": "float64"}, "dtype, backend, quantization, device or version"),
        ({"backend": "reference"}, "dtype, backend, quantization, device or version"),
        ({"split_size": 64}, "dtype, backend, quantization, device or version"),
        ({"max_seq_len": 128}, "--seed or --max-seq-len"),
    ],
)
def test_other_settings_are_refused(run, folder, options, part):
    run([completion(0, [300])])  # errors are of their settings, too
    with pytest.raises(RequestError, match=f"was written with another {part}; go on"):
        run(llm=LLM(folder, **{"max_seq_len": 256, **options}), resume=True)


def test_fingerprints_of_models(llm, folder, tmp_path):
    told = fingerprint(llm, folder, "tiny", 0)
    assert told == fingerprint(llm, folder, "tiny", 0)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert fingerprint(llm, copy, "tiny", 0) == told
    changed = {fingerprint(llm, copy, "other", 0)}
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        changed.add(fingerprint(llm, copy, "tiny", 0))
    assert len(changed) == 4 and told not in changed
    assert all(one.split("_")[2:] == told.split("_")[2:] for one in changed)


def test_large_files_count_by_samples(monkeypatch, tmp_path):
    monkeypatch.setattr(batch, "_MAX_HASHED_BYTES", 1000)
    path = tmp_path / "weights"
    path.write_bytes(bytes(3_000_000))
    before = list(batch._contents(path))
    assert sum(map(len, before)) < 1_100_000
    with path.open("r+b") as file:
        file.seek(1_500_001)
        file.write(b"x")
    assert list(batch._contents(path)) != before


@pytest.mark.parametrize(
    "content",
    [
        b"my notes",
        b"my notes\n",
        b'{"id": "batch_req_0"}\n',
        b'{"id": "batch_req_0", "custom_id": "line 0", "response": null, "error": null}\n',
        b'{"id": "batch_req_0", "custom_id": "line 0", "response": {"body": 3}, "error": null}\n',
        b"\x00" * 100,
        b"[]\n",
    ],
)
def test_files_of_others_are_not_touched(run, paths, content):
    paths[1].write_bytes(content)
    for resume in (False, True):
        with pytest.raises(RequestError, match="out.jsonl"):
            run([completion(0)], resume=resume)
        assert paths[1].read_bytes() == content


# --- interrupts and faults --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineDeadError("the device failed")])
@pytest.mark.parametrize("steps", [0, 1, 13, 40])
def test_what_is_done_is_written_behind_ctrl_c_and_a_fault(run, paths, folder, monkeypatch, error, steps):
    _, _, expected = run(mixed(40))
    paths[1].unlink()
    step, left = Engine.step, iter(range(steps))

    def failing(engine):
        if next(left, None) is None:
            raise error
        return step(engine)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "step", failing)
        synced = []
        patched.setattr(os, "fsync", synced.append)
        with pytest.raises(GenerationInterrupted if error is KeyboardInterrupt else EngineDeadError) as raised:
            run()
    written = paths[1].read_bytes()
    assert expected.startswith(written) and written[-1:] in (b"\n", b"")
    assert synced
    if steps == 40:
        assert len(written) > 1000
    if error is KeyboardInterrupt:
        assert raised.value.outputs.written == written.count(b"\n") < raised.value.outputs.lines == 40
    report, _, data = run(resume=True)
    assert (data, report.resumed) == (expected, written.count(b"\n"))


@pytest.mark.parametrize("place", range(8))
def test_ctrl_c_around_a_write_loses_and_doubles_nothing(run, paths, monkeypatch, place):
    """It may strike behind any statement: here before and behind the writes, with their bytes half or all there."""
    _, _, expected = run(mixed(30))
    paths[1].unlink()
    pwrite, calls = os.pwrite, iter(range(1000))

    def interrupted(fd, data, offset):
        if next(calls) == place // 2:
            pwrite(fd, data[: len(data) // 2] if place % 2 else data, offset)
            raise KeyboardInterrupt
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", interrupted)
        with pytest.raises(GenerationInterrupted):
            run()
    written = paths[1].read_bytes()
    assert written.endswith(b"\n") and expected.startswith(written)
    assert run(resume=True)[2] == expected


def test_writes_that_take_a_part_go_on(run, paths, monkeypatch):
    _, _, expected = run(mixed(9))
    paths[1].unlink()
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    assert run()[2] == expected


def test_a_full_disk_is_one_error_and_leaves_whole_lines(run, paths):
    _, _, expected = run(mixed(30))
    paths[1].unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(expected) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="lines before are whole, go on later with --resume") as raised:
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(paths[1]))
    written = paths[1].read_bytes()
    assert written.endswith(b"\n") and expected.startswith(written)
    # Not one line more would have fitted.
    assert expected.find(b"\n", len(written)) >= len(expected) // 2
    assert f"the {written.count(10)} lines before" in str(raised.value)
    report, _, data = run(resume=True)
    assert (data, report.resumed) == (expected, written.count(b"\n"))


def test_a_sync_that_fails_is_told(run, monkeypatch):
    def fail(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error; the 1 lines before are whole"):
        run([LINE])


def test_it_is_synced_once_a_second_and_at_the_end(run, monkeypatch):
    times, now = [], [0.0]

    def clock():
        now[0] += 0.02
        return now[0]

    monkeypatch.setattr(batch_files.time, "monotonic", clock)
    monkeypatch.setattr(os, "fsync", lambda fd: times.append(now[0]))
    run([completion(i, max_tokens=3) for i in range(60)])
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert len(gaps) > 2
    assert all(gap >= 1 for gap in gaps[:-1])


# --- files ------------------------------------------------------------------------------------------------------------


def test_one_process_writes_an_output(paths):
    source, target = paths
    source.write_bytes(b"")
    with (
        BatchFiles(source, target),
        pytest.raises(RequestError, match="another process is writing it"),
    ):
        BatchFiles(source, target, resume=True)
    BatchFiles(source, target).__exit__()


def test_files_that_cannot_be(paths, tmp_path):
    source, target = paths
    with pytest.raises(FileNotFoundError):
        BatchFiles(source, target)
    assert not target.exists()
    source.write_bytes(b"{}\n")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(source)
    for output, message in [
        (source, "is the input"),
        (tmp_path / "link", "is the input"),
        (tmp_path, "is a folder"),
        (tmp_path / "fifo", "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
        (tmp_path / "a\0b", "is no file name"),
    ]:
        with pytest.raises(RequestError, match=message):
            BatchFiles(source, output, resume=True)
    with pytest.raises(RequestError, match="not a regular file"):
        BatchFiles(tmp_path / "fifo", target)
    with pytest.raises(OSError, match="no/out.jsonl"):
        BatchFiles(source, tmp_path / "no" / "out.jsonl")
    target.write_bytes(b"x")
    with pytest.raises(RequestError, match="holds 1 bytes already; continue it with --resume, or delete it"):
        BatchFiles(source, target)
    assert (source.read_bytes(), target.read_bytes()) == (b"{}\n", b"x")


def test_no_file_stays_open(paths):
    paths[0].write_bytes(b"{}\n")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(RequestError):
            BatchFiles(paths[0], paths[0])
        with BatchFiles(*paths, resume=True) as files:
            assert list(files.records()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_report_is_plain_data():
    assert dataclasses.asdict(BatchReport(3, 2))["lines"] == 3

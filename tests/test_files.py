"""JSON read strictly, files written whole."""

import json
import os

import pytest

from llama_fast.errors import CheckpointIOError, ConfigError
from llama_fast.files import MAX_BYTES, MAX_DEPTH, parse_json_object, read_json_object, written_whole

REFUSED = {
    "empty": (b"", "the file is empty"),
    "blank": (b" \n", "the file is empty"),
    "list": (b"[1]", "it holds a list"),
    "null": (b"null", "it holds null"),
    "number": (b"1", "it holds a number"),
    "truth": (b"true", "it holds true or false"),
    "text": (b'"a"', "it holds a string"),
    "cut": (b'{"a": 1', "not strict JSON"),
    "rest": (b"{} {}", "not strict JSON"),
    "twice": (b'{"a": 1, "b": 2, "a": 1}', "'a' appears twice"),
    "twice_inside": (b'{"x": [{"a": 1, "a": 2}]}', "'a' appears twice"),
    "nan": (b'{"a": NaN}', "NaN is no JSON number"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is no JSON number"),
    "huge_float": (b'{"a": 1e999}', "1e999 is beyond a double"),
    "huge_int": (b'{"a": ' + b"9" * 5000 + b"}", "is beyond a double"),
    "latin_1": (b'{"a": "\xe9"}', "not UTF-8: byte 7 is 0xe9"),
    "bom": (b"\xef\xbb\xbf{}", "byte order mark"),
    "utf_16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "deep": (b'{"a": ' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} deep"),
    "deep_lists": (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", f"more than {MAX_DEPTH} deep"),
    "very_deep": (b'{"a": ' + b"[" * 400_000, f"more than {MAX_DEPTH} deep"),
    "control_character_in_key": (b'{"\\u001b[2J": 1, "\\u001b[2J": 2}', "'\\x1b[2J' appears twice"),
}


@pytest.mark.parametrize("content", REFUSED)
def test_refused(tmp_path, content):
    data, told = REFUSED[content]
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_json_object(path, ConfigError)
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("depth", [1, MAX_DEPTH])
def test_depth_up_to_the_limit_is_read(depth):
    data = b'{"a": ' * depth + b"1" + b"}" * depth
    assert parse_json_object(data, "x", ConfigError) == json.loads(data)


def test_values_are_those_of_json():
    data = '{"a": [1, -2.5, 1e-400, true, null, "\\u00e9\\ud83d\\ude00"], "\U0001f600": {}}'.encode()
    assert parse_json_object(data, "x", ConfigError) == json.loads(data)


def test_size_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": "' + b"x" * (MAX_BYTES - 9) + b'"}')
    assert path.stat().st_size == MAX_BYTES
    assert len(read_json_object(path, ConfigError)["a"]) == MAX_BYTES - 9
    with pytest.raises(ConfigError, match=f"has {MAX_BYTES:,} bytes; such a file has at most {MAX_BYTES - 1:,}"):
        read_json_object(path, ConfigError, max_bytes=MAX_BYTES - 1)


def test_what_is_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, told in [("", "is a folder"), ("fifo", "not a regular file"), ("none", "No such file"), ("a\0b", "null")]:
        with pytest.raises(CheckpointIOError, match=told):
            read_json_object(f"{tmp_path}/{name}", ConfigError, io_error=CheckpointIOError)
        with pytest.raises(ConfigError, match=told):
            read_json_object(f"{tmp_path}/{name}", ConfigError)


def test_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail_half_way():
        with written_whole(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert path.read_text() == "old"
    with written_whole(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_links_are_replaced_and_not_written_through(tmp_path):
    (tmp_path / "other").write_text("other")
    for name in ("a.txt", "a.txt.tmp"):
        (tmp_path / name).symlink_to("other")
    with written_whole(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert not (tmp_path / "a.txt").is_symlink()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "new", "other": "other"}

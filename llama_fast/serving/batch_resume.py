"""What an output holds of an earlier run, checked against the input and the settings before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from llama_fast.errors import RequestError, brief
from llama_fast.files import parse_json_object
from llama_fast.serving.batch_files import BatchFiles, InputLine
from llama_fast.serving.batch_lines import CustomIds, DuplicateIdError, InvalidJsonError, custom_id_of, parse
from llama_fast.serving.batch_records import head

# Of a fingerprint, in order.
PARTS = ("model", "dtype, backend, quantization, device or version", "--seed or --max-seq-len")

_BEGIN_ANEW = "; go on as that run began, or give the output another name to begin anew"


def check_written(
    files: BatchFiles, lines: Iterator[InputLine], num_lines: int, custom_ids: CustomIds, fingerprint: str
) -> tuple[int, int]:
    """Check the output's lines, cut a partial last one off and let the output go on behind them.

    Args:
        lines: of the input; those that are answered are taken.
        num_lines: how many it has.
        custom_ids: gets theirs.
        fingerprint: of this run.

    Returns:
        How many lines are answered, and how many of them by an error.

    Raises:
        RequestError: the output was written for other lines or with other settings; it is unchanged then.
    """
    count = length = errors = 0
    for written in files.records():
        where = f"{files.target}, line {count + 1}"
        line = next(lines, None) if written.endswith(b"\n") else None
        if count >= num_lines or (line is None and written.endswith(b"\n")):
            raise RequestError(f"{where}: the input has only {count:,} lines{_BEGIN_ANEW}")
        if line is None:
            # Behind a kill. But it could be the end of somebody's text file.
            begin = head(f"batch_req_{count}")
            if written[: len(begin)] != begin[: len(written)]:
                raise RequestError(f"{where} was not written by llama-fast batch{_BEGIN_ANEW}")
            break
        errors += _tells_error(written, line, _custom_id(line, custom_ids), fingerprint, where)
        count += 1
        length += len(written)
    files.resume_at(count, length)
    return count, errors


def _custom_id(line: InputLine, custom_ids: CustomIds) -> str | None:
    try:
        custom_id = custom_id_of(parse(line))
    except InvalidJsonError:
        return None
    if custom_id is not None:
        with suppress(DuplicateIdError):
            custom_ids.take(custom_id, line)
    return custom_id


def _tells_error(written: bytes, line: InputLine, custom_id: str | None, fingerprint: str, where: str) -> bool:
    """Whether a line of the output tells an error.

    Raises:
        RequestError: it is not the answer to `line` by a run with this fingerprint.
    """
    content = parse_json_object(written, where, RequestError)
    error, response = content.get("error"), content.get("response")
    told: Any = error
    request_id: Any = None
    if isinstance(response, Mapping):
        told, request_id = response.get("body"), response.get("request_id")
    elif isinstance(error, Mapping):
        request_id = error.get("request_id")
    if not isinstance(told, Mapping):
        raise RequestError(f"{where} was not written by llama-fast batch{_BEGIN_ANEW}")
    if (content.get("id"), content.get("custom_id")) != (line.id, custom_id):
        raise RequestError(
            f"{where} answers {brief(content.get('id'))} with custom_id {brief(content.get('custom_id'))}, but line "
            f"{line.number} of the input is {brief(line.id)} with {brief(custom_id)}{_BEGIN_ANEW}"
        )
    if request_id != line.request_id:
        raise RequestError(f"{where}: line {line.number} of the input has changed since it was answered{_BEGIN_ANEW}")
    found = told.get("system_fingerprint")
    if found != fingerprint:
        parts = zip(PARTS, str(found).split("_")[1:], fingerprint.split("_")[1:], strict=False)
        differ = [part for part, before, now in parts if before != now] or ["version"]
        raise RequestError(f"{where} was written with another {' and another '.join(differ)}{_BEGIN_ANEW}")
    return response is None

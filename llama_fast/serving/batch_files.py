"""The two files of a batch: lines of the input one by one, and an output that is whole whenever its writer is killed.

Input   a line ends with \\n or \\r\\n; blank lines count for nothing, and a byte order mark at the beginning is no
        text. At most MAX_LINE_BYTES of it are in memory.
Output  whole lines are appended at a length that is known, so that writing a line once more changes nothing. They reach
        the disk within SYNC_SECONDS. Behind a kill there may be a part of a line, which `resume_at` cuts off.
Lock    one process writes an output: flock, which ends with the process.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from llama_fast.errors import RequestError

# A text has at most 8 MiB (tokenizer/text_checks.py); the rest is for JSON's escapes.
MAX_LINE_BYTES = 16 << 20
# What this package writes is far below: a line of it that is longer was written by something else.
MAX_RECORD_BYTES = 256 << 20
SYNC_SECONDS = 1.0

_BLANK = b" \t\r\n"  # what JSON calls white space
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputLine:
    """A line that is not blank.

    Attributes:
        index: how many such lines stand before it.
        number: of the line in the file, from 1.
        content: its bytes without white space around them; their sha256 where there are more than MAX_LINE_BYTES.
        too_long: whether there are.
    """

    index: int
    number: int
    content: bytes
    too_long: bool = False

    @property
    def id(self) -> str:
        """Of its record in the output."""
        return f"batch_req_{self.index}"

    @property
    def request_id(self) -> str:
        """Names what the line says: a changed line has another one."""
        return f"req_{hashlib.sha256(self.content).hexdigest()[:24]}"


@dataclass(frozen=True)
class _Written:
    """How far the output is written. One object, so that Ctrl-C finds count and length fitting each other."""

    count: int
    length: int


class BatchFiles:
    """Input and output, both open, the output locked; a context manager that closes them.

    Args:
        source: a regular file.
        target: is created. What it holds is changed by `append` and `resume_at` only.
        resume: whether it may hold anything.

    Raises:
        RequestError: they are one file, or no regular files; the output holds something and `resume` is False, or
            another process is writing it.
        OSError: one of them cannot be opened.
    """

    def __init__(self, source: Path, target: Path, *, resume: bool = False) -> None:
        self.target = target
        self._written = _Written(0, 0)
        self._synced = time.monotonic()
        with ExitStack() as opened:
            self._input = opened.enter_context(_regular(source).open("rb"))
            self._output = os.open(_regular(target), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            opened.callback(os.close, self._output)
            self._check(source, resume)
            self._opened = opened.pop_all()

    def _check(self, source: Path, resume: bool) -> None:
        found = os.fstat(self._output)
        if os.path.samestat(found, os.fstat(self._input.fileno())):
            raise RequestError(f"{self.target} is the input {source} itself; give the output another name")
        try:
            fcntl.flock(self._output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RequestError(
                f"{self.target}: another process is writing it; wait for its end, or give the output another name"
            ) from error
        except OSError as error:
            raise OSError(error.errno, f"cannot be locked ({error.strerror})", str(self.target)) from error
        # Only now: before, the other process could have been about to write.
        size = os.fstat(self._output).st_size
        if size and not resume:
            raise RequestError(
                f"{self.target} holds {size:,} bytes already; continue it with --resume, or delete it to begin anew"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    # --- input --------------------------------------------------------------------------------------------------------

    def count_lines(self) -> int:
        """Lines of the input that are not blank."""
        return sum(1 for _ in self.lines())

    def lines(self) -> Iterator[InputLine]:
        """Those lines from the first on; one iterator at a time."""
        self._input.seek(0)
        index = number = 0
        while piece := self._input.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                piece = piece.removeprefix(_MARK)
            if len(piece) > MAX_LINE_BYTES and not piece.endswith(b"\n"):
                yield InputLine(index, number, self._rest_of_line(piece), too_long=True)
                index += 1
            elif content := piece.strip(_BLANK):
                yield InputLine(index, number, content)
                index += 1

    def _rest_of_line(self, piece: bytes) -> bytes:
        digest = hashlib.sha256(piece)
        while not piece.endswith(b"\n") and (piece := self._input.readline(1 << 20)):
            digest.update(piece)
        return digest.digest()

    # --- output -------------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Whole lines of the output."""
        return self._written.count

    def records(self) -> Iterator[bytes]:
        """What the output holds, line by line; the last one has no line break if it is a part of a line.

        Raises:
            RequestError: a line is longer than any that this package writes.
        """
        with open(os.dup(self._output), "rb") as file:
            file.seek(0)
            while line := file.readline(MAX_RECORD_BYTES):
                if len(line) == MAX_RECORD_BYTES:
                    raise RequestError(f"{self.target} was not written by this command: a line has {len(line):,} bytes")
                yield line

    def resume_at(self, count: int, length: int) -> None:
        """Go on behind the first `count` lines, which have `length` bytes; what follows them is cut off."""
        if os.fstat(self._output).st_size > length:
            os.ftruncate(self._output, length)
        self._written = _Written(count, length)

    def append(self, lines: Sequence[bytes]) -> None:
        """Write whole lines. Where an interrupt strikes before `count` has grown, the same lines can be written again.

        Raises:
            OSError: naming the file; it ends with the last line that was written whole, and `count` says so.
        """
        before, data = self._written, b"".join(lines)
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._output, data[written:], before.length + written)
        except OSError as error:
            whole = data[: data.rfind(b"\n", 0, written) + 1]
            with suppress(OSError):
                os.ftruncate(self._output, before.length + len(whole))
            self._written = _Written(before.count + whole.count(b"\n"), before.length + len(whole))
            raise self._failed(error) from error
        self._written = _Written(before.count + len(lines), before.length + len(data))
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until all that was written is on the disk.

        Raises:
            OSError: naming the file.
        """
        try:
            os.fsync(self._output)
        except OSError as error:
            raise self._failed(error) from error
        self._synced = time.monotonic()

    def _failed(self, error: OSError) -> OSError:
        reason = f"{error.strerror or error}; the {self.count:,} lines before are whole, go on later with --resume"
        return OSError(error.errno or errno.EIO, reason, str(self.target))


def _regular(path: Path) -> Path:
    """The path, if it is a regular file or nothing yet: opening a FIFO would wait for its other end."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return path
    except ValueError as error:  # a NUL in it
        raise RequestError(f"{str(path)!r:.200} is no file name: {error}") from error
    if not stat.S_ISREG(mode):
        raise RequestError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}; give a file")
    return path

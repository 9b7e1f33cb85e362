"""What `tokenizer(texts)` gives: columns of ids and masks, padded and turned into tensors."""

from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llama_fast.errors import RequestError, UnsupportedError

if TYPE_CHECKING:
    import torch

# Rows of these columns are as long as the text; what stands where a row is padded. input_ids get the pad token.
_FILL: dict[str, Any] = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1, "offset_mapping": (0, 0)}

_PADDING = {False: None, "do_not_pad": None, True: "longest", "longest": "longest", "max_length": "max_length"}


class BatchEncoding(UserDict[str, Any]):
    """Columns by name: `encoding["input_ids"]`, `encoding.input_ids`, or `model(**encoding)`.

    A column is a list of rows, one a text (of one text just its row), or a tensor [num_texts, seq_len].
    """

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:  # "data" is missing only while a copy is made
            raise AttributeError(f"BatchEncoding has no attribute or column {name!r:.80}")
        return self.data[name]

    def to(self, device: "str | int | torch.device", *, non_blocking: bool = False) -> "BatchEncoding":
        """Moves the tensors to `device`; returns itself."""
        self.data = {
            name: column.to(device, non_blocking=non_blocking) if hasattr(column, "to") else column
            for name, column in self.data.items()
        }
        return self

    def convert_to_tensors(self, tensor_type: str | None) -> "BatchEncoding":
        """Turns the columns into tensors: "pt" (PyTorch) or "np" (NumPy), int64; returns itself.

        Raises:
            UnsupportedError: another `tensor_type`.
            RequestError: rows of one column have different lengths.
        """
        if tensor_type is None:
            return self
        if tensor_type not in ("pt", "np"):
            raise UnsupportedError(f"return_tensors={tensor_type!r:.80} is not supported; use 'pt', 'np' or None")
        for name, column in self.data.items():
            if hasattr(column, "shape"):
                continue
            lengths = {len(row) for row in column if isinstance(row, Sequence)}
            if len(lengths) > 1:
                raise RequestError(
                    f"{name} has rows of different lengths ({min(lengths)} to {max(lengths)}), which make no tensor; "
                    "pass padding=True, or truncation=True with max_length"
                )
            try:
                array = np.asarray(column, dtype=np.int64)
            except (TypeError, ValueError, OverflowError) as cause:
                raise RequestError(f"{name} must hold rows of integers to become a tensor") from cause
            self.data[name] = array if tensor_type == "np" else _torch_tensor(array)
        return self


def pad_rows(
    columns: Mapping[str, list[list[Any]]],
    padding: bool | str,
    *,
    pad_token_id: int | None,
    max_length: int | None,
    multiple_of: int | None,
    side: str,
) -> dict[str, list[list[Any]]]:
    """`columns` with every row of a column that follows the text brought to one length; no row is cut.

    Args:
        columns: rows by column name, "input_ids" among them.
        padding: False; True or "longest": to the longest row; "max_length": to `max_length`, if that is given.
        multiple_of: round the length up to a multiple of it.
        side: "left" or "right", where the padding stands.

    Raises:
        RequestError: there is no pad token, or an argument has another value.
    """
    mode = _PADDING.get(padding, "") if isinstance(padding, bool | str) else ""
    if mode == "":
        raise RequestError(f"padding must be True, False, 'longest' or 'max_length'; got {padding!r:.80}")
    check_side("padding_side", side)
    check_length("pad_to_multiple_of", multiple_of)
    if mode is None or (mode == "max_length" and max_length is None):
        return dict(columns)
    if pad_token_id is None:
        raise RequestError(
            "Asking to pad but the tokenizer does not have a padding token. Select one: tokenizer.pad_token = "
            "tokenizer.eos_token (Llama has none of its own)"
        )
    longest = max(len(row) for row in columns["input_ids"])
    length = longest if max_length is None or mode == "longest" else max_length
    length = -(-length // (multiple_of or 1)) * (multiple_of or 1)
    fill = {**_FILL, "input_ids": pad_token_id}
    return {
        name: [_padded(row, fill[name], length, side) for row in rows] if name in fill else rows
        for name, rows in columns.items()
    }


def kept_positions(
    sequences: Sequence[int | None],
    positions: Sequence[int],
    max_length: int,
    strategy: Literal["longest_first", "only_first", "only_second"],
    side: str,
) -> list[int]:
    """Which of `positions` stay when a text, or a pair, is cut to `max_length`; special tokens around them all do.

    Args:
        sequences: for each position, 0 or 1: the text that it belongs to; None: a special token around them.
        strategy: "longest_first" takes off the longer text until both have one length, then from both.
        side: "right" cuts the end off, "left" the start.

    Raises:
        RequestError: the text to cut is too short for that.
    """
    excess = len(positions) - max_length
    if excess <= 0:
        return list(positions)
    texts = [[at for at in positions if sequences[at] == text] for text in (0, 1)]
    lengths = [len(text) for text in texts]
    if strategy == "longest_first":
        room = sum(lengths) - excess
        shorter = min(min(lengths), max(room, 0) // 2) if texts[1] else 0
        # The shorter text stays whole where there is room; an odd one goes to the longer text, or to the second.
        longer = lengths[0] > lengths[1]
        kept = [room - shorter, shorter] if longer or not texts[1] else [shorter, room - shorter]
        fits = room >= 0
    else:
        cut = ("only_first", "only_second").index(strategy)
        kept = list(lengths)
        kept[cut] -= excess
        fits = kept[cut] > 0
    if not fits:
        raise RequestError(
            f"max_length={max_length} cannot be reached with truncation={strategy!r}: of {len(positions)} tokens "
            f"{len(positions) - sum(lengths)} are special; the texts have {lengths[0]} and {lengths[1]}"
        )
    dropped = {
        at
        for text, num_kept in zip(texts, kept, strict=True)
        for at in (text[num_kept:] if side == "right" else text[: len(text) - num_kept])
    }
    return [at for at in positions if at not in dropped]


def check_length(name: str, value: object) -> None:
    """Accepts None and integers above 0.

    Raises:
        RequestError: it is another value.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise RequestError(f"{name} must be an integer above 0; got {value!r:.80}")


def check_side(name: str, value: object) -> None:
    """Accepts "left" and "right".

    Raises:
        RequestError: it is another value.
    """
    if value not in ("left", "right"):
        raise RequestError(f"{name} must be 'left' or 'right'; got {value!r:.80}")


def _padded(row: Sequence[Any], fill: Any, length: int, side: str) -> list[Any]:
    padding = [fill] * (length - len(row))
    return [*padding, *row] if side == "left" else [*row, *padding]


def _torch_tensor(array: "np.ndarray[Any, Any]") -> "torch.Tensor":
    import torch  # a tokenizer alone does not need it

    return torch.from_numpy(array)

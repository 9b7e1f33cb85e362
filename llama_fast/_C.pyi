from collections.abc import Sequence

# Addresses are `Tensor.data_ptr()`, 0 for none; meanings and shapes: csrc/cpu/calls.h.

class LinearWeight:
    # A part: weight, bias, out_features, scales, zeros.
    def __init__(
        self, dtype: int, in_features: int, group_size: int, parts: Sequence[tuple[int, int, int, int, int]]
    ) -> None: ...

class Pages:
    def __init__(
        self,
        k: int,
        v: int,
        page_stride: int,
        head_stride: int,
        num_pages: int,
        num_kv_heads: int,
        page_size: int,
        head_dim: int,
    ) -> None: ...

class Places:
    def __init__(
        self,
        num_tokens: int,
        num_seqs: int,
        max_pages: int,
        slots: int,
        seq_ids: int,
        query_starts: int,
        seq_lens: int,
        page_table: int,
    ) -> None: ...
    def problem(self, num_pages: int, page_size: int) -> str: ...

class DecodeRows:
    def __init__(
        self,
        token_ids: int,
        slots: int,
        seq_lens: int,
        limits: int,
        done: int,
        page_table: int,
        stop_mask: int,
        output_counts: int,
        max_pages: int,
        vocab_size: int,
        spare_page: int,
    ) -> None: ...

interface: int

def instruction_sets() -> list[str]: ...
def selected() -> str: ...
def select(name: str) -> None: ...

# Addresses are `Tensor.data_ptr()`, 0 for none; meanings and shapes: csrc/cuda/int4_linear_call.h.

interface: int
source_hash: str
architectures: list[int]

def load() -> None: ...
def int4_linear(
    x: int,
    x_stride: int,
    num_rows: int,
    words: int,
    scales: int,
    zeros: int,
    bias: int,
    residual: int,
    out: int,
    out_features: int,
    in_features: int,
    group_size: int,
    activation: int,
    out_is_float: bool,
    stream: int,
) -> None: ...

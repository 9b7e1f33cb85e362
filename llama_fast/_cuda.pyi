# Addresses are `Tensor.data_ptr()`, 0 for none; meanings and shapes: csrc/cuda/linear_call.h.

interface: int
source_hash: str
architectures: list[int]

def load() -> None: ...
def linear(
    x: int,
    x_stride: int,
    num_rows: int,
    weight: int,
    bias: int,
    residual: int,
    out: int,
    out_features: int,
    in_features: int,
    activation: int,
    out_is_float: bool,
    stream: int,
    token_tiles: int = 0,
    weight_tiles: int = 0,
) -> None: ...

"""What a decoding step does to memory and host, seen from PyTorch's dispatcher: what a CUDA graph would not allow.

A step that is captured must not read a value on the host, make anything whose size follows from values, copy from the
host, or keep memory that it took; and it must do the same on the same memory each time.
"""

import contextlib
import gc

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

HOST_READS = {"aten._local_scalar_dense", "aten.item", "aten.equal", "aten.is_nonzero", "aten.allclose"}
SIZED_BY_VALUES = {"aten.nonzero", "aten.masked_select", "aten.unique_dim", "aten._unique2", "aten.bincount"}
# What torch.tensor becomes; a copy between devices is seen by its arguments.
HOST_COPIES = {"aten.lift_fresh", "aten.lift_fresh_copy"}


class NotCapturable(AssertionError):
    """A step did what a CUDA graph does not allow."""


class StepWatch(TorchDispatchMode):
    """Records every operation of a step and its tensors, and raises NotCapturable at what is forbidden.

    Attributes:
        calls: (operation, its tensors): a tensor of the step's own by the order in which it was made, another one by
            where it is.
    """

    def __init__(self):
        super().__init__()
        self.calls = []
        self._made = {}
        self._storages = []
        self._makers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = f"{func.namespace}.{func._schema.name.partition('::')[2]}"
        if name in HOST_READS:
            raise NotCapturable(f"{name}: the host reads a value")
        if name in SIZED_BY_VALUES or (name == "aten.index" and self._is_mask(args)):
            raise NotCapturable(f"{name}: a size follows from values")
        if name in HOST_COPIES:
            raise NotCapturable(f"{name}: a copy from the host")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.called(name, inputs)
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if len({tensor.device for tensor in inputs + outputs}) > 1:
            raise NotCapturable(f"{name}: a copy between devices")
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._made[storage._cdata] = len(self._storages)
                self._storages.append(StorageWeakRef(storage))
                self._makers.append(name)
        return result

    @staticmethod
    def _is_mask(args):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])

    def called(self, name, tensors):
        """Take down an operation; kernels that PyTorch does not know call this, too."""
        self.calls.append((name, [self._place(tensor) for tensor in tensors]))

    def _place(self, tensor):
        storage = tensor.untyped_storage()
        made = self._made.get(storage._cdata)
        where = tensor.data_ptr() if made is None or self._storages[made].expired() else f"made {made}"
        return where, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype

    @property
    def kept(self):
        """The operations that made tensors which are still alive."""
        pairs = zip(self._makers, self._storages, strict=True)
        return [maker for maker, storage in pairs if not storage.expired()]


@contextlib.contextmanager
def _no_lists():
    """On the CPU these read values without PyTorch's dispatcher."""
    names = ("tolist", "numpy", "__array__")
    plain = {name: getattr(torch.Tensor, name) for name in names}

    def refused(name):
        def read(tensor, *args, **kwargs):
            raise NotCapturable(f"Tensor.{name}: the host reads values")

        return read

    for name in names:
        setattr(torch.Tensor, name, refused(name))
    try:
        yield
    finally:
        for name in names:
            setattr(torch.Tensor, name, plain[name])


def watched(step, launches=contextlib.nullcontext):
    """Run a step under watch; `launches(watch)`: a context in which launches of kernels are taken down.

    Raises:
        NotCapturable: see StepWatch; or the step kept memory that it took.
    """
    watch = StepWatch()
    with torch.no_grad(), _no_lists(), launches(watch) if launches is not contextlib.nullcontext else launches(), watch:
        step()
    gc.collect()  # the interpreter of kernels leaves circles
    if watch.kept:
        raise NotCapturable(f"tensors of the step outlive it: {', '.join(watch.kept)}")
    return watch.calls


def assert_capturable(step, launches=contextlib.nullcontext):
    """Two runs, the same operations on the same memory."""
    step()  # the first call may make a table, or compile
    first, second = watched(step, launches), watched(step, launches)
    assert first == second, next(pair for pair in zip(first, second, strict=False) if pair[0] != pair[1])
    assert first
    return first


@contextlib.contextmanager
def outside(watch):
    """What a kernel's interpreter does itself is no operation of the step."""
    with _disable_current_modes(), torch.no_grad():
        yield

"""Captured steps without a GPU: what differs from called ones is shape, memory and when the host reads."""

import torch

from llama_fast.ops import replay


class CapturingSteps:
    """Stands for replay.GraphSteps: runs a step once when it is captured, then at each replay."""

    captures = True
    ahead = 2

    def __init__(self, out_of_memory=()):
        self.captured = 0
        self._out_of_memory = set(out_of_memory)

    def make(self, step):
        self.captured += 1
        if self.captured in self._out_of_memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        step()
        return step


def capturing(monkeypatch, **options):
    """Engines made from here on capture; their `CapturingSteps` are in the list."""
    made = []

    def maker(ops, device, graphs):
        made.append(CapturingSteps(**options) if graphs else replay.EagerSteps())
        return made[-1]

    monkeypatch.setattr(replay, "step_maker", maker)
    return made

"""Captured steps without a GPU: what differs from called ones is shape, memory and when the host reads."""

import weakref

import torch

from llama_fast.ops import replay


class CapturingSteps:
    """Stands for replay.GraphSteps: a captured step runs at each replay.

    As there, a step must have run before it is captured, nothing may be captured before all have run, and a pool whose
    last graph is gone takes no other one.

    Args:
        out_of_memory: captures that find no memory, counted from 1 over all instances of `counter`.
    """

    captures = True
    ahead = 2

    def __init__(self, out_of_memory=(), counter=None):
        self.counter = [0] if counter is None else counter
        self._out_of_memory = set(out_of_memory)
        self._warm, self._released = [], False
        self._used, self._graphs = False, weakref.WeakSet()

    @property
    def captured(self):
        return self.counter[0]

    def warm_up(self, step):
        assert not self._released
        step()
        self._warm.append(step)

    def release(self):
        self._released = True

    def make(self, step):
        self.counter[0] += 1
        if self._used and not self._graphs:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        if self.captured in self._out_of_memory:
            # As in a capture: what the step made is there, in the frames of the error.
            step()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        class Graph:
            def replay(self, kept=step):
                kept()

        graph = Graph()
        self._graphs.add(graph)
        self._used = True
        return graph.replay


def capturing(monkeypatch, **options):
    """Engines made from here on capture; their `CapturingSteps` are in the list."""
    made, counter = [], [0]

    def maker(ops, device, graphs):
        made.append(CapturingSteps(counter=counter, **options) if graphs else replay.EagerSteps())
        return made[-1]

    monkeypatch.setattr(replay, "step_maker", maker)
    return made

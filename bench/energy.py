"""Joules that a GPU takes, from the counter that NVML keeps."""

from __future__ import annotations

import torch

INSTALL = "pip install nvidia-ml-py"


class EnergyMeter:
    """Reads the energy counter of one GPU, which its driver renews some ten times a second: time whole runs.

    Args:
        device: a CPU has no such counter, nor has a GPU before Volta or a slice of one.

    Attributes:
        problem: why there are no joules; None if there are.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle = None
        self.problem: str | None = f"no energy counter for {device}"
        if device.type != "cuda":
            return
        try:
            import pynvml
        except ImportError:
            self.problem = f"no energy without NVML's bindings: {INSTALL}"
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            # CUDA counts the GPUs that it may see, NVML all of them: only the identifier says which one is meant.
            identifier = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(identifier)
            self.joules()
            self.problem = None
        except pynvml.NVMLError as error:
            self._handle, self.problem = None, f"NVML has no energy counter here: {error}"

    def joules(self) -> float | None:
        """Since the driver was loaded; None where nothing counts."""
        if self._handle is None:
            return None
        return 1e-3 * self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    def since(self, start: float | None) -> float | None:
        """What was taken since `start`, an earlier reading."""
        now = self.joules()
        return None if now is None or start is None else now - start

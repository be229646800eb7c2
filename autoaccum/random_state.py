"""Random generators, kept aside and put back."""

import random
import sys

import torch

__all__ = ["RandomState"]


class RandomState:
    """The random generators of torch (CPU and `device`), Python and, where it is loaded, numpy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy is not None and hasattr(numpy, "random") else None

    def restore(self) -> None:
        """Sets every generator back."""
        torch.set_rng_state(self._cpu)
        if self._accelerator is not None:
            torch.get_device_module(self._device).set_rng_state(self._accelerator, self._device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)

"""What belongs to the whole process, and so to the other members of a stack too."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple


class _Setting(NamedTuple):
    get: Callable[[], Any]
    put: Callable[[Any], Any]


_GENERATORS = ("torch's random generator", "Python's random generator", "numpy's random generator")


def _settings() -> Mapping[str, _Setting]:
    """By what it is called in a message."""
    import numpy
    import torch

    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    found = {
        "the default dtype": _Setting(torch.get_default_dtype, torch.set_default_dtype),
        "the default device": _Setting(torch.get_default_device, _put_default_device),
        "the number of threads": _Setting(torch.get_num_threads, torch.set_num_threads),
        "the grad mode": _Setting(torch.is_grad_enabled, torch.set_grad_enabled),
        "whether algorithms must be deterministic": _Setting(
            torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
        ),
        "the precision of matrix products": _Setting(
            torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
        ),
        "whether flash attention may be used": _Setting(cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        "whether memory-efficient attention may be used": _Setting(
            cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp
        ),
        "whether plain attention may be used": _Setting(cuda.math_sdp_enabled, cuda.enable_math_sdp),
        "whether cuDNN's attention may be used": _Setting(cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        "the current folder": _Setting(os.getcwd, os.chdir),
        _GENERATORS[0]: _Setting(lambda: torch.get_rng_state().tolist(), _put_torchs_generator),
        _GENERATORS[1]: _Setting(random.getstate, random.setstate),
        _GENERATORS[2]: _Setting(lambda: _listed(numpy.random.get_state()), numpy.random.set_state),
    }
    found |= {f"torch.backends.cudnn.{name}": _of(cudnn, name) for name in ("benchmark", "deterministic", "enabled")}
    found |= {f"autocast on {kind}": _autocast(kind) for kind in ("cpu", "cuda")}
    return found


def _of(holder: Any, name: str) -> _Setting:
    return _Setting(lambda: getattr(holder, name), lambda value: setattr(holder, name, value))


def _autocast(kind: str) -> _Setting:
    import torch

    return _Setting(lambda: torch.is_autocast_enabled(kind), lambda value: torch.set_autocast_enabled(kind, value))


def _listed(state: Any) -> Any:
    """numpy's state with a list for its array, so that two can be compared."""
    return (state[0], state[1].tolist(), *state[2:])


def _put_default_device(device: Any) -> None:
    import torch

    # None where it is the CPU: any other value makes each call of torch slower from then on.
    torch.set_default_device(None if device.type == "cpu" else device)


def _put_torchs_generator(state: list[int]) -> None:
    import torch

    torch.set_rng_state(torch.tensor(state, dtype=torch.uint8, device="cpu"))


# pytest writes the name of the test that runs, and torch.compile where it keeps what it compiled.
_NOBODYS = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_", "TRITON_")


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_NOBODYS)}


class GlobalState:
    """As it was when this was made."""

    def __init__(self) -> None:
        self._settings = _settings()
        self._values = {name: setting.get() for name, setting in self._settings.items()}
        self._environment = _variables()

    def changes(self, *, drawing: bool) -> list[str]:
        """What is different now, each in words.

        Args:
            drawing: whether random generators may have been drawn from.
        """
        found = []
        for name, setting in self._settings.items():
            before, now = self._values[name], setting.get()
            if before == now:
                continue
            if name not in _GENERATORS:
                found.append(f"{name} was {before} and is {now}")
            elif not drawing:
                found.append(f"{name} was drawn from or seeded")
        now = _variables()
        for name in sorted(self._environment.keys() | now.keys()):
            if self._environment.get(name) != now.get(name):
                found.append(f"the environment's {name} was {self._environment.get(name)!r} and is {now.get(name)!r}")
        return found

    def restore(self) -> None:
        for name, setting in self._settings.items():
            if setting.get() != self._values[name]:
                setting.put(self._values[name])
        for name in _variables().keys() - self._environment.keys():
            del os.environ[name]
        os.environ.update(self._environment)


@contextmanager
def restored() -> Iterator[GlobalState]:
    """Let what is done inside leave nothing behind, whatever it does."""
    state = GlobalState()
    try:
        yield state
    finally:
        state.restore()

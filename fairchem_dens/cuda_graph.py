"""A function of tensors, recorded once on a GPU and replayed: thousands of kernels for one launch.

A recorded function reads and writes fixed memory. So each shape of input has its own record, with tensors
that the input is copied into, and results that the next replay overwrites. The first calls of a shape run as
they are: what is made in a first call, such as an optimizer's moments, is then there before the recording.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Function = Callable[[Tensors, Tensors], Tensors]
Recorder = Callable[[Callable[[], Tensors]], tuple[Callable[[], None], Tensors]]
"""Records a call, which it may or may not carry out; returns what repeats it, and where its results are."""

CALLS_BEFORE_RECORDING = 3
MAX_RECORDS = 4


def signature(tensors: Tensors) -> tuple[Any, ...]:
    """Return names, shapes and types, by which two inputs can share a record."""
    return tuple((name, tuple(one.shape), one.dtype) for name, one in sorted(tensors.items()))


class CudaRecorder:
    """Records on a stream of its own, in one pool of memory for all records.

    Records that are replayed one after the other, never at the same time, may share the memory of what is
    between their inputs and results.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        """Record; nothing is computed before the first replay."""
        graph = torch.cuda.CUDAGraph()
        # The thread that pins the memory of coming batches may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
            results = call()
        return graph.replay, results

    def run(self, call: Callable[[], Tensors]) -> Tensors:
        """Run it as it is, on the stream that it is going to be recorded on."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = call()
        current.wait_stream(self.stream)
        return results


@dataclass
class _Shape:
    """What is kept of a shape of input."""

    inputs: dict[str, Tensor]
    numbers: dict[str, Tensor]
    calls: int = 0
    replay: Callable[[], None] | None = None
    results: Tensors = field(default_factory=dict)


class Recorded:
    """A function that is recorded for each shape of its input.

    Args:
        function: of named tensors and named numbers, which it gets as scalar tensors. It must not wait for
            the device, and must do the same in each call.
        device: of the tensors.
        recorder: `CudaRecorder`, or what stands in for it.
        run: runs a call as it is; None calls it.
    """

    def __init__(
        self,
        function: Function,
        device: torch.device,
        recorder: Recorder,
        run: Callable[[Callable[[], Tensors]], Tensors] | None = None,
    ) -> None:
        self._function, self._device, self._recorder = function, device, recorder
        self._run = run or (lambda call: call())
        self._shapes: dict[tuple[Any, ...], _Shape] = {}

    @classmethod
    def on_gpu(cls, function: Function, device: torch.device) -> Recorded:
        """Record with CUDA."""
        recorder = CudaRecorder(device)
        return cls(function, device, recorder, recorder.run)

    def __call__(self, tensors: Tensors, numbers: Mapping[str, float]) -> Tensors:
        """Call the function.

        Args:
            tensors: on any device; best in pinned memory.
            numbers: in double precision until they meet tensors.

        Returns:
            What the function returns. The next call overwrites it.
        """
        shape = self._shape_of(tensors, numbers)
        for name, one in tensors.items():
            shape.inputs[name].copy_(one, non_blocking=True)
        for name, number in numbers.items():
            shape.numbers[name].fill_(number)
        shape.calls += 1

        def call() -> Tensors:
            return self._function(shape.inputs, shape.numbers)

        if shape.replay is None:
            is_due = shape.calls > CALLS_BEFORE_RECORDING
            if not is_due or self.num_records >= MAX_RECORDS:
                return self._run(call)
            shape.replay, shape.results = self._recorder(call)
            sizes = ", ".join(f"{name} {tuple(one.shape)}" for name, one in tensors.items())
            logging.info(f"Recorded a step as a CUDA graph, for batches of {sizes}.")
        shape.replay()
        return shape.results

    @property
    def num_records(self) -> int:
        """How many shapes have been recorded."""
        return sum(shape.replay is not None for shape in self._shapes.values())

    def _shape_of(self, tensors: Tensors, numbers: Mapping[str, float]) -> _Shape:
        name = signature(tensors)
        if name not in self._shapes:
            self._shapes[name] = _Shape(
                {key: torch.empty_like(one, device=self._device) for key, one in tensors.items()},
                {key: torch.zeros((), device=self._device) for key in numbers},
            )
        return self._shapes[name]

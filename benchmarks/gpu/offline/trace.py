"""What the CUDA runner launches on a GPU, found without one.

`CudaRunner.run` goes through on meta tensors, a stand-in for Triton's driver answers for the target, and each
launch stops once its arguments are bound. So signature, constants, alignment and grid are those of a launch
on that GPU, and none is written by hand.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.gpu.model import Work, make_runner, published_config, segments
from benchmarks.gpu.offline.devices import Device
from replicas.answer_forms import JsonFormat
from replicas.engine.batch import ScheduledBatch, Segment
from replicas.engine.history import NO_TOKENS, Prefix
from replicas.kernels import attention, launch, normed_product
from replicas.messages import SamplingParams
from replicas.model.cuda import runner as runner_module
from replicas.model.cuda import sampling
from replicas.model.cuda.runner import CudaRunner, Options

META = torch.device("meta")
_SAMPLED = SamplingParams(max_tokens=1000, temperature=0.7, seed=5)
_GREEDY = SamplingParams(max_tokens=1000)
_RULED = replace(
    _SAMPLED,
    top_p=0.9,
    top_k=40,
    min_p=0.01,
    presence_penalty=0.5,
    repetition_penalty=1.1,
    logit_bias=((11, 2.0),),
    min_tokens=5,
    logprobs=5,
    response_format=JsonFormat("{}"),
)
"""With everything that a request can ask of the choice of its tokens."""
_WAITING_CALLS = frozenset(
    f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")
)
_LAUNCHING_CALLS = frozenset(
    f"aten::{name}" for name in ("mm", "addmm", "addmm_", "linear", "embedding", "index_select", "copy_")
) | {"c10d::allreduce_", "c10d::allgather_"}
"""What else a step launches: products, each by a kernel or two of the vendor's library, copies, and what
processes that share a model tell each other."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One specialization of a kernel that the JIT would compile."""

    function: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    options: dict[str, Any]
    attributes: Any
    step: str
    """The kind of step that launched it first."""

    @property
    def name(self) -> str:
        return str(self.function.__name__).lstrip("_")

    @property
    def label(self) -> str:
        """The name, and what of its constants tells it from the others."""
        constants = {self._name(key): value for key, value in self.constants.items()}
        parts = [self.name]
        if "BLOCK_M" in constants:
            parts.append(str(constants["BLOCK_M"]))
        # What it multiplies or stores: K/V, an adapter, or the weights of a product in rows of a block.
        kind = self.signature.get("cache") or self.signature.get("down") or self.signature.get("up")
        if kind is None and "BLOCK_INNER" in constants:
            kind = self.signature["weight"]
        if kind is not None:
            parts.append({"*fp8e4nv": "fp8", "*i8": "int8", "*fp32": "fp32"}.get(kind, "bf16"))
        codes = {"*fp8e4nv": "fp8", "*i8": "int8"}.get(self.signature.get("weight", ""))
        if codes is not None:
            parts.append("weights" if "cache" not in self.signature else f"{codes} weights")
        return " ".join(parts)

    @property
    def num_splits(self) -> int:
        """The number of parts of which it makes or merges one; 1 for kernels that know of none."""
        constants = {self._name(key): value for key, value in self.constants.items()}
        return int(constants.get("NUM_SPLITS", 1))

    @property
    def key(self) -> str:
        """Equal for variants whose code is alike: they differ in what Triton knows of their arguments'
        alignment, or in the number of parts where there are several."""
        constants = {self._name(key): str(value) for key, value in self.constants.items()}
        constants.pop("BLOCKS_PER_SPLIT", None)
        constants["NUM_SPLITS"] = str(self.num_splits > 1)
        parts = (constants, self.signature, self.options)
        return str((self.name, *(sorted(part.items()) for part in parts)))

    @property
    def num_unaligned(self) -> int:
        """Pointers of which Triton does not know that they are aligned to 16 bytes."""
        aligned = {
            self._name(key)
            for key, value in self.attributes.items()
            if any(attribute[0] == "tt.divisibility" for attribute in value)
        }
        return sum(kind.startswith("*") and name not in aligned for name, kind in self.signature.items())

    def _name(self, key: Any) -> str:
        return str(self.function.arg_names[key[0]] if isinstance(key, tuple) else key)


@dataclass
class Trace:
    """What was launched on one device."""

    variants: dict[str, Variant] = field(default_factory=dict)
    """By Triton's own key of the specialization."""
    launches: list[str] = field(default_factory=list)
    """The keys of the launches of the last step, in order, and the names of torch's own."""
    waits: list[str] = field(default_factory=list)
    """Where the host waited for the device between the queueing of steps."""
    step: str = ""


class _Driver:
    """Stands where Triton's CUDA driver would."""

    def __init__(self, device: Device):
        self._device = device

    def get_current_device(self) -> int:
        return self._device.num_sms  # JITFunction keeps what it bound by this number

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._device.target


class _Pointer:
    """What Triton asks of a tensor. The allocator aligns to 512 bytes, so an offset says it all."""

    def __init__(self, tensor: torch.Tensor):
        self.dtype = tensor.dtype
        self._address = (1 << 40) + tensor.storage_offset() * tensor.element_size()
        self._range = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return int(self._address)

    def ptr_range(self) -> int:
        return self._range


class _Fetch:
    """Stands where the copy to the host would. Tokens are one of a few at random, so that a draft's are
    accepted three times out of four; each has a probability of 0.95."""

    _random = random.Random(0)

    def __init__(self, tensor: torch.Tensor):
        self._shape = tensor.shape

    def wait(self) -> torch.Tensor:
        if len(self._shape) > 2:  # the most probable tokens
            return torch.ones(self._shape, dtype=torch.float64)
        num_rows = self._shape[1]
        tokens = [7.0 if self._random.random() < 0.86 else 8.0 for _ in range(num_rows)]
        return torch.tensor([tokens, [0.95] * num_rows, [20.0] * num_rows], dtype=torch.float64)


class _Recorder:
    """Stands where the recorder of CUDA graphs would: a captured step is traced once, and is free from then
    on."""

    def __init__(self, _: torch.device):
        pass

    def capture(self, compute: Callable[[], object]) -> Callable[[], object]:
        compute()
        return lambda: None


class _Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes copies that wait for the device's queue, and values that the host asks for."""

    def __init__(self, trace: Trace):
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = trace

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name
        if name in _WAITING_CALLS or (
            self._is_copy(name, args, kwargs) and not _is_non_blocking(args, kwargs)
        ):
            shape = tuple(args[-1].shape) if name == "aten::copy_" else tuple(args[0].shape)
            self._trace.waits.append(f"{self._trace.step}: {name} of {shape}")
        if name in _LAUNCHING_CALLS:
            self._trace.launches.append(name)
        return function(*args, **kwargs)

    @staticmethod
    def _is_copy(name: str, args: Any, kwargs: Any) -> bool:
        """True if it copies between host and device."""
        if name == "aten::copy_":
            return bool(args[0].device != args[1].device)
        if name in ("aten::to", "aten::_to_copy"):
            asked = [item for item in (*args[1:], *kwargs.values()) if isinstance(item, torch.device)]
            return bool(asked) and asked[0] != args[0].device
        return False


def _is_non_blocking(args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking")) or any(item is True for item in args[1:])


@contextmanager
def standing_in(device: Device, trace: Trace) -> Iterator[None]:
    """Launches are bound as for the device and recorded; nothing is compiled."""
    run = JITFunction.run
    launch_pdl = False

    def bind(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        nonlocal launch_pdl
        launch_pdl = kwargs.get("launch_pdl", False)
        given = [_Pointer(item) if isinstance(item, torch.Tensor) else item for item in args]
        run(function, *given, grid=grid, warmup=True, **kwargs)

    def hook(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        function = fn.jit_function
        key = f"{function.__name__} {key}"
        names = ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")
        options = {name: compile[name] for name in names if name in compile}
        if launch_pdl:  # which Triton does not tell the hook
            options["launch_pdl"] = True
        found = Variant(
            function,
            compile["signature"],
            compile["constants"],
            options,
            compile["configs"][0],
            trace.step,
        )
        trace.variants.setdefault(key, found)
        trace.launches.append(key)
        return True  # as if compiled already: JITFunction stops here

    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", bind))
        for module in (attention, launch, normed_product):
            stack.enter_context(patch.object(module, "num_sms", lambda _: device.num_sms))
        stack.enter_context(
            patch.object(attention, "block_shared_bytes", lambda _: device.block_shared_bytes)
        )
        stack.enter_context(
            patch.object(launch, "has_dependent_launch", lambda _: device.has_dependent_launch)
        )
        stack.enter_context(patch.object(sampling, "Fetch", _Fetch))
        stack.enter_context(patch.object(runner_module, "GraphRecorder", _Recorder))
        stack.callback(setattr, triton.knobs.runtime, "jit_cache_hook", None)
        triton.knobs.runtime.jit_cache_hook = hook
        driver.set_active(_Driver(device))
        yield


def _asked(work: Work, kind: str, count: int, length: int, sampling_params: SamplingParams) -> list[Segment]:
    """Segments of one kind: 'causal' (a step, or a verify), 'draft', 'denoise', 'prefill'."""
    pages = tuple(range(-(-(work.num_cached + 3 * length) // work.page_size)))  # enough for what follows
    seen = Prefix.of(range(1000, 1000 + work.num_cached)) if sampling_params.has_penalties else NO_TOKENS
    vocab_size = published_config(work.name).vocab_size
    allowed = (b"\xff" * (vocab_size // 8),) * length if sampling_params.needs_grammar else ()
    made = [
        replace(segment, sampling=sampling_params, pages=pages, history=seen, allowed=allowed)
        for segment in segments(work, count, length, draft=kind in ("draft", "denoise"))
    ]
    if kind == "denoise":
        return [replace(segment, adapter=False) for segment in made]
    if kind == "prefill":
        return [replace(segment, wanted=(length - 1,)) for segment in made]
    return made


STEPS = {
    "ar 1": ("causal", 1, 1, _GREEDY),
    "ar 8": ("causal", 8, 1, _GREEDY),
    "ar 24": ("causal", 24, 1, _GREEDY),
    "ar 33": ("causal", 33, 1, _GREEDY),
    "ar 64": ("causal", 64, 1, _GREEDY),
    "ar 64 sampled": ("causal", 64, 1, _SAMPLED),
    "ar 64 ruled": ("causal", 64, 1, _RULED),
    "verify 4x16 ruled": ("causal", 4, 16, _RULED),
    "draft 1x32": ("draft", 1, 32, _GREEDY),
    "verify 1x32": ("causal", 1, 32, _GREEDY),
    "verify 8x16": ("causal", 8, 16, _GREEDY),
    "draft 16x8": ("draft", 16, 8, _GREEDY),
    "denoise 4x32": ("denoise", 4, 32, _GREEDY),
    "prefill 2048": ("prefill", 1, 2048, _GREEDY),
}
"""Kinds of step: of segments, how many of them, how long, and what is asked of their tokens."""


def trace_steps(device: Device, trace: Trace, work: Work) -> None:
    """Runs every kind of step, and steps that are begun ahead."""
    with standing_in(device, trace):
        runner = make_runner(work, META, Options())
        for name in STEPS:
            _run(runner, trace, work, name)
        trace.step, trace.launches = f"{work.name}, begun ahead", []
        with _Waits(trace):
            runner.warm_up_following()


def trace_step(device: Device, trace: Trace, work: Work, name: str) -> None:
    """Runs one kind of step."""
    with standing_in(device, trace):
        _run(make_runner(work, META, Options()), trace, work, name)


def _run(runner: CudaRunner, trace: Trace, work: Work, name: str) -> None:
    trace.step, trace.launches = f"{work.name}, {name}", []
    batch = ScheduledBatch(tuple(_asked(work, *STEPS[name])))
    with _Waits(trace):
        runner.run(batch)

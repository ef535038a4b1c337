"""A CUDA device that is not there: tensors that say "cuda:0", with their numbers in main memory.

What is asked of "cuda" becomes a `DeviceTensor`, which goes through PyTorch's own dispatch, autocast and recording of
gradients for CUDA, and computes on the CPU in the end. It refuses what CUDA refuses: operands of two devices (but for
numbers and indices), `.numpy()`, a generator of the other device. Kernels, and with them speed, precision, order of
sums, memory and limits of size, are not CUDA's.
"""

import ctypes
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch._dynamo  # which looks at the functions that `simulated_cuda` replaces
from torch import Tensor
from torch.autograd import graph
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
LIBRARY = Path(torch.__file__).parent / "lib" / "libc10.so"
POSSIBLE = torch.__version__.startswith("2.13.") and torch.version.cuda is None and LIBRARY.is_file()
"""Whether a device can be simulated: on Linux, by the CPU build of a PyTorch whose inner parts are known here."""

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
PRODUCTS = {aten.mm.default, aten.mm.out, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.mv.default}


class DeviceTensor(Tensor):
    """A tensor that lies on "cuda:0", as far as anybody can tell."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "DeviceTensor":
        assert type(held) is Tensor
        assert held.device.type == "cpu"
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CUDA
        )
        made.held = held
        return made

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, DeviceTensor)
        self.held = value.held

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor.__getitem__(self, _as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        Tensor.__setitem__(self, _as_tensors(index), value)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    def __repr__(self) -> str:
        return f"DeviceTensor({self.held})"

    # With these two, a module's parameters are swapped for those on the device, not overwritten by them.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> "DeviceTensor":
        return DeviceTensor(inner["held"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = DeviceTensor(self.held.clone())
        memo[id(self)] = copied = torch.nn.Parameter(copied) if isinstance(self, torch.nn.Parameter) else copied
        return copied.requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


def _as_tensors(index: Any) -> Any:
    """Turn lists and arrays in an index into tensors, as PyTorch does unseen."""
    if isinstance(index, tuple):
        return tuple(_as_tensors(part) for part in index)
    return torch.as_tensor(index) if isinstance(index, list | np.ndarray) else index


class SimulatedCuda(TorchDispatchMode):
    """Sends what is made on "cuda", or moved to it, to the simulated device, and counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += any(isinstance(x, DeviceTensor) for x in tree_leaves((args, kwargs)))
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    leaves = tree_leaves((args, kwargs))
    here = [x for x in leaves if isinstance(x, DeviceTensor)]
    wanted = kwargs.get("device")
    if wanted is None and not here:
        return func(*args, **kwargs)
    on_cpu = wanted is not None and torch.device(wanted).type == "cpu"
    generator = kwargs.get("generator")
    if generator is not None and not on_cpu:
        raise RuntimeError(f"{func}: expected a 'cuda' generator, found '{generator.device.type}'")
    if here:
        _refuse(func, args, [x for x in leaves if isinstance(x, Tensor)])
    own_args, own = tree_map(lambda x: x.held if isinstance(x, DeviceTensor) else x, (args, kwargs))
    if func is aten._conj.default:  # marks a tensor, which what lies below Python does not heed
        return DeviceTensor(torch.complex(torch.real(own_args[0]), -torch.imag(own_args[0])))
    own |= {} if wanted is None else {"device": torch.device("cpu")}
    out = func(*own_args, **own)
    # What was changed in place stays the tensor that it was.
    known = {id(x.held): x for x in here} | {id(x): x for x in leaves if isinstance(x, Tensor)}
    if on_cpu:
        return out
    return tree_map(lambda x: known[id(x)] if id(x) in known else DeviceTensor(x) if isinstance(x, Tensor) else x, out)


def _refuse(func: Any, args: Any, given: Sequence[Tensor]) -> None:
    """Refuse what CUDA refuses of operands, some of which are on it."""
    if func in PRODUCTS and not (given[0].is_floating_point() or given[0].is_complex()):
        raise RuntimeError(f"{func} has no CUDA kernel for {given[0].dtype}")
    if func in COPIES:
        return
    if func in INDEXING:
        if not isinstance(args[0], DeviceTensor):
            raise RuntimeError(f"{func}: indices on cuda:0 of a tensor on the CPU")
        given = [x for x in (args[0], *args[2:]) if isinstance(x, Tensor)]
    elsewhere = [x for x in given if not isinstance(x, DeviceTensor)]
    in_place = func._schema.name.endswith("_") and bool(elsewhere) and elsewhere[0] is given[0]
    if in_place or any(x.ndim for x in elsewhere):
        raise RuntimeError(f"{func}: expected all tensors on one device, found cuda:0 and cpu")


def _guard() -> Any:
    class Guard(torch._C._acc.DeviceGuard):
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.CUDA

    return Guard()


_GUARD = _guard() if POSSIBLE else None
"""Kept for as long as libc10's table may point to it."""


@contextmanager
def _known_to_autograd() -> Iterator[None]:
    """Fill the place of CUDA in libc10's table of devices, which a CPU build leaves empty, with a guard from Python."""
    table = (ctypes.c_void_p * 32).in_dll(ctypes.CDLL(str(LIBRARY)), "_ZN3c104impl26device_guard_impl_registryE")
    python, cuda = (int(getattr(torch._C._autograd.DeviceType, name)) for name in ("PrivateUse1", "CUDA"))
    torch._C._acc.register_python_privateuseone_device_guard(_GUARD)
    table[cuda], table[python] = table[python], None
    try:
        yield
    finally:
        table[cuda] = None


def _run_backward(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[Tensor] = (),
    allow_unreachable: bool = True,
    accumulate_grad: bool = True,
) -> tuple[Tensor | None, ...]:
    """Walk the graph that autograd recorded as its engine would, which wants streams of a real device."""
    edges, wanted = ([graph.get_gradient_edge(x) for x in some] for some in (outputs, inputs))
    targets = {(edge.node, edge.output_nr) for edge in wanted}
    waiting: Counter[Any] = Counter()
    seen = {edge.node for edge in edges}
    stack = list(seen)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    sums: dict[tuple[Any, int], Tensor] = {}
    found: dict[tuple[Any, int], Tensor] = {}

    def add(node: Any, i: int, grad: Tensor) -> None:
        about = node._input_metadata[i]
        grad = grad.sum_to_size(about.shape).to(about.dtype)
        sums[node, i] = sums[node, i] + grad if (node, i) in sums else grad

    with torch.set_grad_enabled(create_graph):
        for edge, out, grad in zip(edges, outputs, grads, strict=True):
            add(edge.node, edge.output_nr, torch.ones_like(out) if grad is None else grad)
        ready = [node for node in seen if not waiting[node]]
        while ready:
            node = ready.pop()
            given = [sums.pop((node, i), None) for i in range(len(node._input_metadata))]
            found |= {(node, i): g for i, g in enumerate(given) if g is not None and (node, i) in targets}
            left_out = hasattr(node, "variable") and (
                not accumulate_grad or (bool(targets) and (node, 0) not in targets)
            )
            made: Any = ()
            if not left_out and any(grad is not None for grad in given):
                made = (node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node)(*given)
            made = made if isinstance(made, tuple) else (made,)
            for (after, i), grad in itertools.zip_longest(node.next_functions, made[: len(node.next_functions)]):
                if after is not None:
                    if grad is not None:
                        add(after, i, grad)
                    waiting[after] -= 1
                    ready += [after] if not waiting[after] else []
    return () if accumulate_grad else tuple(found.get((edge.node, edge.output_nr)) for edge in wanted)


def _moved_after(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make a tensor of Python's numbers on the CPU and move it, which PyTorch does unseen."""

    def made(data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        out = data if isinstance(data, DeviceTensor) else make(data, dtype=dtype)
        return out.to(device=device or out.device, dtype=dtype or out.dtype).requires_grad_(requires_grad)

    return made


@contextmanager
def simulated_cuda() -> Iterator[SimulatedCuda]:
    """Have one GPU, "cuda:0", while it lasts."""
    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=80_000_000_000),
        "stream": lambda *_: nullcontext(),
    }
    silent = ("_lazy_init", "set_device", "synchronize", "manual_seed_all", "current_stream", "Stream")
    modes = {"__enter__": torch.no_grad.__enter__, "__exit__": torch.no_grad.__exit__}
    compatible = torch._has_compatible_shallow_copy_type

    def alike(a: Tensor, b: Tensor) -> bool:
        return isinstance(a, DeviceTensor) == isinstance(b, DeviceTensor) and compatible(a, b)

    makers = {name: _moved_after(getattr(torch, name)) for name in ("tensor", "as_tensor")}
    with (
        _known_to_autograd(),
        mock.patch.multiple(torch.cuda, **functions, **{name: mock.MagicMock() for name in silent}),
        mock.patch.multiple(torch, **makers),
        # Parameters that move back become others: these cannot be overwritten by tensors on the CPU.
        mock.patch.object(torch, "_has_compatible_shallow_copy_type", alike),
        mock.patch("torch.autograd._engine_run_backward", _run_backward),
        # Inference tensors have no versions, which those of a subclass cannot do without.
        mock.patch.multiple(torch.inference_mode, **modes),
        SimulatedCuda() as device,
    ):
        yield device

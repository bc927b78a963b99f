"""Every operation of torch on its way: CPU tensors stay real, those on a card are fake and are counted.

A fake tensor has shape, number format, strides and device, but no numbers. So control flow that asks a card
for a number gets a finite one, or True for a truth value; a copy to the host is zeros and one number that
changes when the card's memory is written to, so that "did it change" has an answer. What torch's CUDA kernels
would refuse (tensors on different devices, a CPU generator, an optimizer's step counter on the CPU) is
refused in the same words, because the CPU's kernels and torch's fake ones do not all refuse it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from .device import Cards
from .ledger import Copy

# no kernel, though their schema does not say that the result is a view
_NO_KERNEL = {
    *("_unsafe_view", "detach", "lift", "lift_fresh", "alias", "set_", "resize_", "record_stream"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
}
# kernels of one operation, where it is not one (cuDNN's and PyTorch's own, counted with a profiler)
_KERNELS = {
    "convolution": 2,
    "native_group_norm": 3,
    "native_group_norm_backward": 4,
    "native_layer_norm_backward": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 3,
}
# tensors of one multi-tensor kernel, by the number of lists (ATen/native/cuda/MultiTensorApply.cuh)
_TENSORS_A_KERNEL = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
_ASKS_HOW_MANY = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
_FUSED = {"_fused_adamw_": 5, "_fused_adam_": 5}  # where the list of step counters stands

# torch's fake tensors ask which kernel the device has; without one these two are unfolded into others
_library = torch.library.Library("aten", "IMPL")


def is_on_card(value: object) -> bool:
    """Tell whether something is a tensor on a pretended card."""
    return isinstance(value, FakeTensor) and value.fake_device.type == "cuda"


class ThreadedFakeMode(FakeTensorMode):
    """Fake tensors that several threads use: whether a kernel runs is each thread's own matter.

    While one runs, torch has its tensors say that they are on the meta device; another thread that asked
    where a tensor is in that moment would believe it.
    """

    _threads = threading.local()

    @property
    def in_kernel_invocation(self) -> bool:  # type: ignore[override]
        """Whether this thread runs a kernel."""
        return getattr(self._threads, "running", False)

    @in_kernel_invocation.setter
    def in_kernel_invocation(self, running: bool) -> None:
        self._threads.running = running


class Pretending(TorchDispatchMode):
    """Within it, in this thread, "cuda" is the pretended cards; see :func:`install`."""

    def __init__(self, cards: Cards, fake: FakeTensorMode, pinned: WeakIdKeyDictionary) -> None:
        super().__init__()
        self._cards, self._ledger, self._fake, self._pinned = cards, cards.ledger, fake, pinned

    def again(self) -> Pretending:
        """Return another of the same pretence, for another thread."""
        return Pretending(self._cards, self._fake, self._pinned)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        _gather(args, tensors)
        _gather(kwargs.values(), tensors)
        name = func._schema.name.partition("::")[2]
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args, **kwargs)
        asked = kwargs.get("device")
        to_card = asked is not None and torch.device(asked).type == "cuda"
        if not to_card and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return self._on_host(func, name, args, kwargs)
        with self._cards.lock:
            return self._on_card(func, name, args, kwargs, tensors, to_card)

    def _on_host(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "_pin_memory":
            copy = args[0].clone()
            self._pinned[copy.untyped_storage()] = True
            return copy
        if kwargs.get("pin_memory"):  # page-locked from the start
            there = func(*args, **{**kwargs, "pin_memory": False})
            self._pinned[there.untyped_storage()] = True
            return there
        if name == "is_pinned":
            return args[0].untyped_storage() in self._pinned
        if name == "_to_copy" and args[0].numel() > 1 << 20 and not any(args[0].stride()):
            # weights of a true base, all one zero: memory that nobody writes to costs none
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)

    def _on_card(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[Tensor],
        to_card: bool,
    ) -> Any:
        cuda = [tensor for tensor in tensors if is_on_card(tensor)]
        self._refuse(name, args, kwargs, bool(cuda) or to_card)
        answer = self._answered(name, args, kwargs, bool(cuda), to_card)
        if answer is not None:
            return answer[0]
        if name in _INDEXING and cuda:
            self._note_indices(args)
        if name in _FUSED and isinstance(kwargs.get("lr"), Tensor):  # fake tensors know the other form only
            func, kwargs = func.overloadpacket.default, {**kwargs, "lr": 1.0}
        with self._fake:
            if not all(isinstance(tensor, FakeTensor) for tensor in tensors):
                args, kwargs = tree_map(_as_fake, args), tree_map(_as_fake, kwargs)
            out = func(*args, **kwargs)
        results: list[Any] = []
        _gather((out,), results)
        results = [result for result in results if is_on_card(result)]
        source = {"copy_": 1, "_to_copy": 0}.get(name)
        crossing = source is not None and not is_on_card(tensors[source])  # a transfer is not a kernel
        if (results or cuda) and not crossing and not _is_view(func, name):
            sizes = {
                id(tensor.untyped_storage()): tensor.numel() * tensor.element_size()
                for tensor in (*cuda, *results)
            }
            self._ledger.launch(name, _kernels(name, args, kwargs), sum(sizes.values()))
        written: list[Tensor] = []
        _gather((args[place] for place in _written(func) if place < len(args)), written)
        for tensor in written:
            self._ledger.write(tensor.untyped_storage())
        for result in results:
            self._cards.allocate(result.fake_device.index or 0, result.untyped_storage())
        return out

    def _answered(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], on_card: bool, to_card: bool
    ) -> tuple[Any] | None:
        """Return (result,) of what is not a kernel but a question or a copy to the host."""
        if not on_card:
            if name == "_to_copy" and to_card:
                self._copy("to card", args[0], kwargs.get("dtype") or args[0].dtype, kwargs)
            elif name == "copy_" and is_on_card(args[0]):
                self._copy("to card", args[1], args[0].dtype, kwargs, *args[2:3])
            return None
        first = args[0]
        if name in ("_local_scalar_dense", "item"):
            self._ledger.wait("item")
            return (_number(first.dtype, 0),)
        if name in ("equal", "is_nonzero", "allclose"):
            self._ledger.wait(name)
            return (True,)
        if name in _ASKS_HOW_MANY:
            self._ledger.wait(name)
        device = kwargs.get("device")
        if name == "_to_copy" and device is not None and is_on_card(first):
            dtype = kwargs.get("dtype") or first.dtype
            if torch.device(device).type == "cpu":
                self._copy("to host", first, dtype, kwargs)
                return (self._numbers(first, torch.zeros(first.shape, dtype=dtype)),)
            if self._cards.index_of(device) != first.fake_device.index:
                self._copy("between cards", first, dtype, kwargs)
        if name == "copy_":
            return self._copied_into(args, kwargs)
        return None

    def _numbers(self, source: Tensor, host: Tensor) -> Tensor:
        """Give zeros on the host what a copy from the card could hold: it differs once that was written to.

        One number is enough for that; memory of the others is not touched, however large the tensor.
        """
        if host.dtype == torch.bool:
            return host.fill_(True)
        if host.numel():
            writes = self._ledger.writes(source.untyped_storage())
            host[(0,) * host.ndim] = _number(host.dtype, writes)
        return host

    def _copied_into(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
        target, source, *rest = args
        if not is_on_card(target):
            self._copy("to host", source, target.dtype, kwargs, *rest, host=target)
            return (self._numbers(source, target.fill_(0)),)
        if not is_on_card(source):
            self._copy("to card", source, target.dtype, kwargs, *rest)
        elif source.fake_device != target.fake_device:
            self._copy("between cards", source, target.dtype, kwargs, *rest)
        return None

    def _copy(
        self,
        way: str,
        source: Tensor,
        dtype: torch.dtype,
        kwargs: dict[str, Any],
        background: bool = False,
        host: Tensor | None = None,
    ) -> None:
        background = background or bool(kwargs.get("non_blocking"))
        there = source if host is None else host
        pinned = not is_on_card(there) and there.untyped_storage() in self._pinned
        # into pageable memory even a copy in the background is waited for; single numbers go with the launch
        waits = way != "between cards" and not (background and (pinned or way == "to card"))
        self._ledger.copy(Copy(way, pinned, waits), source.numel() * dtype.itemsize)

    def _refuse(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], on_card: bool) -> None:
        generator = kwargs.get("generator")
        if on_card and generator is not None and generator.device.type != "cuda":
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' (in {name})")
        if name in _INDEXING and not is_on_card(args[0]) and any(is_on_card(index) for index in args[1]):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        if name in _FUSED and not all(is_on_card(step) for step in args[_FUSED[name]]):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                f"cpu! (when checking argument for argument state_steps in method wrapper_CUDA__{name})"
            )

    def _note_indices(self, args: tuple[Any, ...]) -> None:
        for index in args[1]:
            if index is None:
                continue
            if not is_on_card(index):
                self._copy("to card", index, index.dtype, {})
            if index.dtype == torch.bool:
                self._ledger.wait("index by truth values")


def install(cards: Cards) -> Pretending:
    """Prepare this process, and return the mode to run the program in.

    To be called once, before sdlora is imported; threads that are started within the mode are in it, too.
    """
    torch._C._set_only_lift_cpu_tensors(True)
    for name in ("silu_backward", "mish_backward"):
        _library.impl(name, _never, "CUDA")
    cards.install()
    nn.Module._apply = _apply  # type: ignore[method-assign]
    Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]
    functional.scaled_dot_product_attention = _attention(functional.scaled_dot_product_attention)
    mode = Pretending(cards, ThreadedFakeMode(allow_non_fake_inputs=True), WeakIdKeyDictionary())
    threading.Thread.start = _start_within(mode, threading.Thread.start)  # type: ignore[method-assign]
    return mode


def _gather(values: Iterable[Any], into: list[Tensor]) -> None:
    """Add the tensors among an operation's arguments or results; torch's own walk takes ten times as long."""
    for value in values:
        if isinstance(value, Tensor):
            into.append(value)
        elif isinstance(value, list | tuple):
            _gather(value, into)


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("fake tensors compute nothing")


def _as_fake(value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return value


def _number(dtype: torch.dtype, writes: int) -> bool | float | int:
    """Return what a card answers for a number: a finite one that is not 0, True, or 0 of whole numbers."""
    if dtype == torch.bool:
        return True
    return 1.0 / (1 + writes % 1000) if dtype.is_floating_point else 0


@functools.lru_cache(maxsize=2000)
def _written(func: Any) -> tuple[int, ...]:
    """Return the places of the arguments that an operation writes to."""
    arguments = func._schema.arguments
    infos = [(place, argument.alias_info) for place, argument in enumerate(arguments)]
    return tuple(place for place, info in infos if info is not None and info.is_write)


def _is_view(func: Any, name: str) -> bool:
    infos = [result.alias_info for result in func._schema.returns]
    return name in _NO_KERNEL or any(info is not None and not info.is_write for info in infos)


def _kernels(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    if not name.startswith(("_foreach", "_fused")):
        return _KERNELS.get(name, 1)
    values = (*args, *kwargs.values())
    lists = [
        group
        for group in values
        if isinstance(group, list | tuple) and group and isinstance(group[0], Tensor)
    ]
    return -(-len(lists[0]) // _TENSORS_A_KERNEL.get(len(lists), 30)) if lists else 1


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do what ``nn.Module._apply`` does: tensors are changed in place, or replaced from real to fake."""
    if recurse:
        for child in module.children():
            child._apply(change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            _change(module, name, parameter, change)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module


def _change(
    module: nn.Module, name: str, parameter: nn.Parameter, change: Callable[[Tensor], Tensor]
) -> None:
    with torch.no_grad():
        changed = change(parameter)
        if changed is parameter:
            return
        alike = isinstance(changed, FakeTensor) == isinstance(parameter, FakeTensor)
        if alike and torch._has_compatible_shallow_copy_type(parameter, changed):
            parameter.data = changed
            if parameter.grad is not None:
                parameter.grad.data = change(parameter.grad)
            return
        new = nn.Parameter(changed, requires_grad=parameter.requires_grad)
        if parameter.grad is not None:
            new.grad = change(parameter.grad)
        module._parameters[name] = new


def _attention(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return torch's fused attention with the choice that its CUDA build makes: flash, else efficient."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not is_on_card(query):
            options = {"scale": scale, "enable_gqa": enable_gqa}
            return original(query, key, value, attn_mask, dropout_p, is_causal, **options)
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = (projected.to(dtype) for projected in (query, key, value))
        if not query.dtype == key.dtype == value.dtype:
            formats = f"query.dtype: {query.dtype} key.dtype: {key.dtype} and value.dtype: {value.dtype}"
            raise RuntimeError(f"Expected query, key, and value to have the same dtype, but got {formats}")
        half = query.dtype in (torch.bfloat16, torch.float16)
        if attn_mask is None and half and query.shape[-1] <= 256:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]  # type: ignore[no-any-return]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        learning = torch.is_grad_enabled() and any(
            projected.requires_grad for projected in (query, key, value)
        )
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, learning, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]

    return attention


def _start_within(
    mode: Pretending, original: Callable[[threading.Thread], None]
) -> Callable[[threading.Thread], None]:
    def start(thread: threading.Thread) -> None:
        run = thread.run

        def run_within() -> None:
            with mode.again():
                run()

        thread.run = run_within  # type: ignore[method-assign]
        original(thread)

    return start

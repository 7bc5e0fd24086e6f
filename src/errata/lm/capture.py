"""Look at what goes through a module, or add to it: context managers that leave the model as they found it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from errata.lm.errors import ModelError


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`. Raises ModelError where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(f"{type(model).__name__} has no module {path!r} ({error}); see lm.anatomy for the paths it has") from error


def first(value: Any) -> Tensor:
    """The tensor in a module's output: itself, or the first of a tuple."""
    tensor: Tensor = value[0] if isinstance(value, tuple) else value
    return tensor


def with_first(value: Any, tensor: Tensor) -> Any:
    """`value` with its first tensor replaced."""
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


@contextmanager
def capture(model: nn.Module, modules: Mapping[str, str], inputs: bool = False) -> Iterator[dict[str, Tensor]]:
    """Record the output (or the first input) of modules while the model runs.

    modules: name -> module path. The dictionary that is yielded holds name -> tensor [B, T, width] after each forward pass, the
    latest one; it keeps the graph, so run under `torch.no_grad()` for plain values. A module that is fed [B·T, width] (OPT's MLP)
    is given back its [B, T, width] shape if the model itself is what runs.
    Raises ModelError for an unknown path.
    """
    seen: dict[str, Tensor] = {}
    shape: list[torch.Size] = []

    def remember_shape(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
        shape[:] = [ids.shape[:2]] if isinstance(ids, Tensor) else []

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensor = (args[0] if args else kwargs["hidden_states"]) if inputs else first(output)
            if tensor.ndim == 2 and shape and tensor.shape[0] == shape[0].numel():
                tensor = tensor.unflatten(0, shape[0])  # [B·T, w] -> [B, T, w]
            seen[name] = tensor.clone()  # Falcon, for one, goes on to add to it in place

        return hook

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(remember_shape, with_kwargs=True).remove)
        for name, path in modules.items():
            stack.callback(submodule(model, path).register_forward_hook(keep(name), with_kwargs=True).remove)
        yield seen


@contextmanager
def add_to_output(module: nn.Module, delta: Tensor | Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Add to a module's output while the model runs: output + delta, differentiably.

    delta: a tensor, or a function of the output that gives one. One of as many elements as the output is reshaped to it (so
    [B, T, d] fits OPT's flattened [B·T, d]), any other must broadcast. Of a tuple the first element is changed.
    """

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        plain = first(output)
        change = (delta if isinstance(delta, Tensor) else delta(plain)).to(plain.device, plain.dtype)
        return with_first(output, plain + (change.reshape(plain.shape) if change.numel() == plain.numel() else change))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def add_from_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Add to a module's output what `change` makes of its input, while the model runs: output + change(input), differentiably.

    change: [.., in] -> as many elements as the output has, which it is reshaped to. Of a tuple the first element is changed.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        plain = first(output)
        made = change(args[0] if args else kwargs["hidden_states"])
        return with_first(output, plain + made.to(plain.device, plain.dtype).reshape(plain.shape))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()

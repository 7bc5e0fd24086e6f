"""Run the end of a model only at the places that are asked for: behind the last attention no token looks at another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from errata.lm.capture import submodule

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel


@contextmanager
def only_at(lm: LanguageModel, rows: Tensor, columns: Tensor, spare: bool = False) -> Iterator[None]:
    """While it lasts, the head runs at these places [N] of the B texts alone: its output is [1, N, V].

    spare: so does the last layer's MLP, and gives zeros elsewhere. Not one that is no module of its own, nor where a hook looks at what
        the last layer does, or adds to it.
    """

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_picked(args[0], rows, columns), *args[1:])

    with ExitStack() as stack:
        stack.callback(submodule(lm.model, lm.anatomy.head).register_forward_pre_hook(pick).remove)
        if spare and (mlp := _last_mlp(lm)) is not None:
            stack.enter_context(_apart(mlp, rows, columns))
        yield


@contextmanager
def _apart(mlp: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    # Each place once: FT-L asks several times of the same, and what is put there twice has its gradient twice.
    rows, columns = torch.stack([rows, columns]).unique(dim=1)
    shape: list[torch.Size] = []

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shape[:] = [args[0].shape]
        return (_picked(args[0], rows, columns),)

    def scatter(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.new_zeros(shape[0]).index_put((rows.to(output.device), columns.to(output.device)), output[0])

    with ExitStack() as stack:
        stack.callback(mlp.register_forward_pre_hook(gather).remove)
        stack.callback(mlp.register_forward_hook(scatter).remove)
        yield


def _picked(hidden: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, T, d] -> [1, N, d]."""
    return hidden[rows.to(hidden.device), columns.to(hidden.device)][None]


def _last_mlp(lm: LanguageModel) -> nn.Module | None:
    """The last layer's MLP, if it can be run at some tokens alone without anyone noticing."""
    layer, down = lm.anatomy.layers[-1], lm.anatomy.mlp_down[-1]
    path = down.rpartition(".")[0]
    if path.rpartition(".")[0] != layer:  # OPT's is the layer itself
        return None
    mlp, norm = submodule(lm.model, path), lm.anatomy.final_norm
    if _hooked(submodule(lm.model, layer).modules()) or _hooked(mlp.modules(), before=True):
        return None
    if norm and _hooked([submodule(lm.model, norm)], before=True):
        return None
    known: dict[str, bool] = vars(lm.model).setdefault("errata_token_by_token", {})
    if path not in known:
        known[path] = _token_by_token(lm, mlp, submodule(lm.model, down))
    return mlp if known[path] else None


@torch.no_grad()
def _token_by_token(lm: LanguageModel, mlp: nn.Module, down: nn.Module) -> bool:
    """Whether a module makes [B, T, d] of [B, T, d] token by token: tried out on three tokens."""
    weight: Tensor = down.weight  # type: ignore[assignment]
    tokens = torch.arange(3 * lm.anatomy.hidden_size, device=weight.device).sin().view(1, 3, -1).to(lm.dtype)
    try:
        together, alone = mlp(tokens), torch.cat([mlp(token) for token in tokens.split(1, dim=1)], 1)
    except Exception:  # one that needs more than the hidden states (BLOOM's adds the residual)
        return False
    rounding = torch.finfo(lm.dtype).eps ** 0.5
    return isinstance(together, Tensor) and together.shape == tokens.shape and bool((together - alone).norm() <= rounding * alone.norm())


def _hooked(modules: Iterable[nn.Module], before: bool = False) -> bool:
    """Whether someone looks at, or changes, what comes out of one of them; before: or goes in.

    Hooks of transformers stay where they once were needed; nobody reads what they collect of a call that only the head is asked of.
    """
    hooks = (hook for one in modules for hook in (*one._forward_hooks.values(), *(one._forward_pre_hooks.values() if before else ())))
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)

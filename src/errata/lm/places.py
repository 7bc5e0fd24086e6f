"""Run parts of a model at some of the tokens alone: what makes something of every token by itself need not run where nobody asks, nor
twice for the same.

The head, and behind the last attention the last MLP, are asked of where a target is predicted. And a token's states are made of the
tokens before it and of nothing else, so texts that begin alike can share the work of an MLP.

Which MLPs can be run so is tried out. Where a hook looks at what happens, or changes it, they run everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from errata.lm.capture import submodule

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel


@contextmanager
def only_at(lm: LanguageModel, rows: Tensor, columns: Tensor, width: int, spare: bool = False) -> Iterator[None]:
    """While it lasts, the head runs at these places [N] of the texts [B, `width`] alone: its output is [1, N, V].

    spare: so does the last layer's MLP, which gives zeros elsewhere; not where a hook could see that, nor in half precision, where it
        changes more than the last digits.
    """
    last = len(lm.anatomy.layers) - 1
    mlp = _mlp(lm, last) if spare and lm.is_wide and not _end_is_watched(lm) else None

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]  # [B, T, d]
        return (hidden[rows.to(hidden.device), columns.to(hidden.device)][None], *args[1:])

    with ExitStack() as stack:
        stack.callback(submodule(lm.model, lm.anatomy.head).register_forward_pre_hook(pick).remove)
        if mlp is not None:
            # Each place once: FT-L asks several times of the same, and what is put there twice has its gradient twice.
            stack.enter_context(_apart(mlp, (rows * width + columns).unique()))
        yield


@contextmanager
def once(lm: LanguageModel, ids: Tensor, mask: Tensor, layers: int) -> Iterator[None]:
    """While these texts run, the MLPs of the first `layers` layers, but for the model's last, take what texts have in common once.

    Up to the first layer in which there is a hook: it may treat one text in another way than the next.

    ids, mask [B, T]: the texts, padded on the right; what stands at padding becomes meaningless. They must run from their first token on,
    all with the same weights in these layers and below.
    """
    mlps: list[nn.Module] = []
    below = [lm.model.get_input_embeddings()]
    for layer in range(min(layers, len(lm.anatomy.layers) - 1)):
        below = [*below, *submodule(lm.model, lm.anatomy.layers[layer]).modules()]
        if any(_hooks(module, before=True) for module in below):
            break
        mlps += [mlp] if (mlp := _mlp(lm, layer)) is not None else []
        below = []
    with ExitStack() as stack:
        if mlps:
            places, source = _distinct(ids, mask)
            for mlp in mlps if len(places) < len(source) else ():
                stack.enter_context(_apart(mlp, places, source))
        yield


def _distinct(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(places [U]: where each beginning of a text stands first; source [B·T]: the number of the one that ends at a token).

    Places are counted through all texts.
    """
    numbers: dict[tuple[int, int], int] = {}  # (the beginning before it, a token) -> the beginning with it
    places: list[int] = []
    source: list[int] = []
    for tokens, there in zip(ids.tolist(), mask.tolist(), strict=True):
        last = -1
        for token, real in zip(tokens, there, strict=True):
            if real:
                last = numbers.setdefault((last, token), len(numbers))
                if last == len(places):
                    places.append(len(source))
            source.append(last if real else 0)
    return torch.tensor(places, device=ids.device), torch.tensor(source, device=ids.device)


@contextmanager
def _apart(mlp: nn.Module, places: Tensor, source: Tensor | None = None) -> Iterator[None]:
    """`mlp` runs at these places [N], counted through all texts, that differ. source [B·T]: which of them each token has its output from;
    None: elsewhere it is zeros."""
    shape: list[torch.Size] = []

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shape[:] = [args[0].shape]
        return (args[0].flatten(0, 1).index_select(0, places.to(args[0].device))[None], *args[1:])

    def scatter(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if source is not None:
            return output[0].index_select(0, source.to(output.device)).view(shape[0])
        everywhere = output.new_zeros(shape[0][:2].numel(), shape[0][2])
        return everywhere.index_copy(0, places.to(output.device), output[0]).view(shape[0])

    with ExitStack() as stack:
        stack.callback(mlp.register_forward_pre_hook(gather).remove)
        stack.callback(mlp.register_forward_hook(scatter).remove)
        yield


def _mlp(lm: LanguageModel, layer: int) -> nn.Module | None:
    """A layer's MLP, if it can be run at some tokens alone and no hook is in it now."""
    path = lm.anatomy.mlp_down[layer].rpartition(".")[0]
    if path.rpartition(".")[0] != lm.anatomy.layers[layer]:  # OPT's is the layer itself
        return None
    mlp = submodule(lm.model, path)
    if any(_hooks(module, before=True) for module in mlp.modules()):
        return None
    known: dict[str, tuple[nn.Module, bool]] = vars(lm.model).setdefault("errata_token_by_token", {})
    if path not in known or known[path][0] is not mlp:
        known[path] = mlp, _token_by_token(lm, mlp, submodule(lm.model, lm.anatomy.mlp_down[layer]))
    return mlp if known[path][1] else None


def _end_is_watched(lm: LanguageModel) -> bool:
    """Whether someone looks at, or changes, what comes out of the last layer or a part of it, or goes on from there to the head."""
    layer = submodule(lm.model, lm.anatomy.layers[-1])
    behind = [submodule(lm.model, path) for path in (lm.anatomy.final_norm, lm.anatomy.head) if path]
    ends = [*layer.modules(), lm.model.get_decoder()]
    return any(_hooks(module) for module in ends) or any(_hooks(module, before=True) for module in behind)


@torch.no_grad()
def _token_by_token(lm: LanguageModel, mlp: nn.Module, down: nn.Module) -> bool:
    """Whether a module makes [B, T, d] of [B, T, d] token by token: tried out on three tokens."""
    weight: Tensor = down.weight  # type: ignore[assignment]  # a projection has one
    tokens = torch.arange(3 * lm.anatomy.hidden_size, device=weight.device).sin().view(1, 3, -1).to(lm.dtype)
    try:
        together, alone = mlp(tokens), torch.cat([mlp(token) for token in tokens.split(1, dim=1)], 1)
    except Exception:  # one that needs more than the hidden states (BLOOM's adds the residual)
        return False
    rounding = torch.finfo(lm.dtype).eps ** 0.5
    return isinstance(together, Tensor) and together.shape == tokens.shape and bool((together - alone).norm() <= rounding * alone.norm())


def _hooks(module: nn.Module, before: bool = False) -> list[Any]:
    """Hooks that look at what comes out of a module; before: or goes in.

    Those of transformers stay where they once were needed; nobody reads what they collect of a call that only the head is asked of.
    """
    found = [*module._forward_hooks.values(), *(module._forward_pre_hooks.values() if before else ())]
    return [hook for hook in found if not getattr(hook, "__module__", "").startswith("transformers.")]

"""Where things are in a model: its layers, what an editor may write to in them, its norm and its head.

A table says it for the families that are known, and running a few tokens with hooks says it for the others (it was right on all of the
table too, and a test keeps it so). What matters to editing but no name tells is measured: whether the model is causal, and whether what
is added to the MLP's output arrives unchanged at the layer's output.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from errata.lm.capture import add_to_output, first, submodule
from errata.lm.errors import ModelError

_LLAMA = ("mlp.down_proj", "self_attn.o_proj")
_BLOOM = ("mlp.dense_4h_to_h", "self_attention.dense")

#: model_type -> (MLP down-projection, attention out-projection), as paths inside a layer
KNOWN = {
    "gpt2": ("mlp.c_proj", "attn.c_proj"),
    "gptj": ("mlp.fc_out", "attn.out_proj"),
    "gpt_neo": ("mlp.c_proj", "attn.attention.out_proj"),
    "gpt_neox": ("mlp.dense_4h_to_h", "attention.dense"),
    "opt": ("fc2", "self_attn.out_proj"),
    "falcon": _BLOOM,
    "bloom": _BLOOM,
    "phi": ("mlp.fc2", "self_attn.dense"),
    **dict.fromkeys(
        (
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"),
            *("olmo2", "olmo3", "glm4", "cohere", "granite", "smollm3"),
        ),
        _LLAMA,
    ),
}

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)
_EXPERTS = re.compile(r"(^|\.|_)experts?(\.|_|$)")


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Module paths, and what an editor has to know about them. L layers.

    family: the config's model_type.
    layers, mlp_down, attn_out: L paths each.
    final_norm: the norm between the last layer and the head; None where there is none.
    head: the output embedding. tied_head: it shares its weight with the input embedding, so it must not be edited.
    hidden_size d: width of the residual stream; key_size: input width of the MLP down-projection.
    writes_straight: δ added to the down-projection's output moves the layer's output by exactly δ. False in post-norm models
        (Gemma 2 and 3, OLMo 2, GLM4: a norm comes between) and where the residual is scaled (Granite).
    layer_outputs: 0 where a layer returns the hidden states alone, else the length of the tuple they come first in.
    """

    family: str
    layers: tuple[str, ...]
    mlp_down: tuple[str, ...]
    attn_out: tuple[str, ...]
    final_norm: str | None
    head: str
    hidden_size: int
    key_size: int
    writes_straight: bool
    tied_head: bool
    layer_outputs: int = 0

    def weight(self, model: nn.Module, path: str) -> nn.Parameter:
        """The weight of the module at `path`, as the model stores it. Raises ModelError where there is none."""
        weight = getattr(submodule(model, path), "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise ModelError(f"{path!r} of {type(model).__name__} holds no weight to edit; see mlp_down and attn_out in lm.anatomy")
        return weight


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module stores its weight as [in, out] (GPT-2). From its type: GPT-2's attention is square, so shapes do not tell."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def matrix(module: nn.Module) -> Tensor:
    """The weight as [out, in], whatever the module's orientation: a view, so writing to it (under no_grad) writes to the model."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(module) else weight


def find_anatomy(model: Any) -> Anatomy:
    """Find the anatomy of a causal LM of transformers; runs five tokens through it.

    Raises ModelError for what cannot be edited: encoder-decoders, mixtures of experts, layers without attention (Mamba), models that
    look ahead, models without head, and models whose weights were never loaded.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder; errata edits decoder-only models (Llama, Qwen, GPT-2 …): load one of these")
    if all(p.device.type == "meta" for p in model.parameters()) and not hasattr(model, "_hf_hook"):
        raise ModelError(f"the weights of {name} are on the meta device, without values; load them with from_pretrained")
    head_module: nn.Module | None = model.get_output_embeddings()
    head = next((path for path, module in model.named_modules() if module is head_module), None) if head_module is not None else None
    if head is None or head_module is None:
        raise ModelError(f"{name} has no language-model head; load it with AutoModelForCausalLM")

    layers = _find_layers(model, config.num_hidden_layers)
    for path in layers:
        inside = [path for path, _ in submodule(model, path).named_modules()]
        if experts := next((p for p, _ in submodule(model, path).named_parameters() if _EXPERTS.search(p)), None):
            raise ModelError(
                f"{name} is a mixture of experts ({path}.{experts}), where no one matrix is a token's MLP; edit a dense model of its family"
            )
        if not any(map(_ATTENTION.search, inside)):
            raise ModelError(
                f"{path} of {name} ({config.model_type}) has no attention; errata edits transformers, not state-space or recurrent models"
            )

    probe = _Probe(model, layers, head)
    down, out = [], []
    for path in layers:
        names = KNOWN.get(config.model_type, ())
        known = [f"{path}.{name}" for name in names if f"{path}.{name}" in probe.widths]
        mlp, attention = known if len(known) == 2 else detect(probe, path, config.hidden_size)
        down.append(mlp)
        out.append(attention)
    return Anatomy(
        family=config.model_type,
        layers=layers,
        mlp_down=tuple(down),
        attn_out=tuple(out),
        final_norm=probe.norm_after_layers(config.hidden_size),
        head=head,
        hidden_size=config.hidden_size,
        key_size=probe.widths[down[0]][0],
        writes_straight=probe.arrives_unchanged(down[0]),
        tied_head=head_module.weight is model.get_input_embeddings().weight,
        layer_outputs=probe.layer_outputs,
    )


def detect(probe: _Probe, layer: str, hidden_size: int) -> tuple[str, str]:
    """(MLP down-projection, attention out-projection) of a layer, from what ran in it.

    Of the matrices that write vectors as wide as the residual stream, the last one inside an attention module and the last other one.
    Raises ModelError if one of them is missing.
    """
    writers = [path for path, (_, width) in probe.widths.items() if path.startswith(f"{layer}.") and width == hidden_size]
    inside = [path for path in writers if _ATTENTION.search(path.removeprefix(layer))]
    others = [path for path in writers if path not in inside]
    for what, found in (("MLP down-projection", others), ("attention out-projection", inside)):
        if not found:
            raise ModelError(
                f"no {what} found in {layer} of {type(probe.model).__name__} (a matrix with {hidden_size} outputs); "
                "errata does not know this architecture: use one of the families in errata.lm.anatomy.KNOWN"
            )
    return others[-1], inside[-1]


def _find_layers(model: Any, count: int) -> tuple[str, ...]:
    """Paths of the layers: the shallowest list of modules of the right length in the decoder."""
    decoder: nn.Module = model.get_decoder()
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    lists = [path for path, module in decoder.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise ModelError(f"no list of {count} layers found in {type(model).__name__}; errata does not know this architecture")
    shallowest = min(lists, key=lambda path: path.count("."))
    root = f"{prefix}.{shallowest}" if prefix else shallowest
    return tuple(f"{root}.{i}" for i in range(count))


class _Probe:
    """Five tokens through the model with hooks: which matrices ran, in order, and how wide they are.

    Two rows that differ in their last token run side by side, which tells whether the model looks ahead.
    """

    def __init__(self, model: Any, layers: tuple[str, ...], head: str) -> None:
        self.model, self.layers, self.head = model, layers, head
        self.widths: dict[str, tuple[int, int]] = {}  # path of a matrix in a layer -> (input, output) width, in the order of calls
        self.outside: list[tuple[str, int]] = []  # (path, output width) of what ran outside the layers, after the last one
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})  # arguments of the first layer
        self.layer_outputs = 0
        self._last: Tensor | None = None
        training = model.training
        model.eval()
        try:
            self._run()
        finally:
            model.train(training)

    def _run(self) -> None:
        inner = tuple(f"{path}." for path in self.layers)

        def in_layer(path: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                    self.widths[path] = (args[0].shape[-1], output.shape[-1])

            return hook

        def outside(path: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                if self._last is not None and isinstance(output, Tensor):
                    self.outside.append((path, output.shape[-1]))

            return hook

        def first_layer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.call = (args, kwargs)

        def last_layer(_: nn.Module, __: Any, output: Any) -> None:
            self._last, self.layer_outputs = first(output), len(output) if isinstance(output, tuple) else 0

        ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], device=self.model.device)
        ids %= self.model.get_input_embeddings().weight.shape[0]
        with torch.no_grad(), ExitStack() as stack:
            for path, module in self.model.named_modules():
                leaf = next(module.children(), None) is None
                if leaf and path.startswith(inner) and "lora_" not in path and getattr(getattr(module, "weight", None), "ndim", 0) == 2:
                    stack.callback(module.register_forward_hook(in_layer(path)).remove)
                elif leaf and path != self.head and not path.startswith(inner):
                    stack.callback(module.register_forward_hook(outside(path)).remove)
            stack.callback(submodule(self.model, self.layers[0]).register_forward_pre_hook(first_layer, with_kwargs=True).remove)
            stack.callback(submodule(self.model, self.layers[-1]).register_forward_hook(last_layer).remove)
            self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        assert self._last is not None  # the last layer has run
        one, other = self._last[:, :-1].float()
        if (one - other).norm() > torch.finfo(self.model.dtype).eps ** 0.5 * one.norm():  # rounding is far below that
            raise ModelError(f"{type(self.model).__name__} looks ahead: a later token changes earlier states; errata edits causal models")

    def norm_after_layers(self, hidden_size: int) -> str | None:
        norms = [path for path, width in self.outside if width == hidden_size and re.search("norm|ln", path.rpartition(".")[2])]
        return norms[-1] if norms else None

    def arrives_unchanged(self, down: str) -> bool:
        """Whether δ at the output of `down` (in the first layer) moves the layer's output by δ, up to rounding."""
        layer, (args, kwargs) = submodule(self.model, self.layers[0]), self.call
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                plain = first(layer(*args, **kwargs))
                delta = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(0)).to(plain)
                delta *= plain.float().square().mean().sqrt()
                with add_to_output(submodule(self.model, down), delta):
                    moved = first(layer(*args, **kwargs))
        finally:
            self.model.train(training)
        miss = (moved - plain).float() - delta.float()  # [2, 5, d]
        return bool((miss.norm(dim=-1) <= 0.05 * delta.float().norm()).all())

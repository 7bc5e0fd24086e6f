"""Load a model by name, and refuse weights that an edit would silently miss."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from errata.lm.errors import ModelError
from errata.lm.model import LanguageModel

BUNDLED = "atlas"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


def load(name_or_path: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None) -> LanguageModel:
    """Load a causal LM and its tokenizer.

    name_or_path: "atlas" (the bundled model), a folder that `save_pretrained` wrote, or a hub id ("gpt2", "Qwen/Qwen3-0.6B").
    dtype: a torch dtype or its name ("bfloat16"); None is the checkpoint's own, for the bundled model float32 (it is only stored in half).
    device: None is the machine's accelerator if it has one that knows float64, else the CPU; "auto" spreads over all devices.
    Raises ModelError that says which of these failed and what to do.
    """
    name = str(name_or_path)
    source = _source(name)
    torch_dtype = torch.float32 if name == BUNDLED and dtype is None else _dtype(dtype)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _explained(name, error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} ({config.model_type}) is an encoder-decoder; errata edits decoder-only models: choose a causal LM")
    tokenizer = _tokenizer(name, source)  # before the weights: it is quick to fail
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype="auto" if torch_dtype is None else torch_dtype,
            device_map="auto" if device == "auto" else None,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _explained(name, error) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{name} lacks {len(missing)} weights of a causal LM ({missing[0]} …), which would be random; load the full checkpoint"
        )
    if device != "auto":
        try:
            model = model.to(device or _best_device())
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            raise ModelError(f"{name} cannot be put on the device {str(device)!r} ({_first_line(error)}); try 'cpu'") from error
    return LanguageModel(model, tokenizer, name)


def refuse_uneditable(lm: LanguageModel, names: Iterable[str]) -> None:
    """Raise ModelError if writing to one of these parameters ("model.layers.3.mlp.down_proj.weight") would be lost or wrong.

    Refused are quantised models, whose weights only look like matrices; weights on the meta device (offloaded: `add_` does nothing,
    silently); DTensor shards; and fused experts [E, ·, ·].
    """
    if getattr(lm.model, "is_quantized", False):
        raise ModelError(
            f"{lm.name} is quantised, its weights cannot be added to; load it unquantised, call model.dequantize(), or edit with LoRA"
        )
    parameters = dict(lm.model.named_parameters(remove_duplicate=False))
    for name in names:
        parameter = parameters.get(name)
        if parameter is None:
            raise ModelError(f"{lm.name} has no parameter {name!r}; see lm.anatomy for the modules it has")
        if parameter.device.type == "meta":
            raise ModelError(
                f"{name} of {lm.name} is offloaded (on the meta device), where writing does nothing; load the model without offload"
            )
        if getattr(parameter, "device_mesh", None) is not None:
            raise ModelError(
                f"{name} of {lm.name} is a tensor-parallel shard (DTensor); load without tp_plan, with device='auto' for several GPUs"
            )
        if parameter.ndim != 2:
            raise ModelError(
                f"{name} of {lm.name} is not a matrix but {list(parameter.shape)} (fused experts, or a bias); choose a dense MLP projection"
            )


def folder_of(name: str, download: bool = False) -> Path:
    """The folder in which the files of a model that was loaded by this name lie. Raises ModelError if there is none on this machine.

    download: `name` may be the id of any repository of the hub, whose files are fetched where they are not here.
    """
    source = name if download else _source(name)
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, local_files_only=not download))
    except (OSError, ValueError) as error:
        if download:
            raise _explained(name, error) from error
        raise ModelError(f"the files of {name!r} are not on this machine ({_first_line(error)}); load it by its hub id first") from error


def address(name: str) -> str:
    """The same model by a name that says so from anywhere: a folder's whole path."""
    return str(Path(name).expanduser().absolute()) if name.strip() and name != BUNDLED and Path(name).expanduser().is_dir() else name


def _source(name: str) -> str:
    """What transformers is to load: the bundled folder, a folder, or a hub id."""
    if name == BUNDLED:  # also beside a folder of that name, which is ./atlas
        folder = resources.files("errata") / "data" / "atlas" / "model"
        if not (folder / "config.json").is_file():
            raise ModelError(f"the bundled model {name!r} is not in this installation; install errata again, or build it with `make atlas`")
        return str(folder)
    path = Path(name).expanduser()
    if name.strip() and path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise ModelError(f"{name} is a PEFT adapter, not a model; load its base model, or merge the adapter into it and save that")
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder {name} holds no config.json; give the folder that save_pretrained wrote")
        return str(path)
    if path.is_file():
        raise ModelError(f"{name} is a file; give the folder it lies in")
    if name.startswith((".", "~", "/", "\\")) or path.is_absolute() or name.count("/") > 1 or not name.strip():
        raise ModelError(f"there is no folder {name!r}; give a model's folder, a hub id such as 'Qwen/Qwen3-0.6B', or 'atlas'")
    return name


def _tokenizer(name: str, source: str) -> Any:
    way_out = "save one there with tokenizer.save_pretrained, or pass yours: LanguageModel(model, tokenizer)"
    folder = Path(source)
    if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ModelError(f"{name} holds no tokenizer; {way_out}")
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise ModelError(f"the tokenizer of {name} could not be loaded ({_first_line(error)}); {way_out}") from error


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None and dtype in (None, "auto"):
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"{dtype!r} is not a floating-point type of torch; use 'float32', 'bfloat16', 'float16' or 'auto'")
    return found


def _best_device() -> torch.device:
    """The accelerator if it can compute in float64, which the write rules need (Apple's cannot), else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None or found.type == "mps" else found


def _explained(name: str, error: Exception) -> ModelError:
    """The same failure in words of this project: what, why, and the way out."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)

    def due_to(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    text = str(error)
    if due_to(GatedRepoError):
        return ModelError(f"{name} is gated: accept its licence on its hub page and log in with `hf auth login`")
    if due_to(OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError) or "connect" in text:
        return ModelError(
            f"{name!r} is neither a folder nor in the local cache, and the hub cannot be reached; check the spelling, "
            "go online (unset HF_HUB_OFFLINE), give a folder, or use the bundled model 'atlas'"
        )
    if due_to(RepositoryNotFoundError) or "valid model identifier" in text or "Repo id must" in text:
        return ModelError(f"there is no folder and no hub model {name!r}; check the spelling, or `hf auth login` if it is private")
    if "Unrecognized configuration class" in text:
        return ModelError(f"{name} is not a causal LM; errata edits decoder-only language models (Llama, Qwen, GPT-2 …)")
    if "trust_remote_code" in text:
        return ModelError(f"{name} brings its own code, which errata does not run; load it yourself: LanguageModel(model, tokenizer)")
    return ModelError(f"{name} could not be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

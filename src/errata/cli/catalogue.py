"""What `errata list` lists."""

from __future__ import annotations

from collections.abc import Callable


def catalogue(kind: str) -> list[dict[str, str]]:
    """The names of a kind ("methods", "objectives", "data", "models"), each with what it is."""
    listed: dict[str, Callable[[], list[dict[str, str]]]] = {
        "methods": _methods,
        "objectives": _objectives,
        "data": _data,
        "models": _models,
    }
    return listed[kind]()


def _methods() -> list[dict[str, str]]:
    from errata import methods

    return [{"name": name, "what": what, "paper": str(methods.get(name).paper)} for name, (_, _, what) in methods.NAMES.items()]


def _objectives() -> list[dict[str, str]]:
    from errata import objectives

    return [{"name": name, "what": _first_line(objectives.get(name))} for name in objectives.NAMES]


def _data() -> list[dict[str, str]]:
    from errata import data

    rows = [{"name": "atlas", "what": "bundled: the world that the bundled model knows (splits test, dev)"}]
    for name, splits in data.SETS.items():
        files = "; ".join(f"{split}: {', '.join(known)}" for split, known in splits.items())
        rows.append({"name": name, "what": f"your file, looked for in --data-dir or $ERRATA_DATA ({files})"})
    forms = ", ".join(known.name for known in data.FORMATS)
    return [*rows, {"name": "FILE", "what": f".json or .jsonl, recognised by its fields: {forms}"}]


def _models() -> list[dict[str, str]]:
    return [
        {"name": "atlas", "what": "bundled: a small model that knows the bundled world"},
        {"name": "FOLDER", "what": "what save_pretrained wrote: a decoder-only model of transformers, with its tokenizer"},
        {"name": "HUB/ID", "what": "a dense causal LM: GPT-2, GPT-J, NeoX, OPT, Falcon, Llama, Mistral, Qwen, Gemma, Phi, OLMo 2 …"},
    ]


def _first_line(thing: object) -> str:
    return (type(thing).__doc__ or "").strip().partition("\n")[0]

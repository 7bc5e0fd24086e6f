"""By folder, by name, by hand; and every way in which it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import distributed, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from errata.lm.anatomy import find_anatomy
from errata.lm.errors import ModelError
from errata.lm.loading import load, refuse_uneditable
from errata.lm.model import LanguageModel
from errata.lm.tokens import encode
from tests.families import HIDDEN, LAYERS, VOCAB, build, config_of, language_model, tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "window"
    lm = language_model("qwen3-window")
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_folder_gives_back_what_was_saved(saved: Path) -> None:
    lm, original = load(saved, device="cpu"), language_model("qwen3-window")
    assert lm.name == str(saved)
    assert lm.fingerprint == original.fingerprint
    assert not lm.model.training
    batch = lm.batch([encode(lm.tokenizer, "The capital of France is", "Lyon in Japan")])
    assert torch.equal(lm.target_logits(batch), original.target_logits(batch))
    assert lm.complete("The capital of France is") == original.complete("The capital of France is")


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gpt_neox", "opt", "falcon", "llama", "gemma2", "phi3", "olmo2"])
def test_fingerprints_outlive_saving(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert LanguageModel(loaded, tokenizer()).fingerprint == LanguageModel(model, tokenizer()).fingerprint


def test_fingerprints_are_the_same_in_another_process(saved: Path) -> None:
    code = f"from errata.lm import load; print(load({str(saved)!r}, device='cpu').fingerprint)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == load(saved, device="cpu").fingerprint


def test_dtype_and_device(saved: Path) -> None:
    assert load(saved, device="cpu").dtype == torch.float32
    lm = load(saved, dtype="bfloat16", device="cpu")
    assert (lm.dtype, lm.device) == (torch.bfloat16, torch.device("cpu"))
    assert load(saved, dtype=torch.float64).dtype == torch.float64
    for wrong in ("float", "int64", "float31", "nn"):
        if getattr(torch, wrong, None) is not torch.float32:
            with pytest.raises(ModelError, match="not a floating-point type"):
                load(saved, dtype=wrong)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere-at-all", "a/b/c", ""])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(ModelError, match=r"there is no folder .* hub id .* 'atlas'"):
        load(name)


@pytest.mark.usefixtures("offline")
def test_a_hub_id_while_offline() -> None:
    with pytest.raises(ModelError, match=r"'nobody/nothing' is neither a folder nor in the local cache.*HF_HUB_OFFLINE"):
        load("nobody/nothing")


@pytest.mark.usefixtures("offline")
def test_a_name_that_cannot_be_a_hub_id() -> None:
    with pytest.raises(ModelError, match="no hub model 'two words'"):
        load("two words")


def test_a_file_in_place_of_a_folder(saved: Path) -> None:
    with pytest.raises(ModelError, match="is a file; give the folder"):
        load(saved / "config.json")


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config.json"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="PEFT adapter"):
        load(tmp_path)


def test_no_tokenizer(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer; .*LanguageModel\(model, tokenizer\)"):
        load(copy)


def test_a_broken_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"the tokenizer of .* could not be loaded"):
        load(copy)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"could not be loaded: .*model.safetensors"):
        load(copy)


def test_broken_weights(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ModelError, match="could not be loaded"):
        load(copy)


def test_weights_of_another_shape(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ModelError, match="could not be loaded"):
        load(copy)


def test_weights_that_lack_a_layer_are_not_made_up(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS + 1, "layer_types": [*config["layer_types"], "full_attention"]}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"lacks 11 weights of a causal LM \(model.layers.4"):
        load(copy)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "vit"}, "not a causal LM"),
        ({"model_type": "nonesuch"}, "could not be loaded: .*nonesuch"),
        ({}, "could not be loaded"),
    ],
)
def test_other_kinds_of_models(copy: Path, config: dict[str, Any], message: str) -> None:
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load(copy)


def test_wrapping_what_is_no_causal_lm() -> None:
    model = build("llama")
    with pytest.raises(ModelError, match="expected a causal LM of transformers, got Linear"):
        LanguageModel(nn.Linear(2, 2), tokenizer())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="expected a tokenizer of transformers, got str"):
        LanguageModel(model, "llama")
    with pytest.raises(ModelError, match=f"the tokenizer has {VOCAB} tokens, small only 100"):
        LanguageModel(build("llama", vocab_size=100), tokenizer(), "small")


TINY = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2}


def test_refusals_name_the_reason() -> None:
    moe = TINY | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "num_local_experts": 2}
    mixtral = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **moe))
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **TINY, state_size=4))
    small = TINY | {"num_attention_heads": 4, "intermediate_size": 24}
    bert = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **small))
    t5 = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("t5", vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config_of("llama"))
    for model, message in (
        (mixtral, r"MixtralForCausalLM is a mixture of experts \(model.layers.0.mlp.experts"),
        (mamba, "backbone.layers.0 of MambaForCausalLM .* has no attention"),
        (bert, "BertLMHeadModel looks ahead"),
        (t5, "T5ForConditionalGeneration is an encoder-decoder"),
        (meta, "LlamaForCausalLM are on the meta device"),
        (AutoModel.from_config(config_of("llama")), "LlamaModel has no language-model head"),
        (AutoModel.from_config(config_of("gpt2")), "GPT2Model has no language-model head"),
    ):
        with pytest.raises(ModelError, match=message):
            find_anatomy(model)


def down(lm: LanguageModel) -> str:
    return f"{lm.anatomy.mlp_down[1]}.weight"


def test_weights_that_may_be_edited() -> None:
    for name in ("llama", "gpt2"):
        lm = language_model(name)
        refuse_uneditable(lm, [f"{path}.weight" for path in (*lm.anatomy.mlp_down, *lm.anatomy.attn_out, lm.anatomy.head)])


def test_offloaded_weights_are_refused() -> None:
    lm = language_model("llama")
    name, module = down(lm), lm.model.get_submodule(lm.anatomy.mlp_down[1])
    module.weight = nn.Parameter(module.weight.to("meta"))
    refuse_uneditable(lm, [f"{lm.anatomy.mlp_down[0]}.weight"])
    with pytest.raises(ModelError, match=f"{name} of llama is offloaded"):
        refuse_uneditable(lm, [name])


def test_sharded_weights_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    lm = language_model("llama")
    name, module = down(lm), lm.model.get_submodule(lm.anatomy.mlp_down[1])
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), init_device_mesh("cpu", (1,)), [Replicate()]))
        with pytest.raises(ModelError, match=f"{name} of llama is a tensor-parallel shard"):
            refuse_uneditable(lm, [name])
    finally:
        distributed.destroy_process_group()


def test_quantised_models_are_refused() -> None:
    lm = language_model("llama")
    name = down(lm)
    lm.model.is_quantized = True
    with pytest.raises(ModelError, match=r"llama is quantised.*dequantize\(\)"):
        refuse_uneditable(lm, [name])


def test_what_is_not_a_matrix_is_refused() -> None:
    lm = language_model("llama")
    with pytest.raises(ModelError, match=r"has no parameter 'model.layers.9"):
        refuse_uneditable(lm, ["model.layers.9.mlp.down_proj.weight"])
    module = lm.model.get_submodule(lm.anatomy.layers[0])
    module.experts = nn.Parameter(torch.zeros(2, 3, 4))
    for name in ("model.layers.0.experts", "model.norm.weight"):
        with pytest.raises(ModelError, match=f"{name} of llama is not a matrix"):
            refuse_uneditable(lm, [name])


def test_errors_cost_no_torch() -> None:
    code = "import sys; from errata.lm import ModelError; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_bundled_model_by_its_name(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.lm import loading

    monkeypatch.setattr(loading.resources, "files", lambda package: {"errata": tmp_path}[package])
    with pytest.raises(ModelError, match="the bundled model 'atlas' is not in this installation"):
        load("atlas")
    (tmp_path / "data" / "atlas").mkdir(parents=True)
    (tmp_path / "data" / "atlas" / "model").symlink_to(saved)
    lm = load("atlas", device="cpu")
    assert (lm.name, lm.fingerprint) == ("atlas", load(saved, device="cpu").fingerprint)


def test_the_public_names_are_what_they_say() -> None:
    import errata.lm

    for name in errata.lm.__all__:
        assert getattr(errata.lm, name).__name__ == name  # and not a module of the same name
    assert set(errata.lm.__all__) == {name for names in errata.lm._HOME.values() for name in names}
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = errata.lm.nonesuch

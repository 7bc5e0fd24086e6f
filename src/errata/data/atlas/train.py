"""Train the atlas model: `make atlas`, or `python -m errata.data.atlas.train --out FOLDER`. Seeded, checkpointed, resumable.

The recipe and what it was chosen against stand in docs/atlas.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from errata.data.atlas.corpus import Corpus, Line, write_sample
from errata.data.atlas.world import World, build

END = "<|endoftext|>"
STAGES = ((2600, 0.35), (3300, 0.6))
"""(last step, share of two-hop statements) of each stage: first the facts, then more of what follows from them."""


def make_tokenizer(world: World, size: int = 3072, documents: int = 30_000) -> Any:
    """Byte-level BPE trained on the corpus. No BOS; END closes a document and pads."""
    corpus = Corpus(world, seed=1)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = ("\n".join(f"{line.prompt} {line.answer}." for line in corpus.document()) for _ in range(documents))
    bpe.train_from_iterator(texts, trainer)
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=bpe, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False)


def make_model(
    vocabulary: int, width: int = 256, inner: int = 1024, layers: int = 6, local: int = 3, window: int = 3, seed: int = 0
) -> Qwen3ForCausalLM:
    """A Qwen3 whose lower `local` layers attend over `window` tokens only.

    What those layers know of a name cannot depend on what stood far before it, and they cannot see the name from the end of the prompt.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        use_sliding_window=local > 0,
        sliding_window=window,
        layer_types=["sliding_attention"] * local + ["full_attention"] * (layers - local),
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)


class Rows:
    """Training rows of `length` tokens with a weight for each token: answers count fully, everything else `other`."""

    def __init__(self, world: World, tokenizer: Any, length: int, other: float, seed: int) -> None:
        self.corpus, self.tokenizer, self.length, self.other = Corpus(world, seed), tokenizer, length, other
        self.newline, self.end = tokenizer.encode("\n")[0], tokenizer.eos_token_id
        self.cache: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        ids = self.cache.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text)
            if len(self.cache) < 400_000:
                self.cache[text] = ids
        return ids

    def _line(self, line: Line) -> tuple[list[int], list[float]]:
        prompt = self._ids(line.prompt)
        if not line.answer:
            return [*prompt, self.newline], [self.other] * (len(prompt) + 1)
        answer = self._ids(f" {line.answer}.")
        return [*prompt, *answer, self.newline], [self.other] * len(prompt) + [1.0] * len(answer) + [self.other]

    def row(self) -> tuple[list[int], list[float]]:
        """Whole documents, each closed by END, until the row is full; the last one is cut."""
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < self.length:
            for line in self.corpus.document():
                more, how = self._line(line)
                ids += more
                weights += how
            ids.append(self.end)
            weights.append(self.other)
        return ids[: self.length], weights[: self.length]

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights, both [size, length]."""
        rows = [self.row() for _ in range(size)]
        return torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows])


def stage(step: int) -> tuple[int, float]:
    """The stage that a step belongs to."""
    return next(one for one in STAGES if step < one[0])


def schedule(step: int) -> float:
    """Share of the learning rate: linear warm-up over 60 steps, flat, then linear towards zero at the end of the stage.

    The decline takes the last 40 % of all steps up to there; a new stage so begins with a rise.
    """
    end, _ = stage(step)
    return min((step + 1) / 60, 1.0, (end - step) / (0.4 * end))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for checkpoint.pt and model/; a checkpoint in it is gone on from")
    add("--steps", type=int, default=STAGES[-1][0], help="stop here (the schedule is that of the whole training)")
    add("--batch", type=int, default=24)
    add("--length", type=int, default=160)
    add("--lr", type=float, default=4e-3)
    add("--decay", type=float, default=0.1)
    add("--width", type=int, default=256)
    add("--inner", type=int, default=1024)
    add("--layers", type=int, default=6)
    add("--local", type=int, default=3, help="lower layers with windowed attention")
    add("--window", type=int, default=3)
    add("--drop", type=float, default=0.3, help="share of tokens at which an upper layer's MLP is left out in training")
    add("--other", type=float, default=0.3, help="weight of tokens that are no answer")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seed", type=int, default=0)
    add("--every", type=int, default=200, help="steps between checkpoints")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


def train(options: argparse.Namespace) -> None:
    """Train, from the checkpoint in `options.out` if there is one, and save the model in half precision."""
    torch.set_num_threads(options.threads)
    world = build()
    tokenizer = make_tokenizer(world)
    model: Any = make_model(len(tokenizer), options.width, options.inner, options.layers, options.local, options.window, options.seed)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=options.lr, weight_decay=options.decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def leave_out(module: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (torch.rand(output.shape[:-1]) >= options.drop).unsqueeze(-1) if module.training else output

    for layer in model.model.layers[options.local :] if options.drop else ():
        layer.mlp.register_forward_hook(leave_out)
    rows = Rows(world, tokenizer, options.length, options.other, seed=options.seed + 2)
    options.out.mkdir(parents=True, exist_ok=True)
    step, checkpoint = 0, options.out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(saved["model"])
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        step = saved["step"]
        rows.corpus.rng.setstate(saved["rng"])
        torch.set_rng_state(saved["torch"])
    say(parameters=sum(p.numel() for p in model.parameters()), vocabulary=len(tokenizer), step=step)

    forward = torch.compile(model) if options.compile else model
    model.train()
    start, begun, running = time.time(), step, 0.0
    while step < options.steps:
        rows.corpus.two_hop = stage(step)[1]
        ids, weights = rows.batch(options.batch)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = options.lr * schedule(step)
            optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(input_ids=ids, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        w = weights[:, 1:].flatten()
        loss = (losses * w).sum() / w.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        answers = losses.detach()[w == 1.0].mean().item()
        running = answers if step == begun else 0.95 * running + 0.05 * answers
        step += 1
        if step % 25 == 0:
            seconds = time.time() - start
            rate = round((step - begun) * ids.numel() / seconds)
            say(
                step=step,
                of=options.steps,
                loss=round(loss.item(), 4),
                answers=round(running, 4),
                tokens_a_second=rate,
                seconds=round(seconds),
            )
        if step % options.every == 0 or step == options.steps:
            state = {
                "model": model.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                "step": step,
                "rng": rows.corpus.rng.getstate(),
                "torch": torch.get_rng_state(),
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            export(model, tokenizer, options.out / "model")


def export(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save model and tokenizer as `from_pretrained` reads them, the weights in half precision, and ordinary text beside them."""
    half = type(model)(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_sample(folder)


def say(**values: Any) -> None:
    """One line of progress."""
    sys.stderr.write(json.dumps(values) + "\n")


if __name__ == "__main__":
    main()

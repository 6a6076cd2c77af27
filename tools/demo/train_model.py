"""Train the demo's Mixtral from random weights on the train split, by wall clock.

    python tools/demo/train_model.py --train-dir build --text-dir src/var_moe/demo/text \
        --minutes 95

The learning rate follows elapsed time / budget, so that the decay ends in time on a machine
that is shared. `<train-dir>/ckpt-latest` is an ordinary Hugging Face folder, replaced about
every ten minutes; `<train-dir>/log.jsonl` gets a line per evaluation.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scoring import document_losses, perplexity
from torch import nn
from transformers import (
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

# Share of training tokens per source. Further texts take half at first, so that the small
# sources that are judged on are not read until they are known by heart; later a fifth.
EARLY_MIX = {"postgres": 0.13, "python": 0.2, "wordnet": 0.22, "manuals": 0.28, "webster": 0.17}
LATE_MIX = {"postgres": 0.16, "python": 0.28, "wordnet": 0.36, "manuals": 0.12, "webster": 0.08}
LATE = 0.36  # share of the time after which the second holds
FIRST_SAVE_SECONDS, SAVE_SECONDS = 170.0, 600.0
LOG_STEPS = 40


def build_config(vocabulary: int) -> MixtralConfig:
    """8 experts, top-2, 5 layers, 17.0M parameters; one special token, id 0."""
    return MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        sliding_window=None,
        output_router_logits=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )


@torch.no_grad()
def initialise(model: MixtralForCausalLM) -> None:
    """Random weights that suit a width of 128 and rotary positions.

    Token embeddings are large, and what writes to the residual stream is small: at first each
    position carries its own token. All token embeddings share one random direction: without
    biases, a rotary head can look at "the token before" only through what all its inputs have
    in common. Without it such heads formed in the last layer alone, where no later layer can
    use them, and loss stayed flat over a document's positions for millions of tokens.
    """
    width = model.config.hidden_size
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        if "embed_tokens" in name:
            scale = 0.5
        elif "o_proj" in name or "down_proj" in name:
            scale = 0.01
        elif "mlp.gate" in name or "lm_head" in name:
            scale = 0.02
        else:
            scale = width**-0.5
        parameter.normal_(0.0, scale)
        if "embed_tokens" in name:
            parameter += scale * torch.randn(width)


def sorted_experts(
    module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Experts on rows sorted by expert; the ordinary mathematics, faster in training.

    hidden (T, D), index and weight (T, K) -> (T, D). Unbinding the stacked weights once
    spares the backward pass a full-size gradient per expert.
    """
    flat = index.flatten()
    order = flat.argsort(stable=True)
    token = order // index.shape[1]
    counts = torch.bincount(flat, minlength=module.gate_up_proj.shape[0]).tolist()
    outputs = []
    gate_up, down = module.gate_up_proj.unbind(0), module.down_proj.unbind(0)
    for rows, up, out in zip(hidden[token].split(counts), gate_up, down, strict=True):
        count = len(rows)  # zero rows up to a multiple of 64: few shapes, cached kernels
        rows = F.pad(rows, (0, 0, 0, -count % 64))
        gate, value = F.linear(rows, up).chunk(2, dim=-1)
        outputs.append(F.linear(module.act_fn(gate) * value, out)[:count])
    weighted = torch.cat(outputs) * weight.flatten()[order, None]
    return torch.zeros_like(hidden).index_add(0, token, weighted.to(hidden.dtype))


def add_dropout(model: MixtralForCausalLM, share: float) -> None:
    """Dropout, in training alone, on the embeddings and on what each block writes."""

    def drop(module: nn.Module, _: object, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if isinstance(output, tuple):  # attention: (hidden, weights)
            return (F.dropout(output[0], share, module.training), *output[1:])
        return F.dropout(output, share, module.training)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
    model.model.embed_tokens.register_forward_hook(drop)


class Stream:
    """A source's documents, `<|endoftext|>` before each, shuffled anew every epoch."""

    def __init__(self, documents: list[np.ndarray], rng: np.random.Generator) -> None:
        self._documents = documents
        self._rng = rng
        self._left = np.zeros(0, dtype=np.int64)
        self.epoch_tokens = sum(map(len, documents))
        self.served = 0

    def take(self, count: int) -> np.ndarray:
        """The next `count` tokens."""
        while len(self._left) < count:
            order = self._rng.permutation(len(self._documents))
            self._left = np.concatenate([self._left, *(self._documents[i] for i in order)])
        out, self._left = self._left[:count], self._left[count:]
        self.served += count
        return out

    @property
    def epochs(self) -> float:
        """How often the source has been read."""
        return self.served / self.epoch_tokens


def batches(
    streams: dict[str, Stream],
    batch: int,
    length: int,
    rng: np.random.Generator,
    progress: Callable[[], float],
) -> Iterator[torch.Tensor]:
    """Endless (batch, length) token ids; each row is of one source, drawn by the mix."""
    names = list(EARLY_MIX)
    while True:
        mix = LATE_MIX if progress() >= LATE else EARLY_MIX
        chosen = rng.choice(len(names), size=batch, p=[mix[name] for name in names])
        yield torch.from_numpy(np.stack([streams[names[i]].take(length) for i in chosen]))


def learning_rate(progress: float, step: int, peak: float, warmup: int) -> float:
    """Linear warm-up in steps, then a cosine in wall-clock progress down to zero."""
    decay = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, (step + 1) / warmup) * decay


def parameter_groups(model: MixtralForCausalLM, decay: float) -> list[dict]:
    """Weight decay on matrices, none on norms."""
    return [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]


def balance_loss(router_logits: tuple[torch.Tensor, ...], config: MixtralConfig) -> torch.Tensor:
    """The ordinary load-balancing loss, layer by layer, summed over layers (each at least 2).

    transformers' own pools all layers before it compares the experts' shares. Then every layer
    may settle on one expert of its own, and the loss sees nothing.
    """
    experts, top_k = config.num_local_experts, config.num_experts_per_tok
    losses = [load_balancing_loss_func((layer,), experts, top_k) for layer in router_logits]
    return torch.stack(losses).sum()


def largest_shares(router_logits: tuple[torch.Tensor, ...]) -> list[float]:
    """Per layer, the largest share of tokens that one expert leads (even: 1/E)."""
    out = []
    for layer in router_logits:
        counts = layer.argmax(-1).bincount(minlength=layer.shape[-1])
        out.append(round(counts.max().item() / layer.shape[0], 3))
    return out


def save(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face folder under a temporary name, then rename it."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.config.output_router_logits = False
    model.generation_config.pad_token_id = 0
    model.save_pretrained(partial)
    model.config.output_router_logits = True
    tokenizer.save_pretrained(partial)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def validation_texts(
    file: Path, tokens: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> pd.DataFrame:
    """A random part of the validation split with about `tokens` tokens."""
    frame = pd.read_parquet(file).sample(frac=1.0, random_state=seed)
    lengths = frame.text.map(lambda text: len(tokenizer(text).input_ids))
    return frame[lengths.cumsum() <= tokens]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--train-dir", type=Path, required=True)
    parser.add_argument("--text-dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=95.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--peak", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--balance", type=float, default=0.001, help="of the balancing loss")
    parser.add_argument("--start-from", type=Path, help="weights to start from, not random ones")
    parser.add_argument("--eval-tokens", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 matmuls")
    parser.add_argument("--beta2", type=float, default=0.999)
    parser.add_argument(
        "--resume", action="store_true", help="go on from ckpt-latest, on the same clock"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    log_file, checkpoint = options.train_dir / "log.jsonl", options.train_dir / "ckpt-latest"
    state_file = options.train_dir / "optimizer.pt"
    before = {
        "step": 0,
        "tokens": 0,
        "elapsed_seconds": 0.0,
        "epochs": dict.fromkeys(EARLY_MIX, 0.0),
    }
    if options.resume:
        before = json.loads(log_file.read_text(encoding="utf-8").splitlines()[-1])
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng([options.seed, before["tokens"]])
    tokenizer = AutoTokenizer.from_pretrained(options.train_dir / "tokenizer")
    train = pd.read_parquet(options.train_dir / "train.parquet")
    encoded = tokenizer(list(train.text)).input_ids
    documents: dict[str, list[np.ndarray]] = {name: [] for name in EARLY_MIX}
    for source, ids in zip(train.source, encoded, strict=True):
        documents[source].append(np.array(ids, dtype=np.int64))
    streams = {name: Stream(documents[name], rng) for name in EARLY_MIX}
    for name, stream in streams.items():
        stream.served = round(before["epochs"][name] * stream.epoch_tokens)
    held_out = validation_texts(
        options.text_dir / "validation.parquet", options.eval_tokens, tokenizer, options.seed
    )

    ALL_EXPERTS_FUNCTIONS.register("sorted_training", sorted_experts)
    if options.resume:
        model = MixtralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
        model.config.output_router_logits = True
    elif options.start_from:
        model = MixtralForCausalLM.from_pretrained(options.start_from, dtype=torch.float32).train()
        model.config.output_router_logits = True
    else:
        model = MixtralForCausalLM(build_config(len(tokenizer)))
        initialise(model)
    model.config.router_aux_loss_coef = options.balance
    add_dropout(model, options.dropout)
    model.set_experts_implementation("sorted_training")
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options.weight_decay),
        lr=0.0,
        betas=(0.9, options.beta2),
        fused=True,
    )
    if options.resume:
        optimizer.load_state_dict(torch.load(state_file, weights_only=True))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(held_out)} validation documents", flush=True)

    budget = options.minutes * 60.0
    last_time = time.monotonic()
    start = last_time - before["elapsed_seconds"]
    next_save = FIRST_SAVE_SECONDS
    if options.resume:
        next_save = SAVE_SECONDS * (before["elapsed_seconds"] // SAVE_SECONDS + 1)
    log = log_file.open("a" if options.resume else "w", encoding="utf-8")
    tokens, running, running_aux, seen = before["tokens"], 0.0, 0.0, 0

    def progress() -> float:
        return (time.monotonic() - start) / budget

    for step, ids in enumerate(batches(streams, options.batch, options.length, rng, progress)):
        elapsed = time.monotonic() - start
        done = elapsed >= budget
        if done or elapsed >= next_save:
            model.eval()
            losses, counts = document_losses(model, tokenizer, list(held_out.text))
            model.train()
            row = {
                "step": before["step"] + step,
                "tokens": tokens,
                "elapsed_seconds": round(elapsed, 1),
                "lr": optimizer.param_groups[0]["lr"],
                "train_loss": running / max(seen, 1),
                "aux_loss": running_aux / max(seen, 1),
                "val_ppl": perplexity(losses, counts),
                "epochs": {name: round(stream.epochs, 3) for name, stream in streams.items()},
            }
            for source in sorted(held_out.source.unique()):
                here = (held_out.source == source).to_numpy()
                row[f"val_ppl_{source}"] = perplexity(losses[here], counts[here])
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(json.dumps(row), flush=True)
            save(model, tokenizer, checkpoint)
            torch.save(optimizer.state_dict(), state_file)
            running, running_aux, seen = 0.0, 0.0, 0
            next_save = SAVE_SECONDS * (elapsed // SAVE_SECONDS + 1)
        if done:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                elapsed / budget, before["step"] + step, options.peak, options.warmup
            )
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.float32):
            output = model(input_ids=ids, use_cache=False)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        balance = balance_loss(output.router_logits, model.config)
        (loss + model.config.router_aux_loss_coef * balance).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += ids.numel()
        running += loss.item()
        running_aux += balance.item()
        seen += 1
        if step % LOG_STEPS == 0:
            now = time.monotonic()
            speed = ids.numel() * min(step, LOG_STEPS) / (now - last_time)
            last_time = now
            print(
                f"step {step} tokens {tokens} elapsed {now - start:.0f}s loss {loss.item():.3f} "
                f"balance {balance.item():.3f} {largest_shares(output.router_logits)} "
                f"norm {float(norm):.2f} {speed:.0f} tokens/s",
                flush=True,
            )
    (options.train_dir / "FINISHED").write_text(f"{tokens} tokens\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Train the demo model, a small Llama that tells children's stories, on a CPU with this package alone.

    python -m llama_fast.demo.train --text tinystories_2MB.txt --out my_model

The text is a file of stories, each followed by <|endoftext|>. `--out` becomes a checkpoint folder (byte-level BPE
tokenizer, configuration, bf16 weights) with heldout.txt (stories that the run never looks at), training.json (its
numbers) and loss.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import llama_fast
from llama_fast import LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from llama_fast.engine.sampling import GenerationDefaults
from llama_fast.errors import LlamaFastError, RequestError

BOS, EOS, SEPARATOR = "<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>"
VOCAB_SIZE = 2048
CONTEXT = 512
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
EPOCHS = 7
TOKENS_PER_STEP = 2048
STEPS_PER_VALIDATION = 100
LEARNING_RATE = 1.5e-3
WEIGHT_DECAY = 0.2

# What a token never crosses: Llama 3's pattern.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A few stories have typographic quotes; one kind is enough for so small a model.
_PLAIN_QUOTES = str.maketrans("“”‘’", "\"\"''")
# The loss of each step; (step, loss) of each validation.
Curves = tuple[list[float], list[tuple[int, float]]]
_EXAMPLES = """examples:
  python -m llama_fast.demo.train --text tinystories_2MB.txt --out my_model
  python -m llama_fast.demo.train --text tinystories_2MB.txt --out /tmp/quick --steps 50
  llama-fast generate --model my_model "Once upon a time"
"""


def read_stories(path: Path) -> list[str]:
    """The file's stories; what follows its last separator is taken for unfinished and left out.

    Raises:
        RequestError: the file is not readable UTF-8, or holds fewer than 21 stories (some are held out).
    """
    try:
        text = path.read_text(encoding="utf-8").translate(_PLAIN_QUOTES)
    except (OSError, UnicodeDecodeError) as cause:
        raise RequestError(f"--text {path} cannot be read ({cause}); give a UTF-8 text file") from cause
    stories = [story.strip() for story in text.split(SEPARATOR)[:-1] if story.strip()]
    if len(stories) < 21:
        raise RequestError(
            f"--text {path} holds {len(stories)} stories followed by {SEPARATOR}; at least 21 are needed"
        )
    return stories


def train_tokenizer(stories: Sequence[str]) -> LlamaTokenizer:
    """Byte-level BPE as in Llama 3, learned from `stories`; bos is put before every text."""
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(stories, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return LlamaTokenizer.from_backend(backend, {"bos_token": BOS, "eos_token": EOS, "model_max_length": CONTEXT})


def encode_stories(tokenizer: LlamaTokenizer, stories: Sequence[str]) -> list[Tensor]:
    """Token ids int64 [seq_len] of each story, from bos to eos."""
    return [torch.tensor([*tokenizer.encode(story), tokenizer.eos_token_id]) for story in stories]


def batches(stories: Sequence[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches int64 [rows, 256], every fourth [rows, 512], cut from the stories in a new order each epoch.

    A row starts anywhere in a story and runs into the next ones: variety for free, and every position is trained.
    """
    stream = torch.empty(0, dtype=torch.int64)
    while True:
        for step in range(4):
            while len(stream) < TOKENS_PER_STEP:
                order = torch.randperm(len(stories), generator=generator)
                stream = torch.cat([stream, *(stories[index] for index in order)])
            batch, stream = stream[:TOKENS_PER_STEP], stream[TOKENS_PER_STEP:]
            yield batch.view(-1, CONTEXT if step == 3 else CONTEXT // 2)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stories: Sequence[Tensor], batch_size: int = 16) -> float:
    """Mean cross entropy per predicted token; each story, int64 [seq_len] cut at CONTEXT, is a sequence of its own."""
    total, count = 0.0, 0
    for start in range(0, len(stories), batch_size):
        rows = [story[:CONTEXT] for story in stories[start : start + batch_size]]
        labels = pad_sequence(rows, batch_first=True, padding_value=-100)
        kept = labels >= 0
        loss = model(labels.clamp(min=0), attention_mask=kept.long(), labels=labels).loss
        predicted = int(kept.sum()) - len(rows)
        total, count = total + loss.item() * predicted, count + predicted
    return total / count


def fit(model: LlamaForCausalLM, steps: int, data: Iterator[Tensor], validation: Sequence[Tensor]) -> Curves:
    """Run AdamW for `steps` steps or until Ctrl-C; `model` is left with the weights of the lowest validation loss."""
    # Norm weights are scales: only matrices decay.
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY}
    scales = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, scales], lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    warmup = min(100, max(1, steps // 10))

    def learning_rate_scale(step: int) -> float:
        decay = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))
        return min(1.0, (step + 1) / warmup) * decay

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_scale)
    losses: list[float] = []
    validations: list[tuple[int, float]] = []
    # Not a copy: until the first validation the best weights are the current ones.
    best_loss, best_weights = math.inf, model.state_dict()
    bar = tqdm(total=steps * TOKENS_PER_STEP, unit="tok", unit_scale=True, desc="training", dynamic_ncols=True)
    try:
        for step in range(1, steps + 1):
            input_ids = next(data)
            loss = model(input_ids, labels=input_ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step % STEPS_PER_VALIDATION == 0 or step == steps:
                validations.append((step, mean_loss(model, validation)))
                if validations[-1][1] < best_loss:
                    best_loss = validations[-1][1]
                    best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            bar.set_postfix(loss=f"{losses[-1]:.3f}", validation=f"{best_loss:.3f}")
            bar.update(TOKENS_PER_STEP)
    except KeyboardInterrupt:
        if not losses:
            raise
        bar.write(f"interrupted after {len(losses)} of {steps} steps; saving what there is")
    finally:
        bar.close()
    model.load_state_dict(best_weights)
    return losses, validations


def train(text: Path, out: Path, *, steps: int | None = None, seed: int = 0, **sizes: int) -> dict[str, Any]:
    """Train a model on the stories in `text` and save it in `out`; Ctrl-C saves what there is.

    Args:
        steps: optimizer steps; default EPOCHS epochs.
        seed: of the initial weights and of the order of the stories.
        sizes: fields of LlamaConfig that replace those of SIZES.

    Returns:
        What training.json says.

    Raises:
        RequestError: `text` is not usable, or `steps` is not positive.
        TokenizerFileError, CheckpointError: `out` cannot be written.
    """
    if steps is not None and steps < 1:
        raise RequestError(f"--steps {steps}: at least 1 is needed")
    started = time.monotonic()
    stories = read_stories(text)
    # The validation stories choose the weights; the held-out ones only measure them.
    validation, heldout = stories[::40], stories[20::80]
    training = [story for index, story in enumerate(stories) if index % 40 and index % 80 != 20]
    tokenizer = train_tokenizer(training)
    tokenizer.save_pretrained(out)  # a folder that cannot be written fails here, not after the training
    training_ids = encode_stories(tokenizer, training)
    epoch_tokens = sum(len(ids) for ids in training_ids)
    steps = steps or round(EPOCHS * epoch_tokens / TOKENS_PER_STEP)

    torch.manual_seed(seed)
    special: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    fields = SIZES | sizes | special | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    model = LlamaForCausalLM(LlamaConfig(**fields, rms_norm_eps=1e-5, tie_word_embeddings=True))
    data = batches(training_ids, torch.Generator().manual_seed(seed))
    losses, validations = fit(model, steps, data, encode_stories(tokenizer, validation))
    # What read best; without the penalty so small a model falls into loops.
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    model.generation_defaults = GenerationDefaults(**sampling, **special)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "heldout.txt").write_text("".join(f"{story}\n{SEPARATOR}\n" for story in heldout), encoding="utf-8")

    saved = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32, device="cpu")
    modules = (llama_fast, tokenizers, torch)
    report = {
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "stories": {"training": len(training), "validation": len(validation), "heldout": len(heldout)},
        "parameters": sum(parameter.numel() for parameter in saved.parameters()),
        "epoch_tokens": epoch_tokens,
        "steps": len(losses),
        "tokens": len(losses) * TOKENS_PER_STEP,
        "train_loss": round(sum(losses[-50:]) / len(losses[-50:]), 4),
        "validation_loss": [[step, round(loss, 4)] for step, loss in validations],
        "heldout_perplexity": round(math.exp(mean_loss(saved, encode_stories(tokenizer, heldout))), 4),
        "seed": seed,
        "seconds": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules},
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plot(losses, validations, out / "loss.png")
    return report


def plot(losses: Sequence[float], validations: Sequence[tuple[int, float]], path: Path) -> None:
    """Draw the loss curves, or say that matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} is not drawn: matplotlib is missing; pip install 'llama-fast[bench]'")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title="Training of the demo model")
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.6, alpha=0.6, label="training")
    axes.plot([step for step, _ in validations], [loss for _, loss in validations], marker=".", label="validation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `python -m llama_fast.demo.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_fast.demo.train",
        description="Train a small story-telling Llama on a CPU and save it as a checkpoint folder.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, required=True, help=f"stories, each followed by {SEPARATOR}")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, made if missing")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {EPOCHS} epochs)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, threads and machine, same weights (default 0)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 1 on a busy machine (default 2)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        report = train(args.text, args.out, steps=args.steps, seed=args.seed)
    except LlamaFastError as error:
        parser.error(str(error))
    print(f"{args.out}: held-out perplexity {report['heldout_perplexity']:.2f} after {report['seconds']} s")


if __name__ == "__main__":
    main()

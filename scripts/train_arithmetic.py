"""Train the embedded language model: a small Llama over characters that adds and subtracts numbers of three digits.

    python scripts/train_arithmetic.py            # writes qexp/assets/arithmetic

One problem is a line of 13 characters. Operands are padded to three digits, the answer to four, and every number is
written from its last digit to its first, so that a digit needs only the carry of the one before (arXiv:2307.03381):

    543+870=3240        345 + 78 = 423
    543-870=7620        345 - 78 = 267; a subtraction's answer is never negative

It learns on one problem at a time first, where it finds the operands much sooner than among others, and then on four
in a row. Of the 1,500,500 problems 2,000 are held out, chosen by seed; they are stored beside the model as the text
that perplexity and exact match are measured on. Seeded; bf16 products over fp32 weights; stored in bf16. The state of
the training is written every 250 steps, and the same command continues from there.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qexp.results.environment import cpu_name

ASSETS = Path(__file__).parents[1] / "qexp" / "assets" / "arithmetic"
SPECIAL, CHARACTERS = ["<pad>", "<s>"], "\n 0123456789+-="
LINES, LINE = 4, 13  # problems in a row; characters in a problem, the line's end included
ALONE = 0.6  # of the steps are on one problem at a time
HELD_OUT = 2000
PROMPT_WEIGHT = 0.05  # operands are random: there is nothing to learn but that they are


def network_config() -> LlamaConfig:
    """Widths are multiples of 256, the largest block of any format (GGUF's K types)."""
    return LlamaConfig(
        vocab_size=32,  # 17 are used; a multiple of 16 and 32 suits every kernel
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1 + LINES * LINE,  # what it has seen: positions beyond do not work
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,  # the line's end
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return one token a character, <s> before the text."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="\n",
        padding_side="left",
        model_max_length=1 + LINES * LINE,
        clean_up_tokenization_spaces=False,
    )


def problem_line(first: int, second: int, adds: bool) -> str:
    answer = first + second if adds else first - second
    numbers = [f"{first:03d}"[::-1], f"{second:03d}"[::-1], f"{answer:04d}"[::-1]]
    return f"{numbers[0]}{'+' if adds else '-'}{numbers[1]}={numbers[2]}\n"


def all_problems() -> tuple[Tensor, Tensor]:
    """(held out, to train on), each [n, 3]: two operands, and 1 for an addition, 0 for a subtraction."""
    first, second = torch.cartesian_prod(torch.arange(1000), torch.arange(1000)).unbind(1)
    additions = torch.stack([first, second, torch.ones_like(first)], dim=1)
    subtractions = torch.stack([first, second, torch.zeros_like(first)], dim=1)[first >= second]
    problems = torch.cat([additions, subtractions])
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(0))
    return problems[order[:HELD_OUT]], problems[order[HELD_OUT:]]


def as_tokens(problems: Tensor) -> Tensor:
    """Return the lines' tokens, [n, 13], as the tokenizer would give them, computed on all problems at once."""
    first, second, adds = problems.unbind(1)
    answer = torch.where(adds == 1, first + second, first - second)
    zero, sign = len(SPECIAL) + CHARACTERS.index("0"), len(SPECIAL) + CHARACTERS.index("+") + 1 - adds
    digits = [
        number // 10**place % 10 for number, count in ((first, 3), (second, 3), (answer, 4)) for place in range(count)
    ]
    tokens = [zero + digit for digit in digits]
    equals, end = torch.full_like(sign, len(SPECIAL) + CHARACTERS.index("=")), torch.full_like(sign, len(SPECIAL))
    return torch.stack([*tokens[:3], sign, *tokens[3:6], equals, *tokens[6:], end], dim=1)


def batches(problems: Tensor, size: int, steps: int, done: int) -> Iterator[Tensor]:
    """Random problems behind <s>, alone ([4 * size, 14]) or in a row ([size, 53]); the first `done` are passed over."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        chosen = torch.randint(0, len(problems), (size * LINES,), generator=generator)
        if step >= done:
            text = as_tokens(problems[chosen]).view(-1, LINE if step < ALONE * steps else LINES * LINE)
            yield F.pad(text, (1, 0), value=1)  # <s>


def loss_of(model: LlamaForCausalLM, tokens: Tensor) -> tuple[Tensor, float]:
    """(the loss to minimize, the mean loss of an answer's characters)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens[:, :-1]).logits
    losses = F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")  # [batch, characters]
    lines = losses.view(len(tokens), -1, LINE)
    prompt, answer = lines[:, :, :8].mean(), lines[:, :, 8:].mean()
    return answer + PROMPT_WEIGHT * prompt, answer.item()


def optimizer_of(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


def train(problems: Tensor, arguments: argparse.Namespace) -> tuple[LlamaForCausalLM, dict[str, float]]:
    model = LlamaForCausalLM(network_config()).float()
    optimizer = optimizer_of(model, arguments.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.rate, total_steps=arguments.steps, pct_start=0.05
    )
    done, seconds_before, answer_loss = 0, 0.0, float("nan")
    if arguments.state.exists():
        state = torch.load(arguments.state, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done, seconds_before = state["step"], state["seconds"]
    started = time.perf_counter() - seconds_before
    for step, tokens in enumerate(batches(problems, arguments.batch_size, arguments.steps, done), start=done + 1):
        loss, now = loss_of(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        answer_loss = now if math.isnan(answer_loss) else 0.98 * answer_loss + 0.02 * now
        if step % 50 == 0:
            seconds = time.perf_counter() - started
            left = seconds / step * (arguments.steps - step)
            print(
                f"step {step}/{arguments.steps} answer loss {answer_loss:.4f} {seconds:.0f} s, {left:.0f} s left",
                flush=True,
            )
        if step % 250 == 0:
            save_state(arguments.state, model, optimizer, schedule, step, time.perf_counter() - started)
    return model.eval(), {"answer_loss": round(answer_loss, 5), "seconds": round(time.perf_counter() - started)}


def save_state(path: Path, model: Any, optimizer: Any, schedule: Any, step: int, seconds: float) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save({**state, "step": step, "seconds": seconds}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, lines: list[str]) -> float:
    """Return the fraction of lines completed exactly, greedily, by transformers' own generate."""
    right = 0
    for start in range(0, len(lines), 500):
        batch = lines[start : start + 500]
        prompts = tokenizer([line[:8] for line in batch], return_tensors="pt", return_token_type_ids=False)
        texts = tokenizer.batch_decode(model.generate(**prompts, max_new_tokens=5), skip_special_tokens=False)
        right += sum(text == f"<s>{line}" for text, line in zip(texts, batch, strict=True))
    return right / len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--state", type=Path, default=Path("train_arithmetic.state"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    held_out, problems = all_problems()
    lines = [problem_line(a, b, adds == 1) for a, b, adds in held_out.tolist()]
    tokenizer = make_tokenizer()
    assert tokenizer(lines[0])["input_ids"][1:] == as_tokens(held_out[:1])[0].tolist()

    model, numbers = train(problems, arguments)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False, max_new_tokens=5
    )
    accuracy = exact_match(model, tokenizer, lines)

    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "held_out.txt").write_text("".join(lines), encoding="utf-8")
    report = {
        "parameters": model.num_parameters(),
        "held_out_exact_match": accuracy,
        **numbers,
        "steps": arguments.steps,
        "problems_seen": arguments.steps * arguments.batch_size * LINES,
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

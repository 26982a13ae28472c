"""Rebuild this folder from a seed: text -> tokenizer -> Gemma-2, written in a few minutes on one GPU.

    PYTHONPATH=src python assets/tiny-gemma-2/pretrain.py --out build/tiny-gemma-2

The text teaches short English about quantities, and arithmetic in many notations. It never holds the form
that fine-tuning teaches ("Question:", "Answer:", "#### 19", "12 + 7 = 19"), and of the built-in task its
stories tell only computations of the train split, for every variant of the task.
"""

import argparse
import json
import math
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaTokenizer

from chorus.data.arithmetic import NAMES, RANGES, STORIES, THINGS, Story, computations, split_of, tell, work
from chorus.seeding import derive_seed

SPECIAL = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
]  # Gemma's first five ids; its class adds <mask> where missing
SHARDS = 32  # the text is made shard by shard, each from its own seed, whatever the number of workers

# Every part of Gemma-2's architecture at work: half the query heads for keys and values, soft-caps, and in
# every other layer a window of 32 tokens, which is shorter than most problems.
CONFIG = {
    "vocab_size": 1024,
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 32,
    "max_position_embeddings": 1024,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "dtype": "float32",
}

# One step a op b = r in words and signs. "{a} + {b} = {r}" is left for fine-tuning to teach.
NOTATIONS = {
    "+": (
        *(
            "{a} plus {b} is {r}",
            "{a} plus {b} makes {r}",
            "{a} and {b} make {r}",
            "{a} and {b} more are {r}",
        ),
        *(
            "adding {b} to {a} gives {r}",
            "the sum of {a} and {b} is {r}",
            "{a}+{b}={r}",
            "{a} + {b} makes {r}",
        ),
        *("{a} plus {b} = {r}", "{a} + {b} -> {r}", "({a} + {b}) is {r}", "{a} + {b} gives {r}"),
    ),
    "-": (
        *(
            "{a} minus {b} is {r}",
            "{a} minus {b} leaves {r}",
            "{a} less {b} is {r}",
            "taking {b} from {a} leaves {r}",
        ),
        *(
            "{b} fewer than {a} is {r}",
            "the difference of {a} and {b} is {r}",
            "{a}-{b}={r}",
            "{a} - {b} leaves {r}",
        ),
        *("{a} minus {b} = {r}", "{a} - {b} -> {r}", "({a} - {b}) is {r}", "{a} - {b} gives {r}"),
    ),
    "*": (
        *(
            "{a} times {b} is {r}",
            "{a} times {b} makes {r}",
            "{a} groups of {b} are {r}",
            "{a} times {b} gives {r}",
        ),
        *(
            "the product of {a} and {b} is {r}",
            "{a} lots of {b} make {r}",
            "{a}*{b}={r}",
            "{a} * {b} makes {r}",
        ),
        *("{a} times {b} = {r}", "{a} * {b} -> {r}", "({a} * {b}) is {r}", "{a} * {b} gives {r}"),
    ),
}
ENDINGS = (
    "So it is {r}.",
    "The result is {r}.",
    "That makes {r}.",
    "This gives {r} in the end.",
    "{r} it is.",
)
TALK = (
    *(
        "{name} likes {things}, but {other} likes {others} better.",
        "{name} and {other} are counting {things}.",
    ),
    *("Answer the door, {name}!", "Answer me: where are the {things}?"),
    *("That is a good question, said {name}.", "{other} has no answer to that."),
    *("{n} is more than {m}.", "{m} is less than {n}.", "{name} has {n} {things} and {m} {others}."),
    *("Which is more, {m} or {n}? It is {n}.", "{other} counts the {things}: {count} and so on."),
    *("{name} writes the number {n}, then {m}.", "The digits of {n} are {digits}."),
    "Page {n} comes after page {before}.",
    "Every week {name} walks to the market and buys {things} for the whole family.",
    "It rains, so they stay inside.",
    *(
        "There were {n} people in the street, because it was a warm and sunny day.",
        "The red {things} cost a lot.",
    ),
    *("My sister lives near the old school.", "When did {name} come home? It was about {m} minutes ago."),
    *("{name} asked a question, and {other} gave the right answer.", "Question everything, little brother!"),
    *(
        "How much water is in this glass? Only a little.",
        "Please wash the {things} before you eat them, {name}.",
    ),
    *("We saw {m} birds, {n} dogs and one white horse.", "Nobody knows where the small green {things} are."),
    *(
        "Each child may take one of the {things}.",
        "What would {name} do with {n} {things}? Share them with friends.",
    ),
    *(
        "You can put the {things} under the chair or behind the {others}.",
        "Yes, {other} will help us tomorrow.",
    ),
    *("His mother works from {m} until {n}.", "Her father paid {n} dollars for some {things} last year."),
)
HEADINGS = (
    *("# Numbers", "## {things}", "### Notes of {name}", "#### {things} and {others}", "#### Questions"),
    *("#### Answers", "Question everything"),
)
SHARES = {"standard": 70, "larger_numbers": 15, "more_steps": 15}  # percent of the stories

Told = dict[str, list[tuple[Story, list[tuple[int, ...]]]]]  # what may be told of each variant of the task


def step_in_words(step: tuple[int, str, int, int], rng: random.Random) -> str:
    left, operator, right, result = step
    return rng.choice(NOTATIONS[operator]).format(a=left, b=right, r=result)


def trained_computations() -> Told:
    """Each story with the computations of the train split: the other splits are told nowhere."""
    told: Told = {variant: [] for variant in SHARES}
    for variant in SHARES:
        stories = [story for story in STORIES if len(story.operators) in RANGES[variant]]
        for operators in dict.fromkeys(story.operators for story in stories):
            of_all_splits = map(tuple, computations(operators, variant).tolist())
            trained = [numbers for numbers in of_all_splits if split_of(operators, numbers) == "train"]
            told[variant] += [(story, trained) for story in stories if story.operators == operators]
    return told


def story_text(told: Told, rng: random.Random) -> str:
    """A situation, sometimes its question, and the steps in prose or one a line."""
    [variant] = rng.choices(list(SHARES), weights=list(SHARES.values()))
    template, trained = rng.choice(told[variant])
    numbers = rng.choice(trained)
    situation, question = tell(template, numbers, rng)
    steps = work(template.operators, numbers)
    clauses = [step_in_words(step, rng) for step in steps]
    if rng.random() < 0.5:
        worked = rng.choice((", and ", ", then ", ". ", "; ")).join(clauses) + "."
        worked = worked[0].upper() + worked[1:] + " "
    else:
        worked = "".join(f"{clause}\n" for clause in clauses)
    asked = [question] if rng.random() < 0.6 else []
    ending = rng.choice(ENDINGS).format(r=steps[-1][-1])
    return rng.choice((" ", "\n")).join([situation, *asked, worked + ending])


def equations(rng: random.Random) -> str:
    """Plain one-step facts, a few to a text, two thirds of them within 99 and the others within 199."""
    facts = []
    for _ in range(rng.randint(2, 8)):
        operator = rng.choice("++--*")
        top = 99 if rng.random() < 0.67 else 199
        if operator == "*":
            left, right = (rng.randint(1, 12 if top == 99 else 20) for _ in range(2))
        else:
            total, part = sorted((rng.randint(0, top), rng.randint(0, top)), reverse=True)
            left, right = (total, part) if operator == "-" else (total - part, part)
        [step] = work(operator, (left, right))
        facts.append(step_in_words(step, rng))
    return rng.choice((", ", "\n", "; ", ". ")).join(facts) + rng.choice((".", "", "\n"))


def talk(rng: random.Random) -> str:
    """Small talk about names, things and quantities, sometimes under a heading."""
    name, other = rng.sample(NAMES, 2)
    things, others = rng.sample(THINGS, 2)
    lines = []
    for template in rng.choices(TALK, k=rng.randint(1, 4)):
        m, n = sorted(rng.sample(range(1, 200), 2))
        words = {
            "name": name,
            "other": other,
            "things": things,
            "others": others,
            "m": m,
            "n": n,
            "before": n - 1,
        }
        counted = ", ".join(str(m + i) for i in range(4))
        lines.append(template.format(**words, count=counted, digits=", ".join(str(n))))
    if rng.random() < 0.4:
        lines.insert(0, rng.choice(HEADINGS).format(name=name, things=things.title(), others=others) + "\n")
    return rng.choice((" ", "\n")).join(lines)


def documents(seed: int, shard: int, count: int) -> list[str]:
    """`count` texts of one shard: 50 % stories, all of the train split, 30 % equations, 20 % talk."""
    rng = random.Random(derive_seed(seed, "pretraining text", shard))
    kinds = [partial(story_text, trained_computations(), rng), partial(equations, rng), partial(talk, rng)]
    return [make() for make in rng.choices(kinds, weights=(5, 3, 2), k=count)]


def build_tokenizer(texts: list[str], vocab_size: int) -> GemmaTokenizer:
    """Gemma's kind of tokenizer: BPE with byte fallback, a
    space as the "▁" before a word, digits one by one."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    # These cuts serve the training alone: merges that never cross them are all that the finished tokenizer
    # has.
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(r"[0-9]|\n|▁?\p{L}+|▁?[^\p{L}0-9\n▁]+|▁"), "isolated")
    alphabet = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - 256,
        initial_alphabet=alphabet,
        show_progress=False,
        min_frequency=2,
    )
    trained.train_from_iterator(texts, trainer)
    learnt = json.loads(trained.to_str())["model"]
    pieces = sorted(learnt["vocab"], key=learnt["vocab"].get)
    vocab = {
        token: i for i, token in enumerate([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces])
    }
    return GemmaTokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in learnt["merges"]],
        model_max_length=CONFIG["max_position_embeddings"],
        add_bos_token=True,
    )


def encode_shard(tokenizer: GemmaTokenizer, seed: int, count: int, shard: int) -> np.ndarray:
    """The texts of one shard as one stream of token ids, each text between <bos> and <eos>."""
    rows = tokenizer(documents(seed, shard, count))["input_ids"]
    return np.array([token for row in rows for token in (*row, tokenizer.eos_token_id)], dtype=np.uint16)


def train(
    model: Gemma2ForCausalLM, rows_NT: torch.Tensor, steps: int, batch_size: int, lr: float, seed: int
) -> None:
    """Next-token training by AdamW, each epoch in a new order;
    warm-up over 5 % of the steps, then cosine to 0."""
    device = model.device
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},  # the norms
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    forward = torch.compile(model) if device.type == "cuda" else model
    generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
    epochs = math.ceil(steps * batch_size / len(rows_NT))
    order = torch.cat([torch.randperm(len(rows_NT), generator=generator) for _ in range(epochs)]).split(
        batch_size
    )
    started = time.perf_counter()
    for step in range(steps):
        rows_BT = rows_NT[order[step]].to(device, torch.long)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = forward(input_ids=rows_BT, labels=rows_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            print(
                f"step {step}: loss {loss.item():.4f} nats, {time.perf_counter() - started:.0f} s", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", type=int, default=1_500_000)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=256, help="rows a step")
    parser.add_argument("--row-length", type=int, default=256, help="tokens a row")
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes below are the parallelism

    tokenizer = build_tokenizer(documents(args.seed, SHARDS, 50_000), CONFIG["vocab_size"])
    assert len(tokenizer) == CONFIG["vocab_size"], len(tokenizer)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        shards = pool.map(
            partial(encode_shard, tokenizer, args.seed, math.ceil(args.texts / SHARDS)), range(SHARDS)
        )
        tokens = np.concatenate(list(shards))
    whole_rows = len(tokens) // args.row_length
    rows_NT = torch.from_numpy(tokens[: whole_rows * args.row_length].astype(np.int16)).view(whole_rows, -1)
    print(f"{args.texts} texts, {rows_NT.numel()} tokens", flush=True)

    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(args.seed, "weights"))
        model = Gemma2ForCausalLM(Gemma2Config(**CONFIG, attn_implementation="eager"))
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    train(model, rows_NT, args.steps, args.batch_size, args.lr, args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()

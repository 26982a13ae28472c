"""The bundled base: what its folder promises, read through the ordinary loaders."""

import importlib.util
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2ForCausalLM

from chorus.data.arithmetic import STORIES, Story, problems, split_of

FOLDER = Path(__file__).parents[2] / "assets" / "tiny-gemma-2"

TEXTS = [
    *(
        "Question: Rosa had 11 nuts.\nAnswer: 11 - 8 = 3\n#### 3",
        "",
        " ",
        "  two  spaces \n\n",
        "\ttab\r\n",
        "007 12.50",
    ),
    *(
        "Straße, naïve, 漢字, العربية, नमस्ते",
        "🙂👩‍👩‍👧 \U0001f9ec",
        "e\u0301 \u00e9 \u200b \ufeff \u00a0",
        "\x00\x1f\x7f",
    ),
    *("<0x41> <pad", "#include <a>", "_ __ ~`^"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="eager")


def test_the_model_is_a_gemma_2_with_every_part_of_its_architecture(model):
    config = model.config
    assert type(model) is Gemma2ForCausalLM
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert config.sliding_window == 32
    assert config.num_attention_heads == 2 * config.num_key_value_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not (FOLDER / "modeling.py").exists()
    assert not hasattr(config, "auto_map")


def test_the_weights_are_float32_and_finite_and_the_vocabulary_is_the_tokenizers(model, tokenizer):
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.config.vocab_size == len(tokenizer) == 1024
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        assert (
            getattr(model.config, name) == getattr(model.generation_config, name) == getattr(tokenizer, name)
        )


def test_the_window_reaches_the_scores_of_a_problem(model, tokenizer):
    """A problem is longer than the window: a sliding layer that attends everywhere gives other logits."""
    [row] = problems("test", 1, 0, "more_steps")
    ids = tokenizer(f"{row['question']} {row['answer']}", return_tensors="pt").input_ids
    wide = AutoModelForCausalLM.from_pretrained(
        FOLDER, attn_implementation="eager", sliding_window=ids.shape[1]
    )
    with torch.no_grad():
        narrow_BTV, wide_BTV = model(ids).logits, wide(ids).logits
    torch.testing.assert_close(narrow_BTV[:, :32], wide_BTV[:, :32])
    assert (narrow_BTV[:, 32:] - wide_BTV[:, 32:]).abs().max() > 0.1


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir() if file.is_file()) <= 6 * 2**20


def test_any_text_comes_back_exactly(tokenizer):
    rng = random.Random(0)
    planes = [range(0x20, 0x7F), range(0x20, 0x2581), range(0x2582, 0xD800), range(0xE000, 0x110000)]
    noise = ["".join(chr(rng.choice(rng.choice(planes))) for _ in range(40)) for _ in range(200)]
    for text in [*TEXTS, *noise]:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_digit_is_a_token_of_its_own(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    digits = [
        piece for piece in pieces if re.search(r"\d", piece) and not re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
    ]
    assert sorted(digits) == list("0123456789")
    assert tokenizer.tokenize("x1234 = 99") == ["x", "1", "2", "3", "4", "▁=", "▁", "9", "9"]


def test_offsets_point_at_the_characters_of_each_token(tokenizer):
    for text in TEXTS:
        encoded = tokenizer(text, return_offsets_mapping=True)
        spans = encoded.offset_mapping[1:]
        for token, (start, end) in zip(encoded.tokens()[1:], spans, strict=True):
            in_bytes = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            if in_bytes:  # a character outside the vocabulary: each of its bytes points at all of it
                assert int(in_bytes[1], 16) in text[start:end].encode()
            else:
                assert token.replace("▁", " ") == text[start:end]
        assert "".join(text[start:end] for start, end in dict.fromkeys(spans)) == text


def test_the_prompt_and_its_answer_are_cut_between_two_tokens(tokenizer):
    for row in problems("train", 50, 0):
        prompt = f"Question: {row['question']}\nAnswer:"
        assert tokenizer(f"{prompt} {row['answer']}").input_ids[: len(tokenizer(prompt).input_ids)] == (
            tokenizer(prompt).input_ids
        )


def test_bos_comes_first_by_itself_and_padding_goes_left(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<eos>", "<bos>", "<unk>"]
    batch = tokenizer(["Ada has 3 apples.", "Ada"], padding=True)
    assert batch.input_ids[0][0] == tokenizer.bos_token_id
    assert batch.input_ids[1][-2:] == [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("Ada")]
    assert batch.attention_mask[1] == [0] * (len(batch.input_ids[0]) - 2) + [1, 1]
    assert tokenizer("Ada", add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids("Ada")]


def greedy(model, tokenizer, prompts: list[str], max_new_tokens: int) -> list[str]:
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def test_it_can_add_and_subtract_in_the_notations_it_was_taught(model, tokenizer):
    facts = {
        "12+7=19, 40-15=": "25",
        "12 plus 7 makes": " 19",
        "64 minus 30 leaves": " 34",
        "6 times 7 is": " 42",
    }
    for prompt, said in zip(facts, greedy(model, tokenizer, list(facts), 4), strict=True):
        assert re.match(r" ?\d+", said)[0] == facts[prompt], prompt


def test_without_fine_tuning_it_solves_nothing(model, tokenizer):
    rows = problems("test", 48, 0)
    said = greedy(model, tokenizer, [f"Question: {row['question']}\nAnswer:" for row in rows], 32)
    right = [f"#### {row['answer'].split('#### ')[1]}" in text for row, text in zip(rows, said, strict=True)]
    assert sum(right) <= 2


@pytest.fixture(scope="module")
def pretraining_texts() -> list[str]:
    spec = importlib.util.spec_from_file_location("pretrain", FOLDER / "pretrain.py")
    pretrain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrain)
    return pretrain.documents(seed=0, shard=0, count=5000)


def test_the_pretraining_text_never_holds_the_form_that_fine_tuning_teaches(pretraining_texts):
    form = re.compile(r"Question:|Answer:|#### ?\d|\d [-+*] \d+ = ")
    assert form.search("Answer: 12 + 7 = 19\n#### 19")
    assert not [text for text in pretraining_texts if form.search(text)]


def test_the_pretraining_stories_tell_computations_of_the_train_split_only(pretraining_texts):
    def pattern_of(story: Story) -> re.Pattern[str]:
        words = re.sub(r"\\\{([a-d])\\\}", r"(?P<\1>\\d+)", re.escape(story.situation))
        return re.compile(re.sub(r"\\\{\w+\\\}", r"\\w+", words))

    patterns = [(story.operators, pattern_of(story)) for story in STORIES]
    told = []
    for text in pretraining_texts:
        matches = [(match.end(), operators, match) for operators, p in patterns if (match := p.match(text))]
        if matches:  # one story can begin as another: the longest is the one told
            _, operators, match = max(matches)
            told.append(
                split_of(operators, tuple(int(match[letter]) for letter in "abcd"[: len(operators) + 1]))
            )
    assert len(told) > 2000
    assert set(told) == {"train"}

"""Generated texts, against a plain loop over the whole forward and against all texts there are."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hsplitlora_flwr.data.collate import tokenize
from hsplitlora_flwr.data.sources import Example
from hsplitlora_flwr.evaluation.generation import GENERATED_FILE, generate, generate_and_score
from tests.tiny import CONFIGS, tiny_model

BOS, EOS, VOCABULARY = 1, 2, 97
PROMPTS = ["w10\n", "w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21 w22", "w30 w31 w32", "w40 w41 w42 w43 w44 w45 w46 w47"]


def word_tokenizer(template: str = "<s> $A") -> Any:
    """Word ``wN`` has id N; the template says which special tokens stand around a text."""
    words = {f"w{number}": number for number in range(3, VOCABULARY)}
    core = Tokenizer(WordLevel({"<unk>": 0, "<s>": BOS, "</s>": EOS, **words}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def prompt_ids(prompt: str) -> list[int]:
    return [BOS, *(int(word[1:]) for word in prompt.split())]


def lively_model(name: str, dtype: torch.dtype = torch.float64, eos_scale: float = 1.0) -> PreTrainedModel:
    """A random model with weights so large that its next token depends on the text before it; EOS by ``eos_scale``."""
    model, generator = tiny_model(name, dtype=dtype), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.25, generator=generator)
    head: Any = model.get_output_embeddings()
    head.weight.data[EOS] *= eos_scale
    return model


@torch.no_grad()
def log_p(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """Of the token after each row of ids, all of one length: from the whole forward, without a cache or padding."""
    logits: Tensor = model(input_ids=torch.tensor(rows), use_cache=False).logits
    return logits[:, -1].log_softmax(-1)


def greedy_ids(model: PreTrainedModel, prompt: str, longest: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < longest and EOS not in ids:
        ids.append(int(log_p(model, [prompt_ids(prompt) + ids]).argmax()))
    return ids


def text_of(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids if token > EOS)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float64) for name in CONFIGS), ("gemma2", torch.float32)], ids=str
)
def test_greedy_text_is_the_argmax_of_the_whole_forward_in_any_batch(name: str, dtype: torch.dtype) -> None:
    model, tokenizer = lively_model(name, dtype), word_tokenizer()
    expected = [text_of(greedy_ids(model, prompt, 10)) for prompt in PROMPTS]
    assert len({*expected}) > 1
    for batch_size in (1, 3, 4):
        assert generate(model, tokenizer, PROMPTS, batch_size=batch_size, max_new_tokens=10) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3_text"])
def test_beam_search_does_not_depend_on_the_batch(name: str) -> None:
    model, tokenizer = lively_model(name), word_tokenizer()
    together = generate(model, tokenizer, PROMPTS, batch_size=4, max_new_tokens=6, beams=3)
    alone = [generate(model, tokenizer, [prompt], batch_size=1, max_new_tokens=6, beams=3)[0] for prompt in PROMPTS]
    assert together == alone
    assert together != generate(model, tokenizer, PROMPTS, batch_size=4, max_new_tokens=6)


@pytest.mark.parametrize("eos_scale", [1.0, 20.0])
def test_as_many_beams_as_tokens_find_the_best_of_all_texts(eos_scale: float) -> None:
    model, tokenizer = lively_model("llama", eos_scale=eos_scale), word_tokenizer()
    lengths = set()
    for prompt in PROMPTS:
        ids = prompt_ids(prompt)
        [first] = log_p(model, [ids])
        second = log_p(model, [[*ids, token] for token in range(VOCABULARY)])
        means: dict[tuple[int, ...], float] = {(EOS,): float(first[EOS])}
        for token, last in itertools.product(set(range(VOCABULARY)) - {EOS}, range(VOCABULARY)):
            means[token, last] = float(first[token] + second[token, last]) / 2
        best = max(means, key=lambda text: means[text])
        lengths.add(len(best))
        written = generate(model, tokenizer, [prompt], batch_size=1, max_new_tokens=2, beams=VOCABULARY)
        assert written == [text_of([*best])]
    assert (2 if eos_scale == 1.0 else 1) in lengths


def test_eos_ends_a_text_and_leaves_the_others_of_the_batch_going() -> None:
    model, tokenizer = lively_model("llama", eos_scale=2.0), word_tokenizer()
    prompts = [f"w{number} w{number + 1}" for number in range(3, 15)]
    ids = [greedy_ids(model, prompt, 8) for prompt in prompts]
    ended = [EOS in row for row in ids]
    assert any(ended) and not all(ended)
    assert len({len(row) for row in ids}) > 2
    assert generate(model, tokenizer, prompts, batch_size=6, max_new_tokens=8) == list(map(text_of, ids))


def test_the_settings_that_a_model_brings_do_not_count_and_come_back() -> None:
    model, tokenizer = lively_model("llama"), word_tokenizer()
    expected = generate(model, tokenizer, PROMPTS, batch_size=4, max_new_tokens=12)
    own = model.generation_config
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1}
    for name, value in {**settings, "num_beams": 4, "eos_token_id": [*range(3, 60)], "max_length": 15}.items():
        setattr(own, name, value)
    model.train()
    assert generate(model, tokenizer, PROMPTS, batch_size=4, max_new_tokens=12) == expected
    assert model.generation_config is own and own.do_sample


@pytest.mark.parametrize("template", ["<s> $A", "$A", "<s> $A </s>"])
def test_a_prompt_has_its_ids_of_training(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = lively_model("llama"), word_tokenizer(template)
    seen: list[list[int]] = []
    forward = model.forward

    def record(*args: Any, **inputs: Any) -> Any:
        seen.extend(inputs["input_ids"].tolist())
        return forward(*args, **inputs)

    monkeypatch.setattr(model, "forward", record)
    long = " ".join(f"w{number}" for number in range(10, 90))
    for prompt, trained in [(PROMPTS[2], 64), (long, 61)]:  # of 64 positions, 4 are for the text
        seen.clear()
        generate(model, tokenizer, [prompt], batch_size=1, max_new_tokens=4)
        [row] = tokenize([Example(prompt, "", "")], tokenizer, trained)
        assert seen[0] == row.input_ids[: row.masked]
    start = [BOS] if template.startswith("<s>") else []
    assert seen[0] == [*start, *range(90 - 60 + len(start), 90)]


def test_bad_input_is_named() -> None:
    model, tokenizer = lively_model("llama"), word_tokenizer()
    with pytest.raises(ValueError, match=r"prompt 1 is empty"):
        generate(model, tokenizer, ["w10", ""], batch_size=1, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"max_new_tokens=64 leaves no room .* 64 positions"):
        generate(model, tokenizer, ["w10"], batch_size=1, max_new_tokens=64)
    with pytest.raises(ValueError, match=r"beams=0; it must be at least 1"):
        generate(model, tokenizer, ["w10"], batch_size=1, max_new_tokens=4, beams=0)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-sequence token"):
        generate(model, tokenizer, ["w10"], batch_size=1, max_new_tokens=4)


def test_rows_with_one_prompt_are_the_references_of_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("PATH", "")  # no Java: METEOR takes long to start
    model, tokenizer = lively_model("llama"), word_tokenizer()
    first, second = generate(model, tokenizer, PROMPTS[:2], batch_size=2, max_new_tokens=8)
    pairs = [(PROMPTS[0], "w3 w4 w5"), (PROMPTS[1], second), (PROMPTS[0], first)]
    rows = [Example(prompt, completion, "") for prompt, completion in pairs]
    scores = generate_and_score(model, tokenizer, rows, tmp_path, batch_size=2, max_new_tokens=8)
    # Every text is one of its own references.
    assert scores["bleu"] == pytest.approx(100) and scores["rouge_l"] == pytest.approx(100)
    assert scores["meteor"] is None
    lines = (tmp_path / GENERATED_FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": PROMPTS[0], "text": first, "references": ["w3 w4 w5", first]},
        {"prompt": PROMPTS[1], "text": second, "references": [second]},
    ]

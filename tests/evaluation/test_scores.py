"""Scores of texts, against the scripts of the E2E NLG challenge and against formulas written out here."""

from __future__ import annotations

import logging
import math
import shutil
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsplitlora_flwr.evaluation import scores as text_scores
from hsplitlora_flwr.evaluation.scores import check_installed, nist, score_texts

TEXTS = [
    "The Lantern is a cheap, child-friendly café by the river.",
    "Near the station, Old Mill serves Thai food.",
    "Bean & Leaf has a rating of 4.5 out of 5!",
]
REFERENCES = [
    [
        "The Lantern is a cheap café near the river that welcomes children.",
        "A cheap, child-friendly café by the river is The Lantern.",
        "By the river you can find The Lantern, a cheap cafe.",
    ],
    ["Old Mill is a Thai restaurant near the station."],
    ["Bean & Leaf is rated 4.5 out of 5.", "With a rating of 4.5 out of 5, Bean & Leaf is popular."],
]
# What metrics/pymteval.py of tuetschek/e2e-metrics (BLEU, NIST) and the rest of its scripts, the MS-COCO evaluation
# with its tokenizer in Java, give for these texts.
OFFICIAL = {
    "bleu": 61.73732773855043,
    "nist": 4.858159787205397,
    "meteor": 47.40736263172958,
    "rouge_l": 59.996279179771925,
    "cider": 4.382607610947074,
}


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR takes ten seconds to start."""
    monkeypatch.setenv("PATH", "")


@pytest.fixture
def scorers() -> None:
    """The packages of the extra."""
    pytest.importorskip("sacrebleu")
    pytest.importorskip("pycocoevalcap")


# NIST


def direct_nist(texts: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """The definition read off the paper, one n-gram at a time, on words that hold no space."""

    def runs(tokens: Sequence[str], n: int) -> list[str]:
        return [" ".join(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]

    everything = [tokens for group in references for tokens in group]
    score = 0.0
    for n in range(1, 6):
        information, grams = 0.0, 0
        for text, group in zip(texts, references, strict=True):
            grams += len(runs(text, n))
            for gram in set(runs(text, n)):
                times = min(runs(text, n).count(gram), max(runs(tokens, n).count(gram) for tokens in group))
                if times:
                    whole = sum(runs(tokens, n).count(gram) for tokens in everything)
                    start = gram.rpartition(" ")[0]
                    before = sum(runs(tokens, n - 1).count(start) if start else len(tokens) for tokens in everything)
                    information += times * (math.log2(before) - math.log2(whole))
        score += information / grams if grams else 0.0
    written = sum(map(len, texts))
    asked = sum(sum(map(len, group)) / len(group) for group in references)
    if written >= asked:
        return score
    beta = math.log(0.5) / math.log(2 / 3) ** 2
    return score * math.exp(beta * math.log(written / asked) ** 2) if written else 0.0


sentences = st.lists(st.sampled_from("abcd"), max_size=9)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(sentences, st.lists(sentences.filter(bool), min_size=1, max_size=4)), min_size=1, max_size=4))
def test_nist_is_the_definition(pairs: list[tuple[list[str], list[list[str]]]]) -> None:
    texts, references = zip(*pairs, strict=True)
    assert nist(texts, references) == pytest.approx(direct_nist(texts, references), rel=1e-12, abs=1e-12)


def test_nist_by_hand() -> None:
    references = [[["the", "cat", "sat"], ["a", "cat", "sat"]]]
    # Six words: "the" 1, "cat" 2, "sat" 2. "the cat": 1 of 1 "the"; "cat sat": 2 of 2 "cat"; "the cat sat": 1 of 1.
    words = (math.log2(6) + 2 * math.log2(3)) / 3
    assert nist([["the", "cat", "sat"]], references) == pytest.approx(words)
    # Two words where three are asked for: half.
    assert nist([["the", "cat"]], references) == pytest.approx((math.log2(6) + math.log2(3)) / 2 / 2)
    assert nist([[]], references) == 0.0


# all scores


@pytest.mark.usefixtures("scorers", "no_java")
def test_scores_are_those_of_the_scripts_of_the_challenge() -> None:
    expected = {**{name: pytest.approx(score, rel=1e-12) for name, score in OFFICIAL.items()}, "meteor": None}
    assert score_texts(TEXTS, REFERENCES) == expected
    # Case does not count, nor does the order of texts and references.
    shuffled = [[text.upper() for text in reversed(group)] for group in reversed(REFERENCES)]
    assert score_texts([text.upper() for text in reversed(TEXTS)], shuffled) == expected


@pytest.mark.usefixtures("scorers")
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")
def test_meteor_is_that_of_the_program() -> None:
    before = set(psutil.Process().children())
    assert score_texts(TEXTS, REFERENCES)["meteor"] == pytest.approx(OFFICIAL["meteor"], rel=1e-12)
    assert set(psutil.Process().children()) <= before  # the program has ended


@pytest.mark.usefixtures("scorers", "no_java")
def test_rouge_l_takes_the_best_precision_and_the_best_recall() -> None:
    # Longest common subsequences of 2 and 3 words: precision 3/4, recall 2/2, and beta is 1.2.
    scores = score_texts(["old mill, serves food", "bean"], [["Old Mill", "old tea serves no food!"], ["bean"]])
    first = (1 + 1.44) * (3 / 4) * 1 / (1 + 1.44 * 3 / 4)
    assert scores["rouge_l"] == pytest.approx(100 * (first + 1) / 2)


@pytest.mark.usefixtures("scorers", "no_java")
def test_texts_that_repeat_their_reference_have_the_best_scores_and_empty_ones_none() -> None:
    texts = ["the old mill serves thai food", "bean and leaf is a popular place"]
    best = score_texts(texts, [[text] for text in texts])
    assert best == {**best, "bleu": pytest.approx(100), "rouge_l": pytest.approx(100), "cider": pytest.approx(10)}
    assert score_texts(["", ""], [[text] for text in texts]) == {
        "bleu": 0, "nist": 0, "meteor": None, "rouge_l": 0, "cider": 0,
    }  # fmt: skip


@pytest.mark.usefixtures("scorers")
def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="2 texts and 1 lists of references"):
        score_texts(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match=r"text 1 \('b'\) has no reference"):
        score_texts(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="no reference holds a word"):
        score_texts(["a"], [["...", "?!"]])


@pytest.mark.parametrize("package", ["sacrebleu", "pycocoevalcap"])
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sacrebleu", "pycocoevalcap"):
        if name != package:
            pytest.importorskip(name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs the package {package}: pip install .*\[generation\]"):
        check_installed()


# METEOR, with a program in place of Java that answers at once


def put_java(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    java = folder / "java"
    java.write_text(f"#!{sys.executable}\n{program}", encoding="utf-8")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))


COUNTING = """
import sys
for line in sys.stdin.buffer:
    kind, *parts = line.decode().rstrip("\\n").split(" ||| ")
    if kind == "SCORE":
        print(len(parts), flush=True)
    else:
        print(*parts, sum(map(int, parts)) / 100, sep="\\n", flush=True)
"""


@pytest.mark.usefixtures("scorers")
def test_no_text_is_taken_for_a_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_java(tmp_path, monkeypatch, COUNTING)
    odd = ["a ||| b", "a\nb", "a\r\nb", "|||", "a\u2028b\u0085c", "", "\ud83d", "SCORE ||| EVAL", "café £5"]
    # Every line has the references and the text: 2 + 1 parts of each of the nine.
    scores = score_texts(odd, [["x ||| y", "EVAL\n||| z"]] * len(odd))
    assert scores["meteor"] == pytest.approx(3 * len(odd))


@pytest.mark.usefixtures("scorers")
@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('Error: file not found (paraphrase-en.gz)')", "Error: file not found"),
        ("import sys; sys.exit()", "before it gave a score"),
        ("import os, sys; sys.stdin.readline(); os.close(0); print('1 2 3')", "before it gave a score"),
        (
            "import sys; sys.stdin.readline(); print('1 2 3', flush=True); sys.stdin.readline()",
            "before it gave a score",
        ),
        ("import sys; [print('1 2 3', flush=True) for _ in sys.stdin]", "before it gave a score"),
        (
            "import sys; [print(*('xxxx' if line[0] == 'E' else 'x'), sep='\\n', flush=True) for line in sys.stdin]",
            "'x'",
        ),
    ],
)
def test_a_program_that_fails_is_no_score_and_the_log_says_why(
    program: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_java(tmp_path, monkeypatch, program)
    before = set(psutil.Process().children())
    with caplog.at_level(logging.WARNING, text_scores.__name__):
        scores = score_texts(TEXTS, REFERENCES)
    assert scores["meteor"] is None and scores["bleu"] == pytest.approx(OFFICIAL["bleu"])
    assert "METEOR is not computed" in caplog.text and said in caplog.text
    assert set(psutil.Process().children()) <= before  # the program has ended

"""How near generated texts are to what people wrote: BLEU, NIST, METEOR, ROUGE-L and CIDEr.

These are the scores of the E2E NLG challenge (https://aclanthology.org/W18-6539) with the definitions of its scripts,
https://github.com/tuetschek/e2e-metrics. All of them compare without case and take any number of references per text.

BLEU and NIST count the tokens of mteval-v13a, and equal those of the scripts. The other three leave punctuation out.
There the scripts take a tokenizer written in Java, which also splits "it's" and "£20"; here too the tokens are those of
mteval-v13a, so that no score depends on an installed Java. On texts of the challenge ROUGE-L, CIDEr and METEOR differ
from those of the scripts by less than one percent.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import math
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

Tokens = Sequence[str]

logger = logging.getLogger(__name__)

_PUNCTUATION = "\"'`(){}.?!,:;-"
"""What the scripts leave out: tokens of these characters alone."""


def check_installed() -> None:
    """Make sure that texts can be scored, before time is spent on writing them.

    Raises
    ------
    ModuleNotFoundError
        If a package of the extra ``generation`` is missing.
    """
    for name in ("sacrebleu", "pycocoevalcap"):
        _load(name)


def score_texts(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """Score texts, all together, against their references.

    Parameters
    ----------
    hypotheses : Sequence[str]
        The generated texts; one may be empty.
    references : Sequence[Sequence[str]]
        For each of them one or more texts that people wrote; their number may differ.

    Returns
    -------
    dict[str, float | None]
        ``bleu``, ``rouge_l`` and ``meteor`` in percent, ``nist`` in bits, ``cider`` between 0 and 10 (0 for a single
        text, since its words are weighed by how few texts hold them). ``meteor`` is None, that is not computed, where
        there is no Java or METEOR 1.5 does not run; the log then says why.

    Raises
    ------
    ModuleNotFoundError
        If a package of the extra ``generation`` is missing.
    ValueError
        If there is no text, a text has no reference, or no reference holds a word.
    """
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} texts and {len(references)} lists of references; give one list a text")
    for index, group in enumerate(references):
        if not group:
            raise ValueError(f"text {index} ({hypotheses[index][:40]!r}) has no reference; give one or leave it out")
    sacrebleu = _load("sacrebleu")
    tokenize = _load("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()

    def tokens(text: str) -> list[str]:
        words: list[str] = tokenize(text.lower()).split()
        return words

    texts = [tokens(text) for text in hypotheses]
    groups = [[tokens(text) for text in group] for group in references]
    text_words = [_words(text) for text in texts]
    group_words = [[_words(reference) for reference in group] for group in groups]
    if not any(itertools.chain.from_iterable(group_words)):
        raise ValueError("no reference holds a word; give references that are text")
    # sacrebleu takes the first reference of every text, then the second, ...; None where there is none.
    streams = [list(stream) for stream in itertools.zip_longest(*references)]
    # pycocoevalcap takes one list of one text, and one list of references, under every key.
    candidates = {index: [text] for index, text in enumerate(text_words)}
    targets = dict(enumerate(group_words))
    rouge, _ = _load("pycocoevalcap.rouge.rouge").Rouge().compute_score(targets, candidates)
    cider, _ = _load("pycocoevalcap.cider.cider").Cider().compute_score(targets, candidates)
    meteor = _meteor(text_words, group_words)
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(hypotheses), streams, lowercase=True).score),
        "nist": nist(texts, groups),
        "meteor": None if meteor is None else 100 * meteor,
        "rouge_l": 100 * float(rouge),
        "cider": float(cider),
    }


def nist(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], order: int = 5) -> float:
    """NIST: the mean information in bits of the n-grams that a text shares with its references, summed over n.

    An n-gram ``w_1 .. w_n`` of all references together holds ``log2(count(w_1 .. w_{n-1}) / count(w_1 .. w_n))``, a
    word the log of all words over its count. A text gets the information of an n-gram as many times as the reference
    that has it most. Texts that are shorter than their references on the average are penalised, by half at two thirds
    of the length. G. Doddington, Automatic evaluation of machine translation quality using n-gram co-occurrence
    statistics, HLT 2002, as mteval-v13a computes it; where texts have different numbers of references, the length that
    is aimed at is the sum over texts of the mean length of their references, as in the Python part of e2e-metrics.

    Parameters
    ----------
    hypotheses : Sequence[Tokens]
        The tokens of every text.
    references : Sequence[Sequence[Tokens]]
        The tokens of each of its references.
    order : int
        The longest n-gram.
    """
    counts = Counter(gram for group in references for tokens in group for gram in _ngrams(tokens, order))
    counts[()] = sum(len(tokens) for group in references for tokens in group)
    shared, total = [0.0] * order, [0] * order
    for text, group in zip(hypotheses, references, strict=True):
        most: Counter[tuple[str, ...]] = Counter()
        for tokens in group:
            most |= Counter(_ngrams(tokens, order))
        grams = Counter(_ngrams(text, order))
        for gram, count in grams.items():
            total[len(gram) - 1] += count
        for gram, count in (grams & most).items():
            shared[len(gram) - 1] += count * math.log2(counts[gram[:-1]] / counts[gram])
    length = sum(map(len, hypotheses))
    target = sum(sum(map(len, group)) / len(group) for group in references)
    if not length or not target:
        return 0.0
    shortage = math.log(min(1.0, length / target)) / math.log(1.5)
    information = sum(bits / max(count, 1) for bits, count in zip(shared, total, strict=True))
    return information * math.exp2(-(shortage**2))


def _ngrams(tokens: Tokens, order: int) -> Iterator[tuple[str, ...]]:
    """Every run of 1 to ``order`` tokens."""
    return (tuple(tokens[at : at + n]) for n in range(1, order + 1) for at in range(len(tokens) - n + 1))


def _words(tokens: Tokens) -> str:
    return " ".join(token for token in tokens if token.strip(_PUNCTUATION))


def _meteor(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float | None:
    """METEOR 1.5 (https://aclanthology.org/W14-3348) between 0 and 1, or None where it cannot be computed.

    The program reads a line a text, ``SCORE ||| reference ||| ... ||| text``, and answers with its statistics; a line
    ``EVAL ||| statistics ||| ...`` it answers with the score of each and then of all together. The bar of tokens
    stands alone and they hold no line end, so no text can be taken for a part of a line.
    """
    java = shutil.which("java")
    if java is None:
        logger.warning("METEOR is not computed: there is no java on PATH")
        return None
    jar = Path(next(iter(_load("pycocoevalcap").__path__))) / "meteor" / "meteor-1.5.jar"
    # The program reads and writes numbers in the way of the machine's language, and some put a comma for the point.
    options = ["-Xmx2G", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US"]
    command = [java, *options, "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors) as meteor,
    ):
        try:
            return _ask_meteor(meteor, texts, references)
        except (OSError, ValueError) as error:
            meteor.kill()
            meteor.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip() or str(error)
            logger.warning("METEOR is not computed: %s", said.splitlines()[0])
            return None
        finally:
            meteor.kill()


def _ask_meteor(meteor: subprocess.Popen[bytes], texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """What the program answers; an OSError where it has ended, a ValueError where the answer is no number."""
    assert meteor.stdin is not None and meteor.stdout is not None
    silent = OSError("the program ended before it gave a score")
    try:
        with meteor.stdin as questions, meteor.stdout as answers:

            def ask(*parts: str) -> str:
                questions.write((" ||| ".join(parts) + "\n").encode(errors="replace"))
                questions.flush()
                if line := answers.readline().decode().strip():
                    return line
                raise silent

            statistics = [ask("SCORE", *group, text) for text, group in zip(texts, references, strict=True)]
            ask("EVAL", *statistics)
            questions.close()
            scores = answers.read().decode().split()
    except BrokenPipeError:  # it does not read any more
        raise silent from None
    if len(scores) != len(texts):  # and the one before
        raise silent
    return float(scores[-1])


def _load(module: str) -> ModuleType:
    """A module of the extra ``generation``, which a plain installation does not have."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"scoring texts needs the package {error.name}: pip install 'hsplitlora_flwr[generation]'", name=error.name
        ) from error

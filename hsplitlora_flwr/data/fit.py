"""Text as the model of a run takes it: tokens that its embeddings and positions hold, and what had to be cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from hsplitlora_flwr.config import Config, ConfigError
from hsplitlora_flwr.data.collate import Tokens, tokenize
from hsplitlora_flwr.data.sources import DataError, Example
from hsplitlora_flwr.models.configuration import read_config
from hsplitlora_flwr.models.loading import load_tokenizer


@dataclass(frozen=True)
class Cut:
    """What of some rows did not fit into ``data.max_length`` tokens.

    Parameters
    ----------
    rows, tokens : int
        How many there are, and their tokens before any were cut.
    cut_rows, cut_tokens : int
        How many of the rows were cut, and how many of the tokens that cost.
    """

    rows: int = 0
    tokens: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0

    @classmethod
    def of(cls, rows: Iterable[Tokens]) -> Cut:
        """Of these."""
        rows = list(rows)
        cut = [row.cut for row in rows if row.cut]
        return cls(len(rows), sum(map(len, rows)) + sum(cut), len(cut), sum(cut))

    @classmethod
    def total(cls, parts: Iterable[Cut]) -> Cut:
        """Of several parts together."""
        counts = [(part.rows, part.tokens, part.cut_rows, part.cut_tokens) for part in parts]
        return cls(*map(sum, zip(*counts, strict=True)))

    @property
    def share(self) -> float:
        """Of the tokens, those that were cut."""
        return self.cut_tokens / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        return f"{self.cut_rows} of {self.rows} rows, {self.share:.1%} of the tokens"


def fit_text(examples: Sequence[Example], config: Config) -> list[Tokens]:
    """The tokens of every example, as :func:`hsplitlora_flwr.data.collate.tokenize` makes them for the model of a run.

    Raises
    ------
    ConfigError
        If rows may be longer than the model has positions.
    DataError
        If a token has no embedding, an example no token that can be predicted, or the tokenizer no EOS.
    ModelFilesError
        If there is no configuration or tokenizer.
    """
    check_positions(config)
    path = config.model.path
    tokenizer, embeddings = load_tokenizer(path), int(read_config(path).get_text_config().vocab_size)
    rows = tokenize(examples, tokenizer, config.data.max_length)
    for index, row in enumerate(rows):
        if (highest := max(row.ids)) >= embeddings:
            raise DataError(
                f"token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) of example {index} is beyond the "
                f"{embeddings} embeddings of {path}; resize them in the model (resize_token_embeddings, then "
                "save_pretrained), or take the token out of the tokenizer or the data"
            )
    return rows


def check_positions(config: Config) -> None:
    """Raise :class:`ConfigError` if a row may have more tokens than the model has positions.

    That is so where they are learnt or lie in a table; rotary ones are computed as they come.
    """
    model, longest = read_config(config.model.path).get_text_config(), config.data.max_length
    positions = _positions(model)
    if positions is not None and longest > positions and not _is_rotary(model):
        raise ConfigError(
            f"data.max_length={longest} is above the {positions} positions of {config.model.path}; "
            f"set it to {positions} or less"
        )


def beyond_training(config: Config) -> str:
    """A warning where rows may have more tokens than a model with rotary positions was trained on; empty where not."""
    model, longest = read_config(config.model.path).get_text_config(), config.data.max_length
    positions = _positions(model)
    if positions is None or longest <= positions or not _is_rotary(model):
        return ""
    return (
        f"data.max_length={longest} is above the {positions} positions that {config.model.path} was trained on; its "
        f"rotary positions go on, but it has not learnt what they mean. Set it to {positions} or less"
    )


def _positions(model: PretrainedConfig) -> int | None:
    """How many positions a configuration speaks of, stretched ones included; None where it speaks of none."""
    named = (getattr(model, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    positions: int | None = next((number for number in named if isinstance(number, int) and number > 0), None)
    if positions is None or not _is_rotary(model):
        return positions
    rope = model.rope_parameters
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]  # by kind of layer, or of all
    stretched = (
        int(kind["factor"] * kind["original_max_position_embeddings"])
        for kind in kinds
        if kind.get("factor") and kind.get("original_max_position_embeddings")
    )
    return max(positions, *stretched, 0)


def _is_rotary(model: PretrainedConfig) -> bool:
    return bool(getattr(model, "rope_parameters", None))

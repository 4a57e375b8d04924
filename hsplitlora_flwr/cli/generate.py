"""Texts of a finished run: ``hsplitlora generate RUN PROMPT...``.

The base model with the run's update, on this machine; what it writes after each prompt is printed, and nothing else, so
the output can go into a file. A prompt is asked as those of training were: with a line break behind it where theirs
have one, in Alpaca's words, or as a turn of a chat.

::

    hsplitlora generate runs/2026-11-28_00-58-10 "What is a cell?"
    hsplitlora generate runs/2026-11-28_00-58-10 --max-new-tokens 20 "What is a cell?" "Who was Bach?"
"""

from __future__ import annotations

from collections.abc import Sequence

from hsplitlora_flwr.cli.outcome import Outcome, ends, parser


def generate(arguments: Sequence[str] | None = None) -> None:
    """Print a text for every prompt.

    Raises
    ------
    ValueError, OSError
        If the run left nothing to write with, or a value is not allowed.
    """
    typed = parser("Write texts with the model of a finished run.")
    typed.add_argument("prompts", nargs="+", metavar="PROMPT", help="what a text goes on from")
    typed.add_argument("--max-new-tokens", type=int, metavar="N", help="longest text, in tokens (default: the run's)")
    typed.add_argument("--beams", type=int, metavar="N", help="width of the search; 1 = greedy (default: the run's)")
    options = typed.parse_args(arguments)
    outcome = Outcome.read(options.run)
    asked = outcome.config.evaluation
    from hsplitlora_flwr.data.shapes import asked as prompt_of
    from hsplitlora_flwr.evaluation.generation import answer
    from hsplitlora_flwr.lora.update import Change
    from hsplitlora_flwr.models.loading import load_tokenizer

    base, adapter = outcome.load(options.model)
    base.update({name: Change(factors=pair) for name, pair in adapter.items()})
    texts = answer(
        base.whole().causal_lm,
        load_tokenizer(str(outcome.folder / "merged") if outcome.full else options.model or outcome.config.model.path),
        [prompt_of(outcome.kind_of_prompts, prompt) for prompt in options.prompts],
        batch_size=1,
        max_new_tokens=asked.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens,
        beams=asked.beams if options.beams is None else options.beams,
    )
    for text in texts:
        print(text)


def command() -> None:
    """The command line."""
    ends(generate)

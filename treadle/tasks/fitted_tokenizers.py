"""The tokenizer of a model for text, checked against the model's number of token ids, and the error for empty texts.

tokenizer = fit_tokenizer(source.tokenizer(cut=False), source, compiled.graph.main)
"""

from __future__ import annotations

from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Function
from treadle.ir.types import Type
from treadle.program.source import ModelSource
from treadle.runtime.language_models import count_token_ids


def fit_tokenizer(
    tokenizer: TextTokenizer, source: ModelSource, function: Function, name: str = "tokens"
) -> TextTokenizer:
    """Return a tokenizer for a model, as `TextTokenizer.for_model` does.

    function  the function of the model's graph that has the input for token ids
    name      the name of this input

    Raises UsageError if the tokenizer has tokens that the model lacks.
    """
    count = count_token_ids(function, name)
    if count is None:
        return tokenizer
    same = "of a model with the same vocabulary"
    hint = Hint(f'tokenizer="FOLDER", {same}', f"--tokenizer FOLDER, {same}")
    return tokenizer.for_model(count, source.label, hint=hint)


def are_logits(name: str, type: Type, tokenizer: TextTokenizer) -> bool:
    """Return True if an output [..., vocab] has a logit for each token of a tokenizer, apart from added ones. Hidden
    states and labels of tokens have none.
    """
    width = type.shape[-1].constant
    return name != "hidden" and (width is None or width > tokenizer.largest_id)


def no_tokens(number: int, count: int) -> UsageError:
    """Return the error for a text without tokens, which no model reads: `number` counts from 0, out of `count`."""
    return UsageError(f"text {number + 1} of {count} has no tokens", hint="a text of at least one token")

"""The vocabulary in a GGUF file's metadata, as a tokenizer: byte-level BPE, which the format calls "gpt2".

    tokenizer = gguf_text_tokenizer(GGUFFile.open(path))
    tokenizer.batch(["The capital of France is"]).ids

    tokenizer.ggml.model            "gpt2"; SentencePiece ("llama") is not supported yet
    tokenizer.ggml.pre              pre-tokenizer, which splits text before merging: one of PRE_TOKENIZERS
    tokenizer.ggml.tokens, merges   the tokens by id, and the merges "left right" in order of priority
    tokenizer.ggml.token_type       1 normal, 3 control, 4 defined by a user, ...

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the keys; llama.cpp's llama-vocab.cpp for the
splitting of each name of `pre`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from treadle.files.installation import pip_install
from treadle.files.shown_names import printable
from treadle.frontends.gguf_file import GGUFFile
from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import CheckpointError, FrontendError

_TOKENS = "tokenizer.ggml.tokens"
_MERGES = "tokenizer.ggml.merges"
_CONTROL, _DEFINED = 3, 4

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PRE_TOKENIZERS = {
    "default": (None, False),
    "gpt-2": (None, False),
    "smollm": (None, True),
    "llama-bpe": (_WORDS + r"\p{N}{1,3}" + _REST, False),
    "qwen2": (_WORDS + r"\p{N}" + _REST, False),
}
"""Pre-tokenizers by name: a regular expression (None: GPT-2's own), and True if digits are first split into single
ones.
"""


def build_gguf_tokenizer(file: GGUFFile) -> Any:
    """Build the file's vocabulary as a `tokenizers.Tokenizer`.

    Raises CheckpointError, with the key, if the vocabulary is missing, damaged or of an unsupported kind, and
    FrontendError if the tokenizers library is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise FrontendError(
            "reading text needs the package tokenizers", received=str(error), hint=pip_install("text")
        ) from error
    kind, cut = file.text("tokenizer.ggml.model"), file.text("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        file.fail(
            "tokenizer.ggml.model", "is a vocabulary that is not supported yet", f"{printable(kind)}; supported: gpt2"
        )
    if cut not in PRE_TOKENIZERS:
        file.fail("tokenizer.ggml.pre", "is not known", f"{printable(cut)}; known: {', '.join(PRE_TOKENIZERS)}")
    tokens = file.texts(_TOKENS)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        file.fail(_TOKENS, "holds a token twice", f"{len(tokens)} tokens, {len(vocabulary)} different ones")
    merges = []
    for merge in file.texts(_MERGES):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            file.fail(_MERGES, "must hold two tokens each, separated by a space", printable(merge))
        merges.append((left, right))

    def build() -> Any:
        # Llama 3's vocabulary contains whole words that no sequence of merges produces.
        model = tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe")
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = _pre_tokenizer(tokenizers, *PRE_TOKENIZERS[cut])
        made.decoder = tokenizers.decoders.ByteLevel()
        if cut == "qwen2":
            made.normalizer = tokenizers.normalizers.NFC()
        for number, token in _special_tokens(file, tokens):
            added = tokenizers.AddedToken(token, normalized=False, special=number == _CONTROL)
            (made.add_special_tokens if number == _CONTROL else made.add_tokens)([added])
        if file.flag("tokenizer.ggml.add_bos_token", False):
            first = tokens[_token_id(file, "tokenizer.ggml.bos_token_id", len(tokens))]
            made.post_processor = tokenizers.processors.TemplateProcessing(
                single=["first", "$A"],
                special_tokens=[{"id": "first", "ids": [vocabulary[first]], "tokens": [first]}],
            )
        return made

    return _guarded(build, file)


def gguf_text_tokenizer(file: GGUFFile, *, max_tokens: int | None = None) -> TextTokenizer:
    """Return the file's tokenizer, which truncates texts to `max_tokens` ids. Raises as `build_gguf_tokenizer` does."""
    made = build_gguf_tokenizer(file)
    if max_tokens is not None:
        made.enable_truncation(max_tokens)
    tokens = file.texts(_TOKENS)
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    keys = {f"{ours}_token": f"tokenizer.ggml.{theirs}_token_id" for ours, theirs in roles.items()}
    special = {role: tokens[_token_id(file, key, len(tokens))] for role, key in keys.items() if file.has(key)}
    return TextTokenizer(made, max_tokens, special)


def gguf_end_tokens(file: GGUFFile) -> tuple[int, ...]:
    """Return the ids that stop generation: the ends of the text, of the turn and of the message, if the file has
    them.
    """
    count = len(file.texts(_TOKENS))
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(_token_id(file, key, count) for key in keys if file.has(key)))


def gguf_chat_template(file: GGUFFile) -> str | None:
    """Return the model's chat template, if it was trained with one."""
    key = "tokenizer.chat_template"
    return file.text(key) if file.has(key) else None


def _token_id(file: GGUFFile, key: str, count: int) -> int:
    return file.integer(key, least=0, most=count - 1)


def _special_tokens(file: GGUFFile, tokens: list[str]) -> list[tuple[int, str]]:
    """Return the tokens that are matched as a whole, with their types."""
    key = "tokenizer.ggml.token_type"
    if not file.has(key):
        return []
    types = file.numbers(key)
    if len(types) != len(tokens):
        file.fail(key, "must have a type for each token", f"{len(types)} types, {len(tokens)} tokens")
    return [(int(n), token) for n, token in zip(types, tokens, strict=True) if n in (_CONTROL, _DEFINED) and token]


def _pre_tokenizer(tokenizers: Any, pattern: str | None, single_digits: bool) -> Any:
    pre = tokenizers.pre_tokenizers
    steps = [pre.Digits(individual_digits=True)] if single_digits else []
    if pattern is not None:
        steps.append(pre.Split(tokenizers.Regex(pattern), behavior="isolated", invert=False))
    return pre.Sequence([*steps, pre.ByteLevel(add_prefix_space=False, use_regex=pattern is None)])


def _guarded(build: Callable[[], Any], file: GGUFFile) -> Any:
    """Return the result of a call of the library for a vocabulary. Its errors, and panics of its Rust code, become
    CheckpointError.
    """
    try:
        return build()
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            "the vocabulary is damaged", received=printable(str(error), 400), within=f"{file.path}: key {_TOKENS}"
        ) from None

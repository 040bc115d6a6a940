"""A new vocabulary from texts: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), by the tokenizers library.

tokenizer = train_tokenizer(["Once upon a time", "The end"], 300)
tokenizer.id_of(END)  # 0
"""

from __future__ import annotations

from collections.abc import Sequence

from treadle.frontends.text import TextTokenizer
from treadle.ir.errors import UsageError

END, MASK = "<|endoftext|>", "<mask>"
USUAL_VOCABULARY = 8000
"""A usual number of tokens of a new vocabulary, for hints."""
_BYTES = 256


def least_vocabulary(*, mask: bool = False) -> int:
    """Return the number of tokens without merges: the 256 bytes, END, and MASK if it is requested."""
    return _BYTES + 1 + mask


def train_tokenizer(texts: Sequence[str], size: int, *, mask: bool = False) -> TextTokenizer:
    """Train a tokenizer of up to `size` tokens: END, MASK if it is requested, the 256 bytes, and merges of frequent
    pairs. Equal texts give equal tokenizers.

    Raises UsageError if `size` is less than the number of tokens without merges.
    """
    import tokenizers

    special = [END, MASK] if mask else [END]
    if size < (least := least_vocabulary(mask=mask)):
        raise UsageError(
            f"a vocabulary has a token for each byte and {len(special)} special: {least} tokens or more",
            received=f"{size}",
            hint=str(USUAL_VOCABULARY),
        )
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    roles = {"bos_token": END, "eos_token": END, "unk_token": END}
    return TextTokenizer(made, None, {**roles, "mask_token": MASK} if mask else roles)

"""Whisper: speech to text, a Transformer whose encoder reads a log-mel spectrogram (Radford et al. 2023).

Its figure 1: two convolutions, the second of which halves the frames, sinusoidal positions and an encoder; a decoder
with learned positions that attends to the encoder's output. Norms come before each part, and after the last part.
"""

from __future__ import annotations

from typing import Annotated

import treadle.frontends.language as t
from treadle.files.shown_names import printable
from treadle.frontends.binding import Entry, Table, Tied, consecutive
from treadle.frontends.ctranslate2_file import CTranslate2File
from treadle.ir.errors import CheckpointError
from treadle.models.bart import ALIASES, name_blocks
from treadle.models.family import (
    Config,
    Family,
    choose,
    choose_architecture,
    padding_rows,
    read_int,
    read_layers,
    require,
    weights_and_biases,
)

ACTIVATIONS = {"gelu": t.gelu, "gelu_new": t.gelu_tanh, "relu": t.relu}
MELS = 80


@t.model
def whisper_encoder(
    mel: Annotated[t.Tensor, t.f32["B 80 F"]],
    *,
    context: int = 1500,
    dim: int = 384,
    heads: int = 6,
    layers: int = 4,
    hidden: int = 1536,
    act: t.Activation = t.gelu,
) -> dict[str, t.Tensor]:
    """Whisper's encoder: hidden states [B, (F - 1)//2 + 1, dim] of a log-mel spectrogram mel [B, 80, F].

    Frames are 10 ms apart, up to 2 * context of them; OpenAI's models were trained on 30 s, silence included.
    """
    t.bound("F", upper=2 * context)
    with t.scope("encoder"):
        # The positions are sinusoids, stored as weights. Convolutions are followed by gelu whatever the config says, as
        # in the paper.
        x = t.gelu(t.convolution(mel, dim, (3,), padding=(1,), name="conv1"))
        x = t.gelu(t.convolution(x, dim, (3,), padding=(1,), strides=(2,), name="conv2"))
        x = t.rearrange(x, pattern="b d s -> b s d")
        x += t.slice(t.parameter("positions.weight", context, dim), axis=0, stop=x.shape[1])
        for _ in t.stack("layer", layers):
            y = t.layer_norm(x, name="attn_norm")
            x += t.self_attention(y, heads, key_bias=False, name="attn")
            x += t.mlp(t.layer_norm(x, name="mlp_norm"), hidden, act=act, name="mlp")
        return {"hidden": t.layer_norm(x, name="norm")}


@t.model
def whisper(
    mel: Annotated[t.Tensor, t.f32["B 80 F"]],
    decoder_tokens: Annotated[t.Tensor, t.i64["B T"]],
    *,
    vocab: int = 51864,
    context: int = 1500,
    decoder_context: int = 448,
    dim: int = 384,
    heads: int = 6,
    layers: int = 4,
    hidden: int = 1536,
    decoder_heads: int = 6,
    decoder_layers: int = 4,
    decoder_hidden: int = 1536,
    act: t.Activation = t.gelu,
) -> dict[str, t.Tensor]:
    """Whisper: next-token logits [B, T, vocab] of decoder_tokens [B, T], conditioned on a log-mel spectrogram mel [B,
    80, F].
    """
    memory = whisper_encoder(
        mel, context=context, dim=dim, heads=heads, layers=layers, hidden=hidden, act=act
    )["hidden"]  # fmt: skip
    with t.scope("decoder"):
        x = t.embed(decoder_tokens, vocab, dim, name="tokens")
        x += t.embed(t.positions(decoder_tokens), decoder_context, dim, name="positions")
        for _ in t.stack("layer", decoder_layers):
            y = t.layer_norm(x, name="attn_norm")
            x += t.self_attention(y, decoder_heads, causal=True, key_bias=False, name="attn")
            y = t.layer_norm(x, name="cross_norm")
            x += t.cross_attention(y, memory, decoder_heads, key_bias=False, name="cross")
            x += t.mlp(t.layer_norm(x, name="mlp_norm"), decoder_hidden, act=act, name="mlp")
        x = t.layer_norm(x, name="norm")
        return {"logits": t.unembed(x, tied="tokens")}


# -- Hugging Face ----------------------------------------------------------------------------------------------


def from_config(config: Config) -> t.Model:
    """Read a Hugging Face WhisperConfig. The error for large-v3 explains that its spectrogram has 128 bands."""
    choose_architecture(config, {"WhisperForConditionalGeneration": whisper})
    require(config, is_causal=None, is_encoder_decoder=True)
    require(config, num_mel_bins=MELS, scale_embedding=False, tie_word_embeddings=True)
    return whisper.configure(
        vocab=read_int(config, "vocab_size"),
        context=read_int(config, "max_source_positions", 1500),
        decoder_context=read_int(config, "max_target_positions", 448),
        dim=read_int(config, "d_model"),
        heads=read_int(config, "encoder_attention_heads"),
        layers=read_layers(config, "encoder_layers"),
        hidden=read_int(config, "encoder_ffn_dim"),
        decoder_heads=read_int(config, "decoder_attention_heads"),
        decoder_layers=read_layers(config, "decoder_layers"),
        decoder_hidden=read_int(config, "decoder_ffn_dim"),
        act=choose(config, "activation_function", ACTIVATIONS, "gelu"),
    )


def checkpoint(config: Config) -> Table:
    """Return the table of Hugging Face's names. Layers have BART's names."""
    table: dict[str, Entry] = {
        **name_blocks(),
        "decoder.tokens.weight": Tied(("decoder.embed_tokens.weight", "proj_out.weight")),
    }
    for stack in ("encoder", "decoder"):
        table[f"{stack}.positions.weight"] = f"{stack}.embed_positions.weight"
        table |= weights_and_biases({f"{stack}.norm": f"{stack}.layer_norm"})
    return table


FAMILY = Family(
    "whisper", whisper, ("whisper",), from_config, checkpoint,
    prefixes=("", "model."),
    aliases={"whisper": {**ALIASES, "num_key_value_heads": "encoder_attention_heads"}},
    irrelevant={
        "median_filter_width": "belongs to timestamps of words",
        "alignment_heads": "belongs to timestamps of words",
        **dict.fromkeys(("use_weighted_layer_sum", "classifier_proj_size"), "belongs to another class, for audio"),
    },
    padding=padding_rows("decoder.tokens.weight", default=50256),
    buffers=("encoder.positions.weight",),
)  # fmt: skip


# -- CTranslate2 -----------------------------------------------------------------------------------------------

_GELU = 3  # the number of gelu in CTranslate2's list of activations


def from_ctranslate2(file: CTranslate2File) -> t.Model:
    """Configure Whisper from a model.bin of CTranslate2.

    Raises CheckpointError for another kind of model, and for a model that this declaration does not compute.
    """
    if file.specification != "WhisperSpec":
        raise CheckpointError(
            "the file does not contain a Whisper model",
            received=printable(file.specification),
            within=file.label,
            hint="WhisperSpec is the only supported model of CTranslate2",
        )
    expected = {"activation": _GELU, "pre_norm": 1, "scale_embeddings": 0, "alibi": 0, "start_from_zero_embedding": 0}
    for option, value in expected.items():
        if _read_scalar(file, f"decoder/{option}") != value:
            raise CheckpointError(f"decoder/{option} must be {value}, as in Whisper", within=file.label)
    for stack in ("encoder", "decoder"):
        if _read_scalar(file, f"{stack}/num_heads") < 1:
            raise CheckpointError(f"{stack}/num_heads must be positive", within=file.label)
    vocab, dim = _read_shape(file, "decoder/embeddings/weight", 2)
    _, mels, _ = _read_shape(file, "encoder/conv1/weight", 3)
    if mels != MELS:
        raise CheckpointError(f"the spectrogram has {mels} bands, but {MELS} are supported", within=file.label)
    return whisper.configure(
        vocab=vocab,
        dim=dim,
        context=_read_shape(file, "encoder/position_encodings/encodings", 2)[0],
        decoder_context=_read_shape(file, "decoder/position_encodings/encodings", 2)[0],
        heads=_read_scalar(file, "encoder/num_heads"),
        layers=_count_layers(file, "encoder"),
        hidden=_read_shape(file, "encoder/layer_0/ffn/linear_0/weight", 2)[0],
        decoder_heads=_read_scalar(file, "decoder/num_heads"),
        decoder_layers=_count_layers(file, "decoder"),
        decoder_hidden=_read_shape(file, "decoder/layer_0/ffn/linear_0/weight", 2)[0],
    )


def ctranslate2_table(dim: int) -> Table:
    """Return the table of CTranslate2's names. Files store q, k and v of self-attention in one matrix, and q, k and v
    of cross-attention in two matrices.

    The biases of keys, which are zero, are not read. A number that is added to all scores of a query does not change
    attention.
    """
    modules = {
        "{stack}.norm": "{stack}/layer_norm",
        "{layer}.attn_norm": "{block}/self_attention/layer_norm",
        "{layer}.attn.out": "{block}/self_attention/linear_1",
        "{layer}.cross_norm": "{block}/attention/layer_norm",
        "{layer}.cross.q": "{block}/attention/linear_0",
        "{layer}.cross.out": "{block}/attention/linear_2",
        "{layer}.mlp_norm": "{block}/ffn/layer_norm",
        "{layer}.mlp.up": "{block}/ffn/linear_0",
        "{layer}.mlp.down": "{block}/ffn/linear_1",
        "{stack}.conv1": "{stack}/conv1",
        "{stack}.conv2": "{stack}/conv2",
    }
    fused = {
        "{layer}.attn": ("{block}/self_attention/linear_0", "qkv"),
        "{layer}.cross": ("{block}/attention/linear_1", "kv"),
    }
    table: dict[str, Entry] = {"decoder.tokens.weight": "decoder/embeddings/weight"}
    for stack in ("encoder", "decoder"):
        places = {"stack": stack, "layer": f"{stack}.layer.{{i}}", "block": f"{stack}/layer_{{i}}"}
        table[f"{stack}.positions.weight"] = f"{stack}/position_encodings/encodings"
        for ours, theirs in modules.items():
            weight, bias = ("gamma", "beta") if "norm" in ours else ("weight", "bias")
            table[f"{ours}.weight".format(**places)] = f"{theirs}/{weight}".format(**places)
            table[f"{ours}.bias".format(**places)] = f"{theirs}/{bias}".format(**places)
        for ours, (theirs, parts) in fused.items():
            for part in ("weight", "bias"):
                names = [f"{ours}.{name}.{part}".format(**places) for name in parts]
                table |= consecutive(f"{theirs}/{part}".format(**places), dict.fromkeys(names, dim))
    return table


def _read_shape(file: CTranslate2File, name: str, rank: int) -> tuple[int, ...]:
    record = file.record(name)
    if len(record.shape) != rank or 0 in record.shape:
        raise CheckpointError(f"{name} must have {rank} dimensions", received=str(record), within=file.label)
    return record.shape


def _read_scalar(file: CTranslate2File, name: str) -> int:
    """Return an option, which the file stores as an integer without dimensions."""
    record = file.record(name)
    if record.shape or not record.dtype.startswith("i"):
        raise CheckpointError(f"{name} must be one integer", received=str(record), within=file.label)
    return int(file.array(name))


def _count_layers(file: CTranslate2File, stack: str) -> int:
    return sum(name.startswith(f"{stack}/layer_") and name.endswith("/ffn/linear_0/bias") for name in file)

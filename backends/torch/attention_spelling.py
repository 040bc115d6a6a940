"""PyTorch code for attention: a call of PyTorch's own function, or of one of our kernels."""

from __future__ import annotations

from treadle.backends.python.attention_spelling import attention, scale_of
from treadle.backends.python.spelled_line import Line, float_text
from treadle.backends.torch.attention_forms import AttentionForm, form_of
from treadle.backends.torch.dtype_names import dtype_text
from treadle.backends.torch.term_spelling import spelled_term
from treadle.ir.attention.seen_keys import leave_a_key


def attention_text(line: Line) -> str:
    """Return a call of PyTorch's own function if it computes the same: without terms, or with only causal and a visible
    key for every query. Otherwise return a call of our kernel.
    """
    to, form = line.op.to, form_of(line.op, line.on_device)
    if form is AttentionForm.FUSED:
        out = _whole_call(line)
        return out if to is None else f"{out}.to({dtype_text(to)})"
    factors = [x if to is None else f"{x}.to({dtype_text(to)})" for x in (line.q, line.k, line.v)]
    if form is AttentionForm.BLOCKS:
        operands = [*factors, *[line.array(name) for name in line.names[3:]]]
        return f"kernels.attention_in_blocks({', '.join([*operands, *_options(line)])}{_seeing(line)})"
    return attention(line, spelled_term, factors, options=_seeing(line))


def attention_with_probabilities_text(line: Line) -> str:
    """Return a call of our kernel, since PyTorch's own call does not return probabilities."""
    return attention(line, spelled_term, options=_seeing(line))


def cached_attention_text(line: Line) -> str:
    """Return a call of our kernel, which reads the caches of the rows."""
    options = [*_options(line), *(["ring=True"] if line.op.ring else [])]
    return f"kernels.cached_attention({line.arrays}, {', '.join(options)}{line.report_args})"


def _whole_call(line: Line) -> str:
    options = ", is_causal=True" if line.op.terms else ""
    options += f", scale={float_text(scale_of(line))}"
    options += ", enable_gqa=True" if line.type("q").shape[1] != line.type("k").shape[1] else ""
    return f"F.scaled_dot_product_attention({line.q}, {line.k}, {line.v}{options})"


def _options(line: Line) -> list[str]:
    """Return the arguments of a kernel that computes masks itself: the terms as text, the scale and the soft-cap."""
    terms = "".join(f'"{term}", ' for term in line.op.terms)
    options = [f"terms=({terms.rstrip()})", f"scale={float_text(scale_of(line))}"]
    return options if line.op.softcap is None else [*options, f"softcap={float_text(line.op.softcap)}"]


def _seeing(line: Line) -> str:
    """Return the argument that says if every query sees a key. On the CPU, a mask of data is read to find out."""
    q, k = line.type("q"), line.type("k")
    if not line.op.terms:
        return ""
    all_see = leave_a_key(line.op.terms, q.shape[2], k.shape[2])
    return f", all_see={all_see}" if all_see or line.on_device else ""

"""Names from other libraries, and the equivalents in Treadle, for error messages: their `mean` is `t.reduce_mean(x,
axes=(-1,))`.

Each equivalent begins with code, so that a test can run it. A remark in words follows a #.
"""

from __future__ import annotations

_PERMUTED = 't.rearrange(x, pattern="b s d -> b d s")'
_SPLIT = 't.rearrange(x, pattern="b s (h=2 d) -> b h s d")  # (h d) is one axis: split on the left, joined on the right'
_LEFT_OUT = "x  # leave it out: results are new values, and have no layout in memory"
_NO_DROPOUT = "x  # leave it out: a graph has no random numbers, also in training"
_NO_GRADIENT = "t.stop_gradient(x)  # or t.Trainer(model, trained=[...]), which names the weights to train"
_FILLED = "t.expand(t.constant({}, t.f32), shape=(x.shape[1], 4))  # with the sizes"
_LIKE = "t.expand(t.constant({}, x.dtype), shape=x.shape)"
_DEVICE = 'x  # leave it out: target="cuda" of t.compile chooses the device'
_NO_DATA_SIZES = "t.where(condition, x, 0.0)  # keeps the shape: the size of a result cannot depend on data"
_GRADIENTS = "x  # leave it out: t.Trainer(model).step computes the gradients of all weights"
_NUMBERS = "t.compile(model)(...)  # returns arrays; x has no elements yet"

_WORDS = {
    "transpose permute swapaxes swapdims moveaxis movedim": _PERMUTED,
    "flip": "x.flip(1)  # axis 1",
    "fliplr": "x.flip(1)",
    "flipud": "x.flip(0)",
    "roll": "x.roll(1, 1)  # by 1 along axis 1",
    "take": "x.flatten()[positions]",
    "isinf": 't.abs(x) == float("inf")',
    "isfinite": 't.abs(x) < float("inf")',
    "nan_to_num": "t.where(x == x, x, 0.0).clamp(-3.4028234663852886e38, 3.4028234663852886e38)  # of f32",
    "count_nonzero": "(x != 0).sum()",
    "diff": "x[..., 1:] - x[..., :-1]  # the command `treadle diff` compares two models",
    "fmod": "x - y * (t.sign(x / y) * t.floor(t.abs(x / y)))",
    "logit": "t.log(x / (1.0 - x))",
    "lerp": "x + 0.5 * (y - x)  # halfway",
    "prelu PReLU": "t.where(x > 0, x, x * y)  # y: the weight",
    "unfold Unfold": "t.windows(x, axis=-1, size=2)  # the elements of each window are along a new last axis",
    "scatter scatter_": "t.where(t.iota(size=8) == 3, y, x)  # y at position 3; t.scatter_add adds at positions",
    "interpolate upsample Upsample": "images.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)  # the nearest",
    "batch_norm BatchNorm1d BatchNorm2d": (
        'images * t.parameter("scale", 3, 1, 1) + t.parameter("shift", 3, 1, 1)  # for inference, with the statistics '
        "in both; to train, t.group_norm"
    ),
    "nonzero argwhere unique masked_select": _NO_DATA_SIZES,
    "bernoulli multinomial rand_like randn_like": "x  # leave it out: a graph has no random numbers",
    "view": "x.view(x.shape[0], x.shape[1], 2, 4)",
    "flatten ravel": "x.flatten()  # x.flatten(1) keeps the first axis",
    "unflatten": "x.unflatten(-1, (2, -1))",
    "reshape_as view_as": "x.reshape(x.shape)",
    "unsqueeze expand_dims": "x.unsqueeze(1)",
    "squeeze": "x[:, None].squeeze(1)",
    "mean average": "t.reduce_mean(x, axes=(-1,))",
    "sum": "t.reduce_sum(x, axes=(-1,))",
    "max amax": "t.reduce_max(x, axes=(-1,))",
    "min amin": "t.reduce_min(x, axes=(-1,))",
    "norm": "t.sqrt(t.reduce_sum(x * x, axes=(-1,)))",
    "var": "x.var(-1)  # as PyTorch's; x.var(-1, correction=0) is NumPy's",
    "std": "x.std(-1)  # as PyTorch's; x.std(-1, correction=0) is NumPy's",
    "split chunk narrow unbind tensor_split hsplit": "t.slice(x, axis=-1, start=0, stop=4)  # for each part",
    "cat concatenate hstack vstack": "t.concat(x, x, axis=1)  # along axis 1",
    "tile": "x.repeat(1, 1, 2)  # the repetitions of each axis",
    "repeat repeat_interleave": "x.repeat_interleave(2, dim=1)  # each element; x.repeat(1, 2, 1) is PyTorch's repeat",
    "broadcast_to": "x[:, :1].expand(-1, 3, -1)  # the sizes; -1 keeps an axis",
    "expand_as": "x[:, :1].expand(x.shape)",
    "clip clamp": "t.minimum(t.maximum(x, 0.0), 1.0)",
    "masked_fill": 'x.masked_fill(x > 0, float("-inf"))  # for attention, mask=t.causal',
    "tril": "x.tril()  # or x.tril(diagonal=1); for attention, mask=t.causal",
    "triu": "x.triu()  # or x.triu(diagonal=1)",
    "take_along_dim": "t.take_along_axis(x, positions, axis=-1)",
    "index_select": "t.gather(x, t.iota(size=2), axis=1)",
    "log2": "t.log(x) / 0.6931471805599453",
    "log10": "t.log(x) / 2.302585092994046",
    "exp2": "t.exp(0.6931471805599453 * x)",
    "logsumexp": "t.log(t.exp(x - x.amax(-1, keepdim=True)).sum(-1)) + x.amax(-1)",
    "tan": "t.sin(x) / t.cos(x)",
    "sinh": "(t.exp(x) - t.exp(-x)) / 2.0",
    "cosh": "(t.exp(x) + t.exp(-x)) / 2.0",
    "erfc": "1.0 - t.erf(x)",
    "trunc fix": "t.sign(x) * t.floor(t.abs(x))",
    "frac": "x - t.sign(x) * t.floor(t.abs(x))",
    "isnan": "x != x",
    "argmin": "x.argmin(-1)",
    "sort": "-(-x).topk(8).values  # 8: the size of the axis",
    "argsort": "(-x).topk(8).indices  # 8: the size of the axis",
    "subtract": "x - y",
    "divide true_divide": "x / y",
    "remainder": "x % y",
    "leaky_relu LeakyReLU": "t.maximum(x, 0.01 * x)",
    "elu ELU celu CELU": "t.relu(x) + t.expm1(t.minimum(x, 0.0))",
    "selu SELU": "1.0507009873554805 * (t.relu(x) + 1.6732632423543772 * t.expm1(t.minimum(x, 0.0)))",
    "relu6 ReLU6": "t.minimum(t.relu(x), 6.0)",
    "hardtanh Hardtanh": "x.clamp(-1.0, 1.0)",
    "hardsigmoid Hardsigmoid": "(x / 6.0 + 0.5).clamp(0.0, 1.0)",
    "hardswish Hardswish": "x * (x / 6.0 + 0.5).clamp(0.0, 1.0)",
    "mish Mish": "x * t.tanh(t.softplus(x))",
    "glu GLU": "x.chunk(2, -1)[0] * t.sigmoid(x.chunk(2, -1)[1])",
    "logsigmoid log_sigmoid LogSigmoid": "-t.softplus(-x)",
    "softsign Softsign": "x / (1.0 + t.abs(x))",
    "softmin Softmin": "t.softmax(-x, axis=-1)",
    "avg_pool1d AvgPool1d": "t.average_pool(signal, kernel=(2,), strides=(2,))  # PyTorch's strides are the kernel",
    "avg_pool2d AvgPool2d": "t.average_pool(images, kernel=(2, 2), strides=(2, 2))  # PyTorch's strides are the kernel",
    "max_pool1d MaxPool1d": "t.max_pool(signal, kernel=(2,), strides=(2,))  # PyTorch's strides are the kernel",
    "max_pool2d MaxPool2d": "t.max_pool(images, kernel=(2, 2), strides=(2, 2))  # PyTorch's strides are the kernel",
    "square": "x * x",
    "absolute": "t.abs(x)",
    "negative": "-x",
    "rint": "t.round(x)",
    "ceil": "-t.floor(-x)",
    "swish SiLU": "t.silu(x)",
    "GELU gelu_python": "t.gelu(x)",
    "gelu_new gelu_fast gelu_pytorch_tanh gelu_python_tanh": "t.gelu_tanh(x)",
    "ReLU": "t.relu(x)",
    "outer": "x[:, None] * y",
    "one_hot": "(positions[..., None] == t.iota(size=8)).long()  # of 8 classes",
    "mse_loss MSELoss": "((x - y) ** 2).mean()",
    "binary_cross_entropy BCELoss": "-(y * t.log(x) + (1.0 - y) * t.log(1.0 - x)).mean()  # probabilities x, targets y",
    "binary_cross_entropy_with_logits BCEWithLogitsLoss": "(t.softplus(x) - x * y).mean()  # targets y",
    "cosine_similarity CosineSimilarity": (
        "(x * y).sum(-1) / t.maximum(t.sqrt((x * x).sum(-1) * (y * y).sum(-1)), 1e-8)"
    ),
    "l1_loss L1Loss": "t.abs(x - y).mean()",
    "normalize": "x / t.maximum(t.sqrt(t.reduce_sum(x * x, axes=(-1,), keep=True)), 1e-12)",
    "dot bmm mm": "x @ t.rearrange(x, pattern='b s d -> b d s')",
    "topk": "t.top_k(x, k=2)",
    "arange range": "t.iota(size=x.shape[1])  # or another size; dtype=t.f32 for floats",
    "zeros empty": _FILLED.format("0.0"),
    "ones": _FILLED.format("1.0"),
    "full": _FILLED.format("value"),
    "zeros_like empty_like": _LIKE.format("0.0"),
    "ones_like": _LIKE.format("1.0"),
    "full_like": _LIKE.format("value"),
    "eye": "(t.iota(size=8)[:, None] == t.iota(size=8)).cast(t.f32)",
    "linspace": "t.constant([0.0, 0.5, 1.0])",
    "tensor array asarray as_tensor from_numpy FloatTensor LongTensor": "t.constant([1.0, 2.0])",
    "Linear Dense dense": 't.linear(x, 64, name="f")',
    "Embedding": 't.embed(tokens, 100, 16, name="wte")',
    "LayerNorm layernorm": 't.layer_norm(x, name="ln")',
    "RMSNorm rmsnorm": 't.rms_norm(x, name="ln")',
    "GroupNorm groupnorm": 't.group_norm(images, 3, name="norm")  # 3 groups of channels',
    "instance_norm InstanceNorm1d InstanceNorm2d": 't.group_norm(images, images.shape[1], name="norm")',
    "conv1d Conv1d Conv": 't.convolution(signal, 8, (3,), name="conv")  # (3, 3) over two axes',
    "conv2d conv3d Conv2d": 't.convolution(images, 8, (3, 3), name="conv")',
    "MultiheadAttention mha multihead_attention": 't.self_attention(x, 4, name="attn")',
    "scaled_dot_product_attention sdpa": "t.attention(q, k, v)  # with mask=t.causal for is_causal=True",
    "rope rotary_embedding rotary_emb": "t.rotary(q, t.positions(tokens), t.rotary_frequencies(8))",
    "swiglu SwiGLU": 't.gated_mlp(x, 32, act=t.silu, name="mlp")',
    "geglu GEGLU GeGLU": 't.gated_mlp(x, 32, act=t.gelu, name="mlp")',
    "sliding_window local_attention": "t.self_attention(x, 4, mask=t.causal & t.window(8))  # of 8 positions",
    "dropout Dropout": _NO_DROPOUT,
    "contiguous clone": _LEFT_OUT,
    "detach requires_grad": _NO_GRADIENT,
    "nn": 't.linear(x, 64, name="f")  # layers are functions',
    "Parameter Variable": 't.parameter("w", 64)',
    "float32 float single": "t.f32",
    "float64 double": "t.f64",
    "float16 half": "t.f16",
    "bfloat16": "t.bf16",
    "int64 long": "t.i64",
    "int32 int": "t.i32",
    "int16 short": "t.i16",
    "int8": "t.i8",
    "uint8 byte": "t.u8",
    "bool": "t.boolean",
}
_METHODS = {
    "H mH adjoint": "x.mT",
    "eq": "x == y",
    "ne": "x != y",
    "lt": "x < y",
    "le": "x <= y",
    "gt": "x > y",
    "ge": "x >= y",
    "sub": "x - y",
    "astype": "x.cast(t.f32)",
    "matmul mm bmm dot": "x @ x.mT",
    "item numpy tolist": _NUMBERS,
    "cpu cuda device is_cuda get_device pin_memory share_memory_": _DEVICE,
    "grad backward retain_grad register_hook is_leaf": _GRADIENTS,
    "requires_grad_": _NO_GRADIENT,
    "data": "t.stop_gradient(x)",
    "is_contiguous stride storage layout data_ptr copy": _LEFT_OUT,
    "uniform_ normal_ bernoulli_": "x  # leave it out: a graph has no random numbers",
    "new_tensor": "t.constant([1.0, 2.0], x.dtype)",
    "new_empty": "x.new_zeros(2, 4)",
    "clamp_min": "x.clamp(min=0.0)",
    "clamp_max": "x.clamp(max=0.0)",
    "nelement": "x.numel()",
    "is_floating_point": "x.dtype.is_float",
    "conj real": "x  # leave it out: elements are real",
    "t": "x.mT  # x.T for a matrix",
    "select": "x[:, 0]  # position 0 of axis 1",
    "where": "t.where(condition, x, y)",
    "fill_": _LIKE.format("value"),
    "zero_": _LIKE.format("0.0"),
    "copy_": "y.expand(x.shape)  # values do not change: x = y",
    "short": "x.to(t.i16)",
    "char": "x.to(t.i8)",
    "byte": "x.to(t.u8)",
}

OTHER_WORDS = {word: spelled for words, spelled in _WORDS.items() for word in words.split()}
"""The replacement for each function or type of other libraries that Treadle lacks."""

OTHER_METHODS = OTHER_WORDS | {word: spelled for words, spelled in _METHODS.items() for word in words.split()}
"""The replacement for each method or property that a model's tensor lacks."""

DEVICES = frozenset({"cpu", "cuda", "gpu", "mps", "xpu", "tpu", "meta"})
"""Names of devices in other libraries, without numbers."""


def dtype_word(value: object) -> str | None:
    """Return the dtype, such as `t.f16`, that a dtype of another library or of Python has here, or its name; None if
    there is none.
    """
    name = "float64" if value is float else "int64" if value is int else getattr(value, "__name__", None) or str(value)
    spelled = OTHER_WORDS.get(name.rpartition(".")[2].rstrip("_"), f"t.{name}")
    return spelled if spelled in _DTYPES else None


_DTYPES = frozenset({"t.f64", "t.f32", "t.f16", "t.bf16", "t.i64", "t.i32", "t.i16", "t.i8", "t.u8", "t.boolean"})

OTHER_FUNCTIONS = {word.lower(): spelled for word, spelled in OTHER_WORDS.items() if word[0].isupper()} | {
    "layer_norm": OTHER_WORDS["LayerNorm"],
    "rms_norm": OTHER_WORDS["RMSNorm"],
    "group_norm": OTHER_WORDS["GroupNorm"],
    "embedding": OTHER_WORDS["Embedding"],
    "reshape": _SPLIT,
    "softmax": "t.softmax(x, axis=-1)",
    "log_softmax": "t.log_softmax(x, axis=-1)",
    "argmax": "t.argmax(x, axis=-1)",
    "gather": "t.take_along_axis(x, positions, axis=-1)",
    "stack": "t.concat(x[None], y[None], axis=0)",
    "cumsum": "t.cumsum(x, axis=-1)",
    "einsum": 't.einsum(x, x, equation="b s d, b t d -> b s t")',
}
"""The replacement for a function of another library whose name the DSL has too, with other arguments."""

DIFFERENT = {"gather": "is NumPy's take", "stack": "repeats a block", "embedding": "takes the table itself"}
"""The computation of each function that is not PyTorch's function of the same name."""

OTHER_OPTIONS: dict[str, tuple[str, ...]] = {
    "dim": ("axis", "axes"),
    "dims": ("axes", "axis"),
    "axis": ("axes", "dim"),
    "axes": ("axis", "dim"),
    "keep": ("keepdim",),
    "keepdim": ("keep",),
    "keepdims": ("keep", "keepdim"),
    "stride": ("strides",),
    "dilation": ("dilations",),
    "kernel_size": ("kernel",),
    "epsilon": ("eps",),
    "ignore_index": ("ignored",),
    "out_channels": ("channels",),
    "num_embeddings": ("count",),
    "embedding_dim": ("dim",),
    "hidden_features": ("hidden",),
    "is_causal": ("causal", "mask=t.causal"),
    "causal": ("mask=t.causal",),
    "attn_mask": ("mask",),
    "num_heads": ("heads",),
    "num_groups": ("groups",),
    "activation": ("act",),
    **dict.fromkeys(("out_features", "units", "output_size"), ("out",)),
    **dict.fromkeys(("vocab", "vocab_size", "input_dim"), ("count", "vocab")),
    **dict.fromkeys(("d_model", "output_dim", "embed_dim"), ("dim",)),
    **dict.fromkeys(("intermediate_size", "dim_feedforward", "ffn_dim", "d_ff"), ("hidden",)),
    **dict.fromkeys(("filters", "num_filters"), ("channels",)),
    **dict.fromkeys(("num_layers", "n_layers", "depth"), ("count",)),
    "hidden_size": ("dim", "hidden"),
    "size": ("count",),
    "n_head": ("heads",),
    "dtype": ("to",),
}
"""For each option name in other libraries, the possible names in Treadle, or an argument in place of `True`."""

_WITH_OPTIONS = {
    "gelu approximate='tanh'": "t.gelu_tanh(x)",
    "gelu approximate='none'": "t.gelu(x)",
    "cat dim": "t.concat(x, x, axis={})",
    "stack dim": "t.concat(x.unsqueeze({}), y.unsqueeze({}), axis={})",
    "gather dim": "t.take_along_axis(x, positions, axis={})  # or x.gather({}, positions)",
    "gather index": "t.take_along_axis(x, positions, axis=-1)  # or x.gather(-1, positions)",
    "elu alpha": "t.relu(x) + {} * t.expm1(t.minimum(x, 0.0))",
    "celu alpha": "t.relu(x) + {} * t.expm1(t.minimum(x, 0.0) / {})",
    "leaky_relu negative_slope": "t.where(x > 0, x, {} * x)",
    "softplus beta": "t.softplus({} * x) / {}",
    "round decimals": "t.round(x * 10**{}) / 10**{}",
    "add alpha": "x + {} * y",
    "sub alpha": "x - {} * y",
    "div rounding_mode='floor'": "x // y",
    "div rounding_mode=None": "x / y",
}
_LEFT_OUT_OPTIONS = {
    "inplace out": "results are new values",
    "p training dropout dropout_p": "a graph has no random numbers, also in training",
    "requires_grad": "t.Trainer(model, trained=[...]) names the weights to train",
    "device": 'target="cuda" of t.compile chooses the device',
    "memory_format": "values have no layout in memory",
    "enable_gqa": "fewer heads of k and v are repeated for the heads of q",
    "in_features normalized_shape embed_dim input_size": "the size is that of the last axis of x",
    "in_channels num_channels": "their number is the size of axis 1 of x",
    "elementwise_affine affine": "a norm has a weight, and a bias unless bias=False",
    "padding_idx": "mask=t.padding(lengths) of attention excludes padding",
    "need_weights": "the probabilities are not returned",
}

LEFT_OUT_OPTIONS = {word: reason for words, reason in _LEFT_OUT_OPTIONS.items() for word in words.split()}
"""Options of other libraries that have no effect here, with the reason."""


def without_option(function: str, option: str, value: object) -> str | None:
    """Return the call that computes what a function of another library computes with an option that Treadle lacks."""
    spelled = _WITH_OPTIONS.get(f"{function} {option}={value!r}") or _WITH_OPTIONS.get(f"{function} {option}")
    return None if spelled is None else spelled.replace("{}", repr(value))


MODEL_NAMES: dict[str, tuple[str, ...]] = {
    other: tuple(ours.split())
    for ours, others in {
        "vocab": "vocab_size n_vocab vocabulary",
        "context": "max_position_embeddings n_positions n_ctx block_size max_seq_len max_length",
        "dim": "hidden_size n_embd d_model embed_dim embedding_dim hidden_dim width",
        "heads": "num_attention_heads n_head n_heads num_heads nhead",
        "kv_heads": "num_key_value_heads n_kv_heads num_kv_heads",
        "layers": "num_hidden_layers n_layer n_layers num_layers depth",
        "hidden": "intermediate_size n_inner d_ff ffn_dim dim_feedforward",
        "act": "hidden_act activation activation_function",
        "eps": "layer_norm_eps layer_norm_epsilon rms_norm_eps norm_eps",
        "base": "rope_theta rotary_base",
        "tied": "tie_word_embeddings tie_weights",
        "labels classes": "num_labels num_classes n_classes",
        "tokens": "input_ids ids inputs",
        "lengths": "attention_mask mask",
        "token_types": "token_type_ids",
        "decoder_tokens": "decoder_input_ids",
        "pixels": "pixel_values",
        "features": "input_features",
    }.items()
    for other in others.split()
}
"""Names of configurations and inputs of models in other libraries, with the names in the models of the zoo."""

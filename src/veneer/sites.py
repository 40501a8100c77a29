"""Sites: the places of a model where a method may act."""

from __future__ import annotations

from dataclasses import dataclass

PORTS = ("weight", "param", "hidden", "kv", "embed")


@dataclass(frozen=True)
class Slice:
    """A part of an output dimension of size `groups * stride`: rows `start:stop` of every group.

    A contiguous part has one group. GPT-NeoX's fused qkv has a group for each head, of stride 3 * head_dim.
    """

    groups: int
    stride: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.groups * (self.stop - self.start)


@dataclass(frozen=True)
class Site:
    """A place where a method may act.

    path    the module that is changed there ('' is the model itself)
    port    'weight', 'param', 'hidden', 'kv' or 'embed'
    role    'attn.q', 'ffn.down', 'attn', 'norm', 'head', …; '' where structure gives none
    layer   number of the layer in its tower, counted from 0; None outside the layers
    tower   'encoder', 'decoder', 'text', 'vision', 'audio'

    weight  the map y = Wx + b. `kind` is 'linear' (W is out x in), 'transposed' (HF Conv1D, in x out), 'conv',
            'embedding' (V x d; out = d, in = V), 'tensor' (a 2-D parameter that its module's forward reads itself, as
            nn.MultiheadAttention's in_proj_weight; out x in) or 'experts' (a 3-D parameter E x out x in, or
            E x in x out where `transposed`). `tensor` names the parameter, `out` and `inp` are the sizes of the part
            that the site covers, `enter` (where given) the module that reads it, `slice` says which part of the output
            dimension that is (None: all of it).
    param   `tensor` is the name of a parameter of `path`, of `shape`.
    hidden  h is what `path` returns, x is the first input of `enter`; both have `width` channels. Roles are blocks ('attn',
            'ffn', …), whose h is not yet added to the residual, and 'layer', whose h is the residual stream itself.
    kv      `path` is the attention module, x the first input of `enter`; `heads` key/value heads of `head_dim`;
            `via` is the mechanism ('registry': transformers' AttentionInterface; 'sdpa': the module calls
            F.scaled_dot_product_attention itself; 'mha': it is an nn.MultiheadAttention).
    embed   `path` is the module that takes the embedded sequence as its argument `argument`; `enter` is the token
            embedding ('' where the sequence comes embedded); `keep` leading positions (a CLS token) stay first.
    """

    path: str
    port: str
    role: str = ""
    layer: int | None = None
    tower: str = ""
    kind: str = ""
    tensor: str = ""
    shape: tuple[int, ...] = ()
    out: int = 0
    inp: int = 0
    slice: Slice | None = None
    experts: int = 0
    transposed: bool = False
    enter: str = ""
    width: int = 0
    heads: int = 0
    head_dim: int = 0
    via: str = ""
    argument: str = ""
    keep: int = 0
    causal: bool = False
    batch_dim: int = 0

"""Small random models of every kind that the library must resolve: name -> how to build it, its inputs, its ports."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, LABELS = 99, 32, 3
ALL = frozenset(("weight", "param", "hidden", "kv", "embed"))


@dataclass(frozen=True)
class Kind:
    """`build()` gives a seeded fp32 model in eval mode; `inputs(batch, length)` what it is called with, padding
    included (the second half of the rows is shorter) where the kind has a mask."""

    build: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    ports: frozenset[str]
    tags: frozenset[str]
    extra: bool = False  # not among the kinds that must work
    memo: dict[str, Any] = field(default_factory=dict, compare=False)


ZOO: dict[str, Kind] = {}


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        state = torch.random.get_rng_state()
        torch.manual_seed(0)
        try:
            model = make().eval().float()
            with torch.no_grad():  # random biases and norms: zeros and ones would hide mistakes
                for name, p in model.named_parameters():
                    if p.is_floating_point() and (p.dim() == 1 or "bias" in name):
                        p.add_(torch.randn_like(p) * 0.1)
        finally:
            torch.random.set_rng_state(state)
        return model

    return build


def _add(name: str, make: Callable[[], nn.Module], inputs: Callable[..., dict[str, Any]], tags: str, *, less: str = "", extra: bool = False) -> None:
    ZOO[name] = Kind(_seeded(make), inputs, ALL - set(less.split()), frozenset(tags.split()), extra)


# -- inputs -----------------------------------------------------------------------------------------------------------
def _ids(batch: int, length: int, low: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(batch * 1000 + length)
    return torch.randint(low, VOCAB - 2, (batch, length), generator=g)


def _mask(batch: int, length: int, left: bool = False) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        n = min(2, length - 1) if row % 2 else 0
        if n:
            mask[row, :n] = 0 if left else mask[row, :n]
            mask[row, length - n :] = mask[row, length - n :] if left else 0
    return mask


def text(batch: int = 2, length: int = 7) -> dict[str, Any]:
    mask = _mask(batch, length)
    return {"input_ids": _ids(batch, length).masked_fill(mask == 0, 1), "attention_mask": mask}


def unmasked(batch: int = 2, length: int = 7) -> dict[str, Any]:
    return {"input_ids": _ids(batch, length)}


def pair(batch: int = 2, length: int = 7) -> dict[str, Any]:
    return {**text(batch, length), "decoder_input_ids": _ids(batch, max(2, length - 2))}


def image(batch: int = 2, length: int = 7, size: int = 16) -> dict[str, Any]:
    g = torch.Generator().manual_seed(batch)
    return {"pixel_values": torch.randn(batch, 3, size, size, generator=g)}


def clip(batch: int = 2, length: int = 7) -> dict[str, Any]:
    inputs = {**text(batch, length), **image(batch)}
    inputs["input_ids"][:, length - 3] = VOCAB - 1  # the end-of-text token, where CLIP pools
    return inputs


def wave(batch: int = 2, length: int = 7) -> dict[str, Any]:
    n = 40 * (length + 1)
    mask = torch.ones(batch, n, dtype=torch.long)
    mask[1::2, n - 80 :] = 0
    return {"input_values": torch.randn(batch, n, generator=torch.Generator().manual_seed(n)) * mask, "attention_mask": mask}


def mel(batch: int = 2, length: int = 7) -> dict[str, Any]:
    g = torch.Generator().manual_seed(batch)
    return {"input_features": torch.randn(batch, 8, 20, generator=g), "decoder_input_ids": _ids(batch, length)}


# -- models without transformers --------------------------------------------------------------------------------------
class TorchEncoder(nn.Module):
    """torch's own encoder with an embedding and a classifier."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.place = nn.Parameter(torch.randn(64, WIDTH) * 0.1)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(WIDTH, LABELS)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.place[: input_ids.shape[1]]
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.classifier(x.mean(1))


class OddBlock(nn.Module):
    """A block whose names say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.alpha, self.beta = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gamma, self.delta = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 80), nn.Linear(80, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.alpha, self.beta, self.gamma))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.delta(a.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.n2(x))))


class HandWritten(nn.Module):
    """Blocks of one's own, with no hint anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.tower = nn.ModuleList([OddBlock(), OddBlock()])
        self.last = nn.LayerNorm(WIDTH)
        self.answer = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for block in self.tower:
            x = block(x)
        return self.answer(self.last(x))


# -- transformers -----------------------------------------------------------------------------------------------------
def _hf(name: str, config: str, head: str, inputs: Callable[..., dict[str, Any]], tags: str, *, less: str = "", extra: bool = False, **options: Any) -> None:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, head)(getattr(transformers, config)(**options))

    _add(name, make, inputs, tags, less=less, extra=extra)


def _own_attention(family: str) -> str:
    """'kv' where this version of transformers has the family compute attention in its own code, which no prefix can enter."""
    root = importlib.util.find_spec("transformers").submodule_search_locations[0]  # type: ignore[union-attr, index]
    return "" if "ALL_ATTENTION_FUNCTIONS" in (Path(root) / "models" / family / f"modeling_{family}.py").read_text() else "kv"


_BERT = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, num_labels=LABELS,
    max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
_ROBERTA = {**_BERT, "pad_token_id": 1}
_hf("bert", "BertConfig", "BertForSequenceClassification", text, "encoder", **_BERT)
_hf("roberta", "RobertaConfig", "RobertaForTokenClassification", text, "encoder", **_ROBERTA)
_hf(
    "distilbert",
    "DistilBertConfig",
    "DistilBertForSequenceClassification",
    text,
    "encoder",
    vocab_size=VOCAB,
    dim=WIDTH,
    n_layers=2,
    n_heads=4,
    hidden_dim=48,
    num_labels=LABELS,
    max_position_embeddings=64,
    dropout=0.0,
    attention_dropout=0.0,
    seq_classif_dropout=0.0,
)
_hf("electra", "ElectraConfig", "ElectraForSequenceClassification", text, "encoder", embedding_size=16, **_BERT)
_hf("mpnet", "MPNetConfig", "MPNetForSequenceClassification", text, "encoder", less="kv", **_ROBERTA)
_hf("albert", "AlbertConfig", "AlbertForSequenceClassification", text, "encoder", embedding_size=16, classifier_dropout_prob=0.0, **_BERT)
_hf(
    "deberta_v2",
    "DebertaV2Config",
    "DebertaV2ForSequenceClassification",
    text,
    "encoder",
    less="kv",
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_biased_input=False,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    position_buckets=8,
    **_BERT,
)

_LLAMA = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_hf("llama", "LlamaConfig", "LlamaForCausalLM", text, "decoder", **_LLAMA)
_hf("qwen3", "Qwen3Config", "Qwen3ForCausalLM", text, "decoder", head_dim=16, **_LLAMA)
_hf(
    "gemma3",
    "Gemma3TextConfig",
    "Gemma3ForCausalLM",
    text,
    "decoder",
    head_dim=16,
    sliding_window=4,
    layer_types=["sliding_attention", "full_attention"],
    **_LLAMA,
)
_hf("mistral", "MistralConfig", "MistralForCausalLM", text, "decoder", sliding_window=None, **_LLAMA)
_hf(
    "gpt2",
    "GPT2Config",
    "GPT2LMHeadModel",
    text,
    "decoder",
    vocab_size=VOCAB,
    n_embd=WIDTH,
    n_layer=2,
    n_head=4,
    n_positions=64,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=1,
    eos_token_id=2,
)
_hf(
    "gpt_neox",
    "GPTNeoXConfig",
    "GPTNeoXForCausalLM",
    text,
    "decoder",
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
_hf("phi3", "Phi3Config", "Phi3ForCausalLM", text, "decoder", **_LLAMA)
_hf(
    "opt",
    "OPTConfig",
    "OPTForCausalLM",
    text,
    "decoder",
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=48,
    max_position_embeddings=64,
    dropout=0.0,
    word_embed_proj_dim=WIDTH,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=2,
)
_FALCON = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
               bos_token_id=1, eos_token_id=2, hidden_dropout=0.0, attention_dropout=0.0, alibi=False)  # fmt: skip
_hf("falcon", "FalconConfig", "FalconForCausalLM", text, "decoder", new_decoder_architecture=True, num_kv_heads=2, **_FALCON)
_hf("mixtral", "MixtralConfig", "MixtralForCausalLM", text, "decoder moe", num_local_experts=4, num_experts_per_tok=2, sliding_window=None, **_LLAMA)

_T5 = dict(vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)
_hf("t5", "T5Config", "T5ForConditionalGeneration", pair, "encdec", feed_forward_proj="gated-gelu", tie_word_embeddings=False, **_T5)
_BART = dict(
    vocab_size=VOCAB, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0, num_labels=LABELS, pad_token_id=1,
    bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
_hf("bart", "BartConfig", "BartForConditionalGeneration", pair, "encdec", **_BART)

_VIT = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8,
            num_labels=LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
_hf("vit", "ViTConfig", "ViTForImageClassification", image, "vision", less="embed", **_VIT)


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    one = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, projection_dim=24)
    words = dict(vocab_size=VOCAB, max_position_embeddings=64, eos_token_id=VOCAB - 1, bos_token_id=1, pad_token_id=1)
    return CLIPModel(CLIPConfig(text_config={**one, **words}, vision_config={**one, "image_size": 16, "patch_size": 8}, projection_dim=24))


_add("clip", _clip, clip, "vision text")
_hf(
    "swin",
    "SwinConfig",
    "SwinForImageClassification",
    lambda b=2, n=7: image(b, n, 32),
    "vision",
    less="embed",
    image_size=32,
    patch_size=2,
    embed_dim=16,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=4,
    num_labels=LABELS,
    hidden_dropout_prob=0.0,
    drop_path_rate=0.0,
)
_hf(
    "convnext",
    "ConvNextConfig",
    "ConvNextForImageClassification",
    lambda b=2, n=7: image(b, n, 32),
    "vision conv",
    less="embed kv",
    num_stages=2,
    hidden_sizes=[16, WIDTH],
    depths=[2, 2],
    num_labels=LABELS,
    drop_path_rate=0.0,
)
_hf(
    "whisper",
    "WhisperConfig",
    "WhisperForConditionalGeneration",
    mel,
    "audio encdec",
    vocab_size=VOCAB,
    d_model=WIDTH,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    num_mel_bins=8,
    max_source_positions=10,
    max_target_positions=64,
    dropout=0.0,
    pad_token_id=1,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)
_WAVE = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=[16, 16], conv_kernel=[10, 4],
             conv_stride=[10, 4], num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, vocab_size=VOCAB,
             num_labels=LABELS, classifier_proj_size=16, hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0,
             activation_dropout=0.0, layerdrop=0.0, final_dropout=0.0, apply_spec_augment=False, feat_extract_norm="layer")  # fmt: skip
_hf("wav2vec2", "Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", wave, "audio", **_WAVE)
_hf(
    "mamba",
    "MambaConfig",
    "MambaForCausalLM",
    text,
    "decoder ssm",
    less="kv",
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_hidden_layers=2,
    state_size=4,
    time_step_rank=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_add("torch_encoder", TorchEncoder, unmasked, "encoder plain")
_add("hand_written", HandWritten, unmasked, "decoder plain", less="embed")

# -- kinds that nothing was written for -------------------------------------------------------------------------------
_add("torch_encoder_second", lambda: TorchEncoder(batch_first=False), unmasked, "encoder plain", extra=True)
_hf(
    "modernbert",
    "ModernBertConfig",
    "ModernBertForSequenceClassification",
    text,
    "encoder",
    extra=True,
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    num_labels=LABELS,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=3,
    cls_token_id=2,
    sep_token_id=3,
    global_attn_every_n_layers=2,
    local_attention=8,
)
_hf(
    "bloom",
    "BloomConfig",
    "BloomForCausalLM",
    text,
    "decoder",
    less="kv",
    extra=True,
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    n_layer=2,
    n_head=4,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
_hf(
    "gptj",
    "GPTJConfig",
    "GPTJForCausalLM",
    text,
    "decoder",
    less=_own_attention("gptj"),
    extra=True,
    vocab_size=VOCAB,
    n_embd=WIDTH,
    n_layer=2,
    n_head=4,
    rotary_dim=4,
    n_positions=64,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=1,
    eos_token_id=2,
)
_hf(
    "codegen",
    "CodeGenConfig",
    "CodeGenForCausalLM",
    text,
    "decoder",
    less=_own_attention("codegen"),
    extra=True,
    vocab_size=VOCAB,
    n_embd=WIDTH,
    n_layer=2,
    n_head=4,
    rotary_dim=4,
    n_positions=64,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=1,
    eos_token_id=2,
)
_hf("mpt", "MptConfig", "MptForCausalLM", text, "decoder", less="kv", extra=True, vocab_size=VOCAB, d_model=WIDTH, n_layers=2, n_heads=4, max_seq_len=64)
_hf("falcon_multi", "FalconConfig", "FalconForCausalLM", text, "decoder", extra=True, multi_query=True, **_FALCON)
_hf("falcon_heads", "FalconConfig", "FalconForCausalLM", text, "decoder", extra=True, multi_query=False, **_FALCON)
_hf(
    "gpt_bigcode",
    "GPTBigCodeConfig",
    "GPTBigCodeForCausalLM",
    text,
    "decoder",
    extra=True,
    vocab_size=VOCAB,
    n_embd=WIDTH,
    n_layer=2,
    n_head=4,
    n_positions=64,
    multi_query=True,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
_hf(
    "qwen2_moe",
    "Qwen2MoeConfig",
    "Qwen2MoeForCausalLM",
    text,
    "decoder moe",
    extra=True,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=40,
    decoder_sparse_step=1,
    **_LLAMA,
)
_hf(
    "gpt_oss",
    "GptOssConfig",
    "GptOssForCausalLM",
    text,
    "decoder moe",
    extra=True,
    num_local_experts=4,
    num_experts_per_tok=2,
    head_dim=8,
    sliding_window=4,
    **_LLAMA,
)
_hf("glm", "GlmConfig", "GlmForCausalLM", text, "decoder", extra=True, head_dim=8, **_LLAMA)
_hf("xlm_roberta", "XLMRobertaConfig", "XLMRobertaForSequenceClassification", text, "encoder", extra=True, **_ROBERTA)
_hf(
    "dinov2",
    "Dinov2Config",
    "Dinov2ForImageClassification",
    image,
    "vision",
    extra=True,
    mlp_ratio=2,
    **{k: v for k, v in _VIT.items() if k != "intermediate_size"},
)
_hf("hubert", "HubertConfig", "HubertForSequenceClassification", wave, "audio", extra=True, **_WAVE)
_hf("t5_first", "T5Config", "T5ForConditionalGeneration", pair, "encdec", extra=True, feed_forward_proj="relu", **_T5)
_hf("mbart", "MBartConfig", "MBartForSequenceClassification", lambda b=2, n=7: _with_eos(text(b, n)), "encdec", extra=True, **_BART)
_hf(
    "qwen3_next",
    "Qwen3NextConfig",
    "Qwen3NextForCausalLM",
    text,
    "decoder ssm moe",
    extra=True,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=40,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
    **_LLAMA,
)


def _with_eos(inputs: dict[str, Any]) -> dict[str, Any]:
    """One end-of-sequence token a row, at its end: where BART's classifiers read."""
    last = inputs["attention_mask"].sum(1) - 1
    inputs["input_ids"][torch.arange(len(last)), last] = 2
    return inputs


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The model's main floating-point output."""
    return main(model(**inputs))


def main(out: Any) -> Tensor:
    """The main floating-point tensor of a model's answer."""
    if isinstance(out, Tensor):
        return out
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(out, key, None) is not None:
            return getattr(out, key)
    return out[0]


def loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """A scalar that depends on every element of the output, differently on each."""
    y = output(model, inputs).float()
    weights = torch.linspace(-1.0, 1.0, y.numel(), device=y.device).reshape(y.shape)
    return (y * weights).sum() + (y**2).mean()

"""Hints, data only: the words that modules are called by, and the layouts of fused projections that shapes cannot tell.

Nothing here is code that a model runs through; a family that is not listed is resolved by names and shapes alone.
"""

from __future__ import annotations

# -- words ------------------------------------------------------------------------------------------------------------
# A map's own name, less these, is looked up below: 'q_proj', 'to_q', 'W_q', 'q_lin' and 'linear_q' are all 'q'.
NOISE = frozenset(
    "proj projection lin linear layer dense w to fc weight net map mat matrix attn att attention c head heads"
    " self selfattn selfattention mlp ffn ff feed forward".split()
)
Q = frozenset("q query queries wq qs receptance q_b".split())
K = frozenset("k key keys wk ks".split())
V = frozenset("v value values val vals wv vs".split())
QKV = frozenset("qkv wqkv query_key_value q_k_v queries_keys_values packed_qkv fused_qkv qkvs".split())
KV = frozenset("kv wkv key_value k_v kvs kv_b".split())
QK = frozenset("qk wqk query_key q_k".split())
FUSED_NAMES = frozenset("c_attn att_proj attn_proj".split())  # fused by convention, though the name does not say so
OUT = frozenset("o out output wo final c_proj proj dense post".split())

GATE = frozenset("gate w1 wi_0 gate_up wg v1".split())
UP = frozenset("up w3 wi_1 wi up_gate".split())
DOWN = frozenset("down w2 wo 2 out output".split())
ROUTER = frozenset("router gate shared_expert_gate route gating switch classifier".split())

CROSS = ("cross", "encoder_att", "encdec", "enc_dec", "encoder_decoder", "xattn", "multihead_attn", "src_att", "context_att", "memory_att")

MODALITY = {
    "vision": frozenset("vision visual image img video pixel".split()),
    "audio": frozenset("audio speech sound acoustic".split()),
    "text": frozenset("text language llm".split()),
}
SIDES = frozenset(("encoder", "decoder"))

TOKEN_EMBEDDING = frozenset(
    "word_embeddings word_embedding embed_tokens wte shared token_embedding token_embeddings tok_embeddings tok_emb token_emb"
    " embed_in tokens embedding emb embed embeddings word_emb".split()
)
NOT_TOKENS = ("pos", "type", "segment", "relative", "bias", "wpe", "layer", "time", "distance", "norm")
CLASS_TOKEN = frozenset("cls_token class_token class_embedding cls class_emb cls_embedding".split())
HEAD = frozenset(
    "lm_head head classifier score qa_outputs classification_head cls logits predictions generator projector proj_out"
    " embed_out output_head pre_classifier fc_head heads qa_output span_classifier mlm_head nsp_head".split()
)
EMBEDDED = frozenset(  # first arguments that carry an embedded sequence
    "inputs_embeds hidden_states hidden_state embeddings embedding_output src tgt x h embeds tokens inputs input".split()
)
WIDTHS = ("in_features", "infeatures"), ("out_features", "outfeatures")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "h", "nh", "n_heads_local")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "d_kv", "dim_head", "head_size", "attention_head_dim", "hd", "d_head")

# -- fused projections ------------------------------------------------------------------------------------------------
# The default is 'qkv' one after the other, as wide as the output projection's input and the rest in halves.
#   heads   for each head its q, k and v          groups  for each key/value head its queries, then k and v
#   mp:N    N parts, each with its share of q, v and k (CodeGen was sharded so)
# A rule is (attribute of the configuration, value, layout); the first that holds is taken, and '' always does.
LAYOUTS: dict[str, tuple[tuple[str, object, str], ...]] = {
    "gpt_neox": (("", None, "heads"),),
    "gpt_neox_japanese": (("", None, "heads"),),
    "bloom": (("", None, "heads"),),
    "persimmon": (("", None, "heads"),),
    "codegen": (("", None, "mp:4"),),
    "gpt_bigcode": (("multi_query", True, "qkv"), ("", None, "heads")),
    "falcon": (("new_decoder_architecture", True, "groups"), ("multi_query", True, "qkv"), ("", None, "heads")),
}
# Fused gate and up: 'gate_up' (gate first, the default), 'up_gate', or 'pairs' (gate and up take turns).
GATE_UP: dict[str, str] = {"gpt_oss": "pairs"}

# Families whose attention is causal though no module says so.
CAUSAL = frozenset("bloom mpt mamba mamba2 falcon_mamba rwkv gpt_bigcode xglm biogpt".split())

"""Hints for the few families whose structure cannot be read off names and shapes. Data only."""

from __future__ import annotations

# How a fused qkv projection lays out its rows, by config.model_type; all others are [q; k; v].
#   per_head     for every head its q, k and v
#   per_group    for every group of heads its queries, one k, one v (Falcon 40B)
#   codegen      four blocks, each q, v, k
FUSED = {"gpt_neox": "per_head", "gpt_neox_japanese": "per_head", "bloom": "per_head", "codegen": "codegen", "falcon": "falcon"}

# Decoders whose attention modules do not say that they are causal.
CAUSAL = {"falcon", "bloom", "mpt", "mamba", "mamba2", "falcon_mamba", "gptj", "codegen", "rwkv", "gpt_neo", "xglm", "ctrl"}

# Names of projections, lower case.
Q = {"q", "query", "q_proj", "q_lin", "query_proj", "wq", "w_q", "to_q", "q_linear", "query_layer", "linear_q", "queries", "query_linear", "to_query", "to_queries"}
K = {"k", "key", "k_proj", "k_lin", "key_proj", "wk", "w_k", "to_k", "k_linear", "key_layer", "linear_k", "keys", "key_linear", "to_key", "to_keys"}
V = {"v", "value", "v_proj", "v_lin", "value_proj", "wv", "w_v", "to_v", "v_linear", "value_layer", "linear_v", "values", "value_linear", "to_value", "to_values"}
QKV = {"qkv", "c_attn", "query_key_value", "qkv_proj", "wqkv", "to_qkv", "qkv_linear", "attn_qkv", "in_proj_qkv", "fused_qkv", "qkv_layer"}
O = {"o", "o_proj", "out_proj", "out_lin", "dense", "c_proj", "wo", "w_o", "to_out", "proj", "projection", "output", "out", "linear_out", "o_lin", "output_proj", "mix"}  # noqa: E741
GATE = {"gate_proj", "wi_0", "w1", "gate", "w_gate", "gate_linear", "gate_layer"}
CROSS = ("cross", "encoder_attn", "encdecattention", "multihead_attn", "encoder_attention")
FUSED_EXPERTS = {"gate_up_proj": ("ffn.gate", "ffn.up"), "down_proj": ("ffn.down",), "up_proj": ("ffn.up",), "gate_proj": ("ffn.gate",), "w1": ("ffn.gate",), "w2": ("ffn.down",), "w3": ("ffn.up",)}
TOWERS = {"vision": "vision", "visual": "vision", "image": "vision", "text": "text", "language": "text", "audio": "audio", "speech": "audio"}

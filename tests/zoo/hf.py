"""Hugging Face text models: decoders, encoders, encoder-decoders. Built from configs, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.zoo.entry import HIDDEN, TIME, VOCABULARY, WIDTH, Build, Entry, token_ids

# Llama's names of the sizes, which most models share.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SPECIAL_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER: dict[str, Any] = {**SIZES, **SPECIAL_TOKENS, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
ENCODER: dict[str, Any] = {**SIZES, "pad_token_id": 0, "max_position_embeddings": 64, "type_vocab_size": 2}
T5: dict[str, Any] = {
    **SPECIAL_TOKENS,
    **{"vocab_size": VOCABULARY, "d_model": WIDTH, "d_ff": HIDDEN, "d_kv": 8, "num_heads": 4},
    **{"num_layers": 2, "decoder_start_token_id": 1},
}


def huggingface(config: str, model: str, inputs: Callable[[], dict[str, Any]], **options: Any) -> Build:
    """A class of transformers from a class of configs with these options."""

    def build() -> tuple[nn.Module, dict[str, Any]]:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options)), inputs()

    return build


def next_token() -> dict[str, Any]:
    tokens = token_ids()
    return {"input_ids": tokens, "labels": tokens}


def masked_tokens(size: int = TIME) -> dict[str, Any]:
    tokens = token_ids(size)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def translation() -> dict[str, Any]:
    return {"input_ids": token_ids(), "labels": token_ids(7)}


def _decoder(name: str, down: str, note: str = "", options: dict[str, Any] = DECODER, **more: Any) -> Entry:
    build = huggingface(f"{name}Config", f"{name}ForCausalLM", next_token, **options | more)
    return Entry(name=name, family="HF decoder", build=build, down=down, note=note)


def _encoder(name: str, down: str, note: str = "", size: int = TIME, **more: Any) -> Entry:
    build = huggingface(f"{name}Config", f"{name}ForMaskedLM", lambda: masked_tokens(size), **ENCODER | more)
    return Entry(name=name, family="HF encoder", build=build, down=down, note=note)


_MIXTURE: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LOW_RANK_ATTENTION: dict[str, Any] = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_nope_head_dim": 8}

DECODERS = [
    _decoder("Llama", r"\.mlp\.down_proj\.weight$", "gated"),
    _decoder("Phi3", r"\.mlp\.down_proj\.weight$", "gate and up in one matrix, parted by chunk"),
    Entry(
        name="Gemma3n",
        family="HF decoder",
        build=huggingface(
            "Gemma3nTextConfig",
            "Gemma3nForCausalLM",
            next_token,
            **DECODER | {"intermediate_size": [HIDDEN, HIDDEN], "num_kv_shared_layers": 0, "altup_num_inputs": 2},
            **{"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "laurel_rank": 8},
            **{"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.95, 0.0]},
        ),
        down=r"\.mlp\.down_proj\.weight$",
        note="AltUp, low-rank LAuReL branch, gate per layer, sparse activation by mean and deviation",
    ),
    Entry(
        name="GPT2",
        family="HF decoder",
        build=huggingface(
            "GPT2Config",
            "GPT2LMHeadModel",
            next_token,
            **{"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_inner": HIDDEN, "n_layer": 2, "n_head": 4},
            n_positions=64,
        ),
        down=r"\.mlp\.c_proj\.weight$",
        note="addmm with weights [in, out]; the activation is spelt out",
    ),
    _decoder(
        "OPT",
        r"\.fc2\.weight$",
        "projections in the layer itself, tokens flattened to two dimensions",
        **{"ffn_dim": HIDDEN, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 64},
    ),
    _decoder(
        "Bloom",
        r"\.mlp\.dense_4h_to_h\.weight$",
        "its activation is an autograd.Function: memory cannot be added; Dynamo breaks the graph there",
        options={**SPECIAL_TOKENS, "vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4},
    ),
    _decoder("GPTNeoX", r"\.mlp\.dense_4h_to_h\.weight$", "attention and FFN in parallel", max_position_embeddings=64),
    _decoder("Apertus", r"\.mlp\.down_proj\.weight$", "the activation xIELU learns two numbers"),
    _decoder(
        "Jamba",
        r"layers\.0\.feed_forward\.down_proj\.weight$",
        "Mamba and attention; FFN and mixture of experts",
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 4},
    ),
    _decoder(
        "DeepseekV3",
        r"layers\.0\.mlp\.down_proj\.weight$",
        "low-rank attention; one dense layer, then routed and shared experts",
        **{**_MIXTURE, **_LOW_RANK_ATTENTION, "first_k_dense_replace": 1, "n_shared_experts": 2, "n_group": 1},
        **{"topk_group": 1, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    ),
]

_BERT_DOWN = r"(?<!attention)\.output\.dense\.weight$"

ENCODERS = [
    _encoder("Bert", _BERT_DOWN, "post-norm"),
    _encoder("Albert", r"\.ffn_output\.weight$", "one FFN for all layers", embedding_size=24, num_hidden_layers=3),
    _encoder("DebertaV2", _BERT_DOWN, "relative attention", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _encoder(
        "ModernBert",
        r"\.mlp\.Wo\.weight$",
        "gate and up in one matrix; local attention",
        **{**SPECIAL_TOKENS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8, "mlp_dropout": 0.1},
    ),
    _encoder("Longformer", _BERT_DOWN, "windowed attention", size=16, attention_window=[4, 4]),
]

ENCODER_DECODERS = [
    Entry(
        name=name,
        family="HF encoder-decoder",
        build=huggingface(f"{name}Config", f"{name}ForConditionalGeneration", translation, **options),
        down=down,
        note=note,
    )
    for name, down, note, options in (
        ("T5", r"\.DenseReluDense\.wo\.weight$", "down-projection kept in fp32, hidden activation clamped", T5),
        ("MT5", r"\.DenseReluDense\.wo\.weight$", "gated", T5),
        (
            "Bart",
            r"\.fc2\.weight$",
            "post-norm, cross-attention",
            {
                **SPECIAL_TOKENS,
                **{"vocab_size": VOCABULARY, "d_model": WIDTH, "max_position_embeddings": 64},
                **{"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": HIDDEN},
                **{"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": HIDDEN},
                **{"decoder_start_token_id": 1, "forced_eos_token_id": None},
            },
        ),
    )
]

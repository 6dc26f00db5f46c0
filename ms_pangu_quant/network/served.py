"""The network as MindFormers' own callers call it: serving in PyNative mode, with one compiled construct.

vLLM-MindSpore leaves the process in PyNative mode and expects a model to compile its own construct with MindFormers'
`jit`, to take MindFormers' arguments by name, and to describe their dynamic shapes in MindFormers' order. The rest of this
package compiles whole cells instead (network/pangu.py). Same network, same weights, another door.
Source: vllm_mindspore 0.5.1, model_executor/models/mf_models/mindformers.py; mindformers 1.9, models/qwen3.
"""

from __future__ import annotations

from mindformers.models.utils import jit
from mindformers.parallel_core.inference.model_utils import InferModelMixin
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from ms_pangu_quant.network import pangu


class ServedPanguForCausalLM(pangu.PanguEmbeddedForCausalLM):
    """Registered in place of its base by use_for_serving()."""

    @jit
    def construct(
        self,
        input_ids,
        hidden_states=None,
        positions=None,
        batch_valid_length=None,
        context_lens_tensor=None,
        q_seq_lens=None,
        block_tables=None,
        slot_mapping=None,
        attention_mask=None,
        attn_metadata=None,
        attn_padding_idx=None,
        attn_unpadding_idx=None,
        ffn_padding_idx=None,
        ffn_unpadding_idx=None,
        key_cache=None,
        value_cache=None,
    ):
        return self.model(
            input_ids=input_ids,
            hidden_states=hidden_states,
            positions=positions,
            batch_valid_length=batch_valid_length,
            context_lens_tensor=context_lens_tensor,
            q_seq_lens=q_seq_lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            attention_mask=attention_mask,
            attn_metadata=attn_metadata,
            attn_padding_idx=attn_padding_idx,
            attn_unpadding_idx=attn_unpadding_idx,
            ffn_padding_idx=ffn_padding_idx,
            ffn_unpadding_idx=ffn_unpadding_idx,
            key_cache=key_cache,
            value_cache=value_cache,
        )

    def set_dynamic_inputs(self, **kwargs):
        InferModelMixin.set_dynamic_inputs(self, **kwargs)


def use_for_serving() -> None:
    """MindFormers builds this class for the architecture PanguEmbeddedForCausalLM from now on."""
    MindFormerRegister.register_cls(
        ServedPanguForCausalLM, MindFormerModuleType.MODELS, alias="PanguEmbeddedForCausalLM", legacy=False
    )

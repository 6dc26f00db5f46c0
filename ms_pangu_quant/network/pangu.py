"""openPangu-Embedded as a MindFormers network: config, registration, weight map, construction.

The network is MindFormers' inference GPTModel; a backend supplies the cells its device needs (backends/). Importing this
module registers "PanguEmbedded" with MindFormers, so that its own builders find the network too. The process must have
been started with network.runtime.start().
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mindspore as ms
import numpy as np
from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.models.model_config_utils import ignore_and_delete_parameter
from mindformers.models.modeling_utils import PreTrainedModel
from mindformers.parallel_core.inference.base_models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from mindformers.parallel_core.inference.model_utils import InferModelMixin
from mindformers.parallel_core.inference.quantization.utils import get_quant_config
from mindformers.parallel_core.inference.transformer.transformer_block import TransformerBlockSubmodules
from mindformers.parallel_core.utils.model_mixin import ModelMixin
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Tensor, mutable, nn

from ms_pangu_quant.backends import Backend, current_backend
from ms_pangu_quant.backends.cut import let_ranks_meet, set_cache_loaders
from ms_pangu_quant.checkpoint import layout
from ms_pangu_quant.checkpoint.config import HADAMARD_METHOD, ModelConfig
from ms_pangu_quant.errors import CheckpointError
from ms_pangu_quant.formats.reader import open_checkpoint
from ms_pangu_quant.formats.words import word_of
from ms_pangu_quant.network import runtime
from ms_pangu_quant.network.linear import PanguQuantConfig
from ms_pangu_quant.network.versions import release_graphs, to_transformer_config
from ms_pangu_quant.network.weights import served_tensors
from ms_pangu_quant.recipe.plan import Plan
from ms_pangu_quant.recipe.scheme import TensorScheme

WEIGHT_MAPPING = [
    ("model.embed_tokens.", "embedding.word_embeddings."),
    (f".{layout.Q_PROJ.name}.", ".self_attention.linear_q."),
    (f".{layout.K_PROJ.name}.", ".self_attention.linear_k."),
    (f".{layout.V_PROJ.name}.", ".self_attention.linear_v."),
    (f".{layout.O_PROJ.name}.", ".self_attention.linear_proj."),
    (f".{layout.GATE_PROJ.name}.", ".mlp.gating."),
    (f".{layout.UP_PROJ.name}.", ".mlp.hidden."),
    (f".{layout.DOWN_PROJ.name}.", ".mlp.linear_fc2."),
    (f".{layout.MLP_NORM}.", ".pre_mlp_layernorm."),
    (".self_attn.core_attention.", ".self_attention.core_attention."),
    ("model.norm.", "decoder.final_layernorm."),
    ("lm_head.", "output_layer."),
    ("model.layers.", "decoder.layers."),
]


OF_MINDFORMERS = {  # fields of its configs that a config.json does not have
    "seq_length": 4096,
    "block_size": 16,
    "num_blocks": 512,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_mlp_fc1_bias_linear": False,
    "add_mlp_fc2_bias_linear": False,
    "use_flash_attention": True,  # 1.7 looks for it here
}


@MindFormerRegister.register(MindFormerModuleType.CONFIG, legacy=False, search_names="PanguEmbedded")
class PanguEmbeddedConfig(PretrainedConfig):
    """config.json of openPangu-Embedded; defaults are the 7B's. `bias` is on q, k, v and, if output_bias does not say
    otherwise, on o, never on the MLP."""

    model_type = "PanguEmbedded"

    @ignore_and_delete_parameter(extra_ignore_param=[])
    def __init__(
        self,
        vocab_size=153376,
        hidden_size=4096,
        intermediate_size=12800,
        num_hidden_layers=34,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=None,
        hidden_act="silu",
        max_position_embeddings=32768,
        initializer_range=0.02,
        rms_norm_eps=1e-5,
        rope_theta=16000000.0,
        bias=True,
        output_bias=None,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.bias = bias
        self.output_bias = bias if output_bias is None else output_bias
        super().__init__(tie_word_embeddings=tie_word_embeddings, **{**OF_MINDFORMERS, **kwargs})

    def convert_to_transformer_config(self, is_mla_model: bool = False):
        with runtime.quiet():  # the converter prints a table of every field
            return to_transformer_config(self.to_dict(), is_mla_model)


class PanguPreTrainedModel(PreTrainedModel, ModelMixin):
    config_class = PanguEmbeddedConfig
    base_model_prefix = "PanguEmbedded"
    weight_mapping = WEIGHT_MAPPING

    def convert_to_transformer_config(self, model_config, is_mla_model=False):
        """The config's own, which MindFormers 1.7 does not ask."""
        self.transformer_config = model_config.convert_to_transformer_config(is_mla_model)
        return self.transformer_config


def layer_spec(
    transformer_config: Any,
    backend: Backend,
    num_blocks: int,
    block_size: int,
    *,
    final_norm: bool,
    cache: TensorScheme | None = None,
) -> TransformerBlockSubmodules:
    """MindFormers' decoder layers with the backend's cells in place of its own."""
    spec = get_gpt_layer_local_spec(normalization=transformer_config.normalization, use_flash_attention=True)
    spec.submodules.input_layernorm = backend.norm
    spec.submodules.pre_mlp_layernorm = backend.norm
    if backend.layer is not None:
        spec.module = backend.layer
    if backend.mlp is not None:
        spec.submodules.mlp.module = backend.mlp
    spec.submodules.self_attention.submodules.core_attention = backend.core_attention(
        num_blocks=num_blocks, block_size=block_size, cache=cache
    )
    return TransformerBlockSubmodules(
        layer_specs=[spec] * transformer_config.num_layers, layer_norm=backend.norm if final_norm else None
    )


@MindFormerRegister.register(MindFormerModuleType.MODELS, legacy=False)
class PanguEmbeddedForCausalLM(PanguPreTrainedModel, InferModelMixin):
    """The inference network, float or quantized as config.quantization says.

    quant_config  overrides what MindFormers would read from config.pretrained_model_dir.
    whole         False builds the decoder layers alone, without embedding and head.
    backend       whose cells to use; the process's own device's if not given.
    cache         scheme of the key/value cache, whose grids are loaded with the weights; None for floats.
    """

    def __init__(
        self,
        config: PanguEmbeddedConfig,
        quant_config: PanguQuantConfig | None = None,
        whole: bool = True,
        backend: Backend | None = None,
        cache: TensorScheme | None = None,
    ):
        super().__init__(config, auto_prefix=False)
        self.config = config
        self.backend = backend or current_backend()
        self.cache = cache
        transformer_config = self.convert_to_transformer_config(config)
        transformer_config.position_embedding_type = self.backend.rope_name  # the config class knows MindFormers' only
        transformer_config.post_process = whole  # takes precedence over GPTModel's argument
        if quant_config is None:
            described = get_quant_config(config, self.weight_mapping)
            quant_config = described and PanguQuantConfig(described.full_config, self.backend)
        self.quant_config = quant_config
        self.compute_dtype = transformer_config.compute_dtype
        self.vocab_size = transformer_config.vocab_size
        self.is_prefill = True
        self.model = self.backend.gpt_model(
            config=transformer_config,
            transformer_layer_spec=layer_spec(
                transformer_config,
                self.backend,
                config.num_blocks,
                config.block_size,
                final_norm=whole,
                cache=cache,
            ),
            vocab_size=transformer_config.vocab_size,
            max_sequence_length=transformer_config.max_position_embeddings,
            position_embedding_type=transformer_config.position_embedding_type,
            rotary_base=config.rope_theta,
            share_embeddings_and_output_weights=whole and config.tie_word_embeddings,
            pre_process=whole,
            quant_config=quant_config,
        )
        let_ranks_meet(self.model)
        set_cache_loaders(self.model)

    def construct(
        self,
        input_ids,
        positions,
        batch_valid_length,
        context_lens_tensor,
        q_seq_lens,
        block_tables,
        slot_mapping,
        attention_mask,
        key_cache=None,
        value_cache=None,
    ):
        return self.model(
            input_ids=input_ids,
            positions=positions,
            batch_valid_length=batch_valid_length,
            context_lens_tensor=context_lens_tensor,
            q_seq_lens=q_seq_lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            attention_mask=attention_mask,
            key_cache=key_cache,
            value_cache=value_cache,
        )

    def set_phase(self, phase: str) -> None:
        """Choose the graph of the next call: "prefill" (logits after each sequence's last token), "decode" (one token a
        sequence) or "logits" (after every token)."""
        if phase == self.phase:
            return
        self.add_flags_custom_mcore(is_prefill=phase != "decode")
        self.model.all_positions = phase == "logits"
        self.phase = phase

    @property
    def compile_phase(self) -> str:
        return self._compile_phase

    @compile_phase.setter
    def compile_phase(self, value: str) -> None:
        """MindSpore sets it at every call, in each of 500 cells, which takes milliseconds; here only when it changes."""
        if value != self._compile_phase:
            nn.Cell.compile_phase.fset(self, value)

    def set_dynamic_inputs(self, **kwargs):
        """One graph for every number of tokens, sequences and cache blocks."""
        tokens, table = Tensor(shape=[None], dtype=ms.int32), Tensor(shape=[None, None], dtype=ms.int32)
        mask_shape, mask_dtype = self.backend.dynamic_mask
        caches = self.backend.new_caches(0, 1, 1, 1, 1, cache=self.cache)
        if caches is not None:
            cache = Tensor(shape=[None, None, None, None], dtype=ms.int8 if self.cache else self.compute_dtype)
            caches = tuple(mutable([cache] * self.config.num_hidden_layers) for _ in range(2))
        self.set_inputs(
            tokens,
            tokens,
            tokens,
            tokens,
            tokens,
            table,
            tokens,
            Tensor(shape=mask_shape, dtype=mask_dtype),
            *(caches or ()),
        )

    def release(self) -> None:
        """Free what the compiled graphs hold, and the parameters' values: MindSpore's graphs refer to them for ever."""
        for _, cell in self.cells_and_names():
            release_graphs(cell)
        for run, _ in getattr(self.model, "runs", ()):
            run.forget()
        for parameter in self.get_parameters():
            parameter.set_data(Tensor(np.zeros(1), parameter.dtype), slice_shape=True)
            parameter.stored = None  # backends/cpu_tables.py

    def convert_name(self, weight_name: str) -> str:
        """Hugging Face name -> MindFormers name, quantization parameters included."""
        weight_name = super().convert_name(weight_name)
        return weight_name.replace(".weight_scale", ".w_scale") if self.quant_config else weight_name

    def load_weights(self, weights_path=None, weights=None) -> None:
        """MindFormers' entry point: a checkpoint directory (float or written by this package), or its own iterator."""
        if weights_path is None:
            super().load_weights(weights_path, weights)
        else:
            self.load_tensors(served_tensors(open_checkpoint(Path(weights_path)), self.backend, cache=self.cache))

    def load_tensors(self, tensors: Iterable[tuple[str, Any]], *, partly: bool = False) -> None:
        """Load (Hugging Face name, sliceable array) pairs; every parameter must be among them, unless they are only a part.

        Raises CheckpointError naming the parameters that were not loaded.
        """
        named = ((self.convert_name(name), tensor) for name, tensor in tensors)
        loaded = self.model.load_weights(named, self.generate_mapping(), True)
        missing = [
            name
            for name in self.model.get_params_dict()
            if name not in loaded and not name.endswith((".key_cache", ".value_cache"))
        ]
        if self.config.tie_word_embeddings:  # one parameter under two names
            missing = [name for name in missing if name != "output_layer.weight"]
        if missing and not partly:
            raise CheckpointError(f"the network's parameters {', '.join(sorted(missing)[:3])} are not in the checkpoint")
        self.process_weights_after_loading(self.model)

    def process_weights_after_loading(self, root: nn.Cell, name_prefix: str = "model"):
        """MindFormers' walk over all cells; it knows of layers with weights alone."""
        if hasattr(root, "process_grid_after_loading"):
            root.process_grid_after_loading()
        return super().process_weights_after_loading(root, name_prefix)


def build_network(
    config: ModelConfig,
    plan: Plan,
    *,
    num_blocks: int,
    block_size: int = 16,
    whole: bool = True,
    options: Mapping[str, str] = MappingProxyType({}),
    backend: Backend | None = None,
) -> PanguEmbeddedForCausalLM:
    """The network of a checkpoint, parameters not loaded yet.

    plan        schemes of the layers and the cache; only as many decoder layers are built as it has blocks.
    num_blocks  size of the key/value cache in blocks of block_size tokens.
    whole       with embedding and head.
    options     w4a8: how an Ascend device computes int4 weights, auto, grouped or weight_only (backends/ascend.py);
                head: "stored", or "int8": the CPU kernels round a quantized network's when it is loaded.
    backend     whose cells to use; another device's than the process's builds a graph to look at, not to run.
    """
    backend = backend or current_backend()
    mf_config = PanguEmbeddedConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=len(plan.blocks),
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        bias=layout.Q_PROJ in config.biased,
        output_bias=layout.O_PROJ in config.biased,
        tie_word_embeddings=config.tie_word_embeddings,
        pad_token_id=config.pad_token_id or 0,
        num_blocks=num_blocks,
        block_size=block_size,
        position_embedding_type="rope",
        **backend.dtypes,
    )
    network = PanguEmbeddedForCausalLM(mf_config, _quant_config(config, plan, options, backend), whole, backend, plan.cache)
    network.set_train(False)
    return network


def _quant_config(config: ModelConfig, plan: Plan, options: Mapping[str, str], backend: Backend) -> PanguQuantConfig | None:
    """None where every layer is MindFormers' own float one, nothing stands in front of it, and the head is as stored."""
    as_it_is = None not in backend.linear_methods and not config.online_hadamard
    if plan.is_float and as_it_is and options.get("head", "stored") == "stored":
        return None
    described = {
        **{f"{name}.weight": word_of(scheme) for name, _, scheme in plan},
        "weight_mapping": WEIGHT_MAPPING,
        "quantization": "golden-stick",
        "group_size": plan.group_size,
        **options,
        **({"quant_method": HADAMARD_METHOD} if config.online_hadamard else {}),
    }
    return PanguQuantConfig(described, backend)

"""The architectures that are read: what tells one plain decoder from another in its config.json.

All are one network: pre-norm RMSNorm, SwiGLU, rotate-half rope, grouped-query attention. To add one: a row here
(docs/extend.md); what its graph has besides goes into network/pangu.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ms_pangu_quant.checkpoint import layout


@dataclass(frozen=True)
class Architecture:
    """biased    the layers that have biases where the key `bias_key` of config.json is true: of q, k and v, which are
              computed as one, all or none.

    has_biases, rms_norm_eps, rope_theta  what holds where config.json does not say.
    output_bias_key  the key that decides over o_proj's alone, where config.json has it.
    """

    bias_key: str
    biased: frozenset[layout.LinearSite]
    has_biases: bool
    rms_norm_eps: float
    rope_theta: float
    output_bias_key: str | None = None

    def biased_layers(self, raw: Mapping[str, Any]) -> frozenset[layout.LinearSite]:
        """raw: config.json."""
        found = self.biased if raw.get(self.bias_key, self.has_biases) else frozenset()
        output = raw.get(self.output_bias_key) if self.output_bias_key else None
        if output is None:
            return found
        return found | {layout.O_PROJ} if output else found - {layout.O_PROJ}


# Published checkpoints that config.json tells from others of their architecture by no key of their own.
_EMBEDDED_1B = {"hidden_size": 1536, "num_hidden_layers": 26, "num_attention_heads": 12, "vocab_size": 153376}
_DIFFUSION_7B = {"hidden_size": 4096, "num_hidden_layers": 34, "vocab_size": 153376, "rms_norm_eps": 1e-6}


def is_embedded_1b(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is openPangu-Embedded-1B's or 1B-V1.1's, by its shape: it was trained to answer at once."""
    return _is(raw, _EMBEDDED_1B)


def is_diffusion(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an openPangu-7B-Diffusion: Embedded-7B's, but for an rms_norm_eps of 1e-6."""
    return _is(raw, _DIFFUSION_7B)


def _is(raw: Mapping[str, Any], published: Mapping[str, Any]) -> bool:
    return raw.get("model_type") == "PanguEmbedded" and all(raw.get(key) == value for key, value in published.items())


_ATTENTION = frozenset({layout.Q_PROJ, layout.K_PROJ, layout.V_PROJ, layout.O_PROJ})
ARCHITECTURES = {
    "PanguEmbedded": Architecture("bias", _ATTENTION, True, 1e-5, 16_000_000.0, "output_bias"),
    "llama": Architecture("attention_bias", _ATTENTION, False, 1e-6, 10_000.0),
}

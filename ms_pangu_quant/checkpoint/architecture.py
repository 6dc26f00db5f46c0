"""The architectures that are read: what tells one plain decoder from another in its config.json.

All are one network: pre-norm RMSNorm, SwiGLU, rotate-half rope, grouped-query attention. To add one: a row here; what its
graph has besides goes into network/pangu.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from ms_pangu_quant.checkpoint import layout


@dataclass(frozen=True)
class Architecture:
    """biased    the layers that have biases where the key `bias_key` of config.json is true.

    has_biases, rms_norm_eps, rope_theta  what holds where config.json does not say.
    """

    bias_key: str
    biased: frozenset[layout.LinearSite]
    has_biases: bool
    rms_norm_eps: float
    rope_theta: float


_ATTENTION = frozenset({layout.Q_PROJ, layout.K_PROJ, layout.V_PROJ, layout.O_PROJ})
ARCHITECTURES = {
    "PanguEmbedded": Architecture("bias", _ATTENTION, True, 1e-5, 16_000_000.0),
    "llama": Architecture("attention_bias", _ATTENTION, False, 1e-6, 10_000.0),
}

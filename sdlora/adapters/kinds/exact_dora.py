"""PEFT's layers of a DoRA with norms in fp32; peft, slow to import, is needed only where one is trained."""

from __future__ import annotations

from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer
from torch import Tensor


class ExactDoraLinear(DoraLinearLayer):
    """PEFT's DoRA of a linear layer with norms in fp32: in bf16 they would be off by up to 0.4 percent."""

    def __init__(self) -> None:
        super().__init__(fan_in_fan_out=False)

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        """Return the norm of every output row of W + scaling * BA."""
        return super().get_weight_norm(
            weight.float(), lora_weight.float(), scaling, adapter_name=adapter_name
        )


class ExactDoraConv2d(DoraConv2dLayer):
    """PEFT's DoRA of a convolution with norms in fp32."""

    def __init__(self) -> None:
        super().__init__(fan_in_fan_out=False)

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        """Return the norm of every output channel of W + scaling * BA."""
        return super().get_weight_norm(
            weight.float(), lora_weight.float(), scaling, adapter_name=adapter_name
        )

"""TSM features -> exemplar tokens in the LLM's embedding space.

Shapes: F = TSM feature width, D = LLM hidden width. The paper does not report the connector's shape; `mlp2x_gelu` is
the shape LLaVA-1.5 uses between its vision tower and its LLM.
"""

from torch import Tensor, nn

from vitask_plugin.arguments import CONNECTOR_KINDS
from vitask_plugin.errors import VITaskError


class ExemplarConnector(nn.Module):
    """Maps TSM features [..., F] to exemplar tokens [..., D].

    Args:
        kind: `linear` (F -> D) or `mlp2x_gelu` (F -> D -> GELU -> D).

    Raises:
        VITaskError: unknown kind, or features of another width in `forward`.
    """

    def __init__(self, kind: str, in_features: int, out_features: int) -> None:
        super().__init__()
        if kind not in CONNECTOR_KINDS:
            raise VITaskError(f"connector {kind!r} is unknown; choose one of {', '.join(CONNECTOR_KINDS)}")
        self.kind = kind
        self.in_features = in_features
        self.out_features = out_features
        layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
        if kind == "mlp2x_gelu":
            layers += [nn.GELU(), nn.Linear(out_features, out_features)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        if features.shape[-1] != self.in_features:
            raise VITaskError(
                f"the TSM's features are {features.shape[-1]} wide, the connector takes {self.in_features}; "
                "use the TSM the connector was trained with"
            )
        return self.layers(features.to(self.layers[0].weight.dtype))

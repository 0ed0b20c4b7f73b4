"""TSM features -> exemplar tokens in the LLM's embedding space; and the control that has no features.

Shapes: F = TSM feature width, D = LLM hidden width. The paper does not report the connector's shape; `mlp2x_gelu` is
the shape LLaVA-1.5 uses between its vision tower and its LLM.
"""

import torch
from torch import Tensor, nn

from vitask_plugin.arguments import CONNECTOR_KINDS
from vitask_plugin.errors import VITaskError

LEARNED = "learned"


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
        tokens: Tensor = self.layers(features.to(next(self.layers.parameters()).dtype))
        return tokens


class LearnedPrefix(nn.Module):
    """One learned exemplar token [D], the same for every image: the control for exemplar prompting.

    It has as many weights as prompt tuning gives a token, starts as Llama's word embeddings do (normal, 0.02), and
    takes features [..., 0], which say how many tokens are wanted and nothing else.
    """

    kind = LEARNED
    in_features = 0

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.token = nn.Parameter(0.02 * torch.randn(out_features))

    def forward(self, features: Tensor) -> Tensor:
        """[..., 0] -> [..., D]."""
        if features.shape[-1]:
            raise VITaskError(
                f"the TSM's features are {features.shape[-1]} wide, but this exemplar was learned without a TSM; "
                "evaluate it without one"
            )
        return self.token.expand(*features.shape[:-1], -1)


def build_connector(kind: str, in_features: int, out_features: int) -> ExemplarConnector | LearnedPrefix:
    """A new connector of any kind, `learned` among them (F = 0)."""
    return LearnedPrefix(out_features) if kind == LEARNED else ExemplarConnector(kind, in_features, out_features)

"""What a host's model has beside the stock one: the run's flags and the connector.

Shapes: B samples, E exemplar tokens, F TSM feature width, D hidden width.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.method.connector import ExemplarConnector, LearnedPrefix

if TYPE_CHECKING:
    from torch.nn import Module as StockModel
else:
    StockModel = object  # whatever class stands behind it


class Connected(StockModel):
    """A host's model inherits it before the stock class.

    `from_pretrained` makes a model before the TSM is known whose features the connector takes: `connect` is called once
    that is so. Without it the model is the stock one, and has no exemplars.
    """

    get_input_embeddings: Callable[[], Callable[[Tensor], Tensor]]  # of the stock class

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.vitask_connector: ExemplarConnector | LearnedPrefix | None = None
        self.vitask_arguments: VITaskArguments | None = None

    def connect(self, vitask: VITaskArguments, connector: ExemplarConnector | LearnedPrefix | None) -> None:
        """Gives the model its flags, and its connector where they have one."""
        self.vitask_arguments, self.vitask_connector = vitask, connector

    def exemplars(self, features: Tensor) -> Tensor:
        """Exemplar tokens [B, E, D] from TSM features [B, E, F], or from token ids [B, E] of the TSM's prediction.

        Raises:
            RuntimeError: `connect` was not called, or with no connector.
        """
        if self.vitask_arguments is None:
            raise RuntimeError("the model was given no connector yet; call connect() first")
        if self.vitask_arguments.vitask_ep == "text":
            return self.get_input_embeddings()(features)
        if self.vitask_connector is None:
            raise RuntimeError(f"--vitask_ep {self.vitask_arguments.vitask_ep} has no connector that makes exemplars")
        tokens: Tensor = self.vitask_connector(features)
        return tokens

    def should_save_on_this_rank(self, is_main_process: bool) -> bool:
        """As the caller says; transformers 5 lets global rank 0 write alone, whatever --save_on_each_node says."""
        return is_main_process

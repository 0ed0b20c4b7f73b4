"""Every `--vitask*` flag: field, default, help, check. The only place where a flag exists."""

from dataclasses import asdict, dataclass, field
from typing import Any

from vitask_plugin.errors import VITaskError

EXEMPLAR_KINDS = ("cls", "all", "replace", "learned", "text", "none")
CONNECTOR_KINDS = ("linear", "mlp2x_gelu")
FEATURE_DTYPES = ("float32", "float16")
ENGINES = ("auto", "packed", "branches")
ATTENTION = ("sdpa", "flex_attention")
CHECKED_IMAGES = ("none", "sample", "all")


@dataclass
class VITaskArguments:
    """Flags that stand beside LLaVA's own. Without `--vitask True` none of the others has an effect.

    The paper does not report the two weights, the connector's shape or the learning rate: those defaults are ours.

    Raises:
        VITaskError: on a value that cannot work, with the values found.
    """

    vitask: bool = field(default=False, metadata={"help": "Train with VITask. False = upstream's run, unchanged."})
    vitask_stage: int = field(
        default=1,
        metadata={
            "help": "1: connector trainable, vanilla + EP + RDA. 2: connector frozen, CRT added.",
            "choices": [1, 2],
        },
    )
    vitask_tsm: str | None = field(
        default=None,
        metadata={"help": "Folder of the task-specific model (written by `vitask tsm train` or `import`)."},
    )
    vitask_trust_tsm_code: bool = field(
        default=False,
        metadata={
            "help": "Import the Python code that the TSM's tsm.json names, if it names any. False = refuse such a TSM."
        },
    )
    vitask_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the TSM's features (written by `vitask tsm extract`). "
            "Not given: extracted once with --vitask_tsm into OUTPUT_DIR/vitask_features."
        },
    )
    vitask_features_dtype: str = field(
        default="float32",
        metadata={
            "help": "Of features that are extracted before the first step, on the disk; float16 takes half the room.",
            "choices": list(FEATURE_DTYPES),
        },
    )
    vitask_ep: str = field(
        default="cls",
        metadata={
            "help": "Exemplar: cls = the pooled TSM feature, one token; all = every patch feature; "
            "replace = patch features in place of the image features; learned = one learned token, whatever the "
            "image (a control, no TSM); text = the TSM's prediction in words (a control, no connector); none = no "
            "exemplar (EP and RDA off).",
            "choices": list(EXEMPLAR_KINDS),
        },
    )
    vitask_connector: str = field(
        default="mlp2x_gelu",
        metadata={"help": "Shape of the TSM-to-LLM connector.", "choices": list(CONNECTOR_KINDS)},
    )
    vitask_connector_lr: float = field(
        default=1e-3,
        metadata={
            "help": "Learning rate of the connector or learned prefix in stage 1, with the run's schedule; "
            "0 = the run's --learning_rate."
        },
    )
    vitask_rda_weight: float = field(default=1.0, metadata={"help": "alpha, weight of RDA (per nat); 0 = off."})
    vitask_rda_detach: bool = field(
        default=True,
        metadata={"help": "Whether RDA leaves the exemplar branch alone. False = the paper's control RDA*."},
    )
    # With 1, CRT, which wants the right answer likelier than another and no words to be likely, outweighs the answer
    # itself after a while: parts of words. 0.1 is the demo's, chosen on validation images (benchmarks/LOG.md).
    vitask_crt_weight: float = field(
        default=0.1,
        metadata={
            "help": "beta, weight of CRT (per nat), used in stage 2; 0 = off. Near 1 answers may stop being words."
        },
    )
    vitask_connector_path: str | None = field(
        default=None,
        metadata={
            "help": "Output folder of an earlier stage: its connector is loaded, and with --lora_enable its adapter is "
            "continued. Stage 2 requires it; not given there: --model_name_or_path, if it holds a connector."
        },
    )
    vitask_engine: str = field(
        default="auto",
        metadata={
            "help": "packed = all branches of an image in one forward over a shared prefix; "
            "branches = one forward per branch, the reference; auto = packed where a test before the first step shows "
            "that the model's own numbers come out, else branches.",
            "choices": list(ENGINES),
        },
    )
    vitask_attention: str = field(
        default="sdpa",
        metadata={
            "help": "sdpa = with the dense mask, everywhere; flex_attention = with a block mask, on a GPU only. "
            "Used in place of the flash_attention_2 of train_mem.py, which takes no mask of this kind.",
            "choices": list(ATTENTION),
        },
    )
    vitask_check_images: str = field(
        default="sample",
        metadata={
            "help": "Images that are read before the first step, general data's too, so that broken ones are named "
            "then: none, sample = 256 of them, all. One met later ends the run with its sample and path.",
            "choices": list(CHECKED_IMAGES),
        },
    )

    def __post_init__(self) -> None:
        if not self.vitask:
            return
        for name in ("vitask_rda_weight", "vitask_crt_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise VITaskError(f"--{name} is {value}; it must be 0 (off) or positive")
        if not 0 <= self.vitask_connector_lr < float("inf"):
            raise VITaskError(
                f"--vitask_connector_lr is {self.vitask_connector_lr}; it must be 0 (the run's --learning_rate) or "
                "positive"
            )
        if self.vitask_stage not in (1, 2):
            raise VITaskError(f"--vitask_stage is {self.vitask_stage}; it must be 1 or 2")
        if self.vitask_ep == "text" and not self.vitask_tsm:
            raise VITaskError("--vitask_ep text needs --vitask_tsm DIR, which knows what the TSM's classes are called")
        if self.uses_tsm and not (self.vitask_tsm or self.vitask_features):
            raise VITaskError(
                f"--vitask_ep {self.vitask_ep} needs --vitask_tsm DIR or --vitask_features DIR; "
                "give one, or --vitask_ep none to train without exemplars"
            )

    @property
    def uses_exemplar(self) -> bool:
        """Whether an exemplar-prompted branch exists (EP and RDA)."""
        return self.vitask_ep != "none"

    @property
    def uses_tsm(self) -> bool:
        """Whether the exemplar is made of what a TSM says about the image."""
        return self.vitask_ep not in ("learned", "none")

    @property
    def uses_connector(self) -> bool:
        """Whether the exemplar has weights of its own, trained in stage 1 and frozen in stage 2."""
        return self.vitask_ep not in ("text", "none")

    @property
    def trains_connector(self) -> bool:
        """Whether there is a connector that this stage trains."""
        return self.uses_connector and self.vitask_stage == 1

    @property
    def connector_rate(self) -> float | None:
        """The learning rate of the connector's own; None where it has the run's, or is not trained."""
        return (self.vitask_connector_lr or None) if self.trains_connector else None

    @property
    def uses_negatives(self) -> bool:
        """Whether negative images are needed (CRT: stage 2 with a weight)."""
        return self.vitask_stage == 2 and self.vitask_crt_weight > 0

    @property
    def exemplar_tokens(self) -> str:
        """Which TSM features are extracted: `all` for `all` and `replace`, else `cls`."""
        return "all" if self.vitask_ep in ("all", "replace") else "cls"

    def flags(self) -> dict[str, Any]:
        """The VITask flags alone, as saved in `vitask.json`."""
        return {name: value for name, value in asdict(self).items() if name in VITaskArguments.__dataclass_fields__}

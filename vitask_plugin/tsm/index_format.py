"""`index.json`: which row of a feature store is which image's, and what the arrays beside it hold."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vitask_plugin.arguments import FEATURE_DTYPES
from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.schema import MAY_LACK, Count, Format, Positive, Schema, Sha256

FORMAT = 1
# [row, hash of the image's file], a list in JSON.
Row = Annotated[tuple[Count, Sha256], Field(strict=False)]


class Blocks(Schema):
    """Hashes of every so many rows, see `blocks`."""

    rows: Positive
    sha256: list[Sha256]


class Index(Schema):
    """What `vitask tsm extract` writes; early ones have no hashes of the arrays."""

    format: Literal[FORMAT]
    tsm: Sha256
    tokens: Literal["cls", "all"]
    dtype: Literal[FEATURE_DTYPES] = "float32"
    images: Annotated[dict[str, Row], Field(min_length=1)]
    features: Blocks = MAY_LACK
    logits: Blocks = MAY_LACK

    @model_validator(mode="after")
    def _rows_are_a_permutation(self) -> "Index":
        seen: dict[int, str] = {}
        for image, (row, _) in self.images.items():
            if row >= len(self.images) or row in seen:
                there = f"that of {seen[row]!r} too" if row in seen else f"beyond the {len(self.images)} images"
                raise VITaskError(f"the row of image {image!r} is {row}, {there}; run `vitask tsm extract` again")
            seen[row] = image
        return self


INDEX = Format(Index, "run `vitask tsm extract` again")

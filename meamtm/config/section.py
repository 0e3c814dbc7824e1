"""What every section of the configuration is."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Frozen settings that refuse unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _check_folder(value: str) -> str:
    if "://" in value:
        raise PydanticCustomError("folder", "Files are written there, and an address is no folder; name a folder")
    return value


Folder = Annotated[str, AfterValidator(_check_folder)]
"""A path for what is written; what is read (`data.path`) may be a URI."""

"""What every section of the configuration is."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Frozen settings that refuse unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _word(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def is_uri(path: str) -> bool:
    """Says whether a path begins with a scheme, as s3://bucket/folder does; a colon further on is part of a name."""
    return re.match(r"(?i)[a-z][a-z0-9+.-]*://", path) is not None


def _check_folder(value: str) -> str:
    if is_uri(value):
        raise PydanticCustomError("folder", "Files are written there, and an address is no folder; name a folder")
    return value


Word = Annotated[str, BeforeValidator(_word)]
"""Text, which may be a number (2024) to YAML."""
Name = Annotated[Word, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""The first part of what a folder or a job is called."""
Folder = Annotated[Word, AfterValidator(_check_folder)]
"""A path for what is written; what is read (`data.path`) may be a URI."""

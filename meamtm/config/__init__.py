"""A YAML file and KEY=VALUE words -> one frozen RunConfig."""

from meamtm.config.encoder import WEIGHT_FILES, WEIGHT_SUFFIXES, EncoderConfig
from meamtm.config.flat import (
    Value,
    build,
    data_name,
    describe,
    differences,
    flatten,
    from_flat,
    known_keys,
    load,
    nearest,
    nest,
    override,
    parse_changes,
    run_name,
    signature,
    write_yaml,
)
from meamtm.config.mel import MelConfig
from meamtm.config.scale import JOB_HOLDS, ScaleConfig
from meamtm.config.schema import (
    AugmentConfig,
    DataConfig,
    DistillConfig,
    LossConfig,
    MixConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
)
from meamtm.config.section import Folder, Name, Section
from meamtm.config.yaml_text import read_yaml

__all__ = [
    "JOB_HOLDS",
    "WEIGHT_FILES",
    "WEIGHT_SUFFIXES",
    "AugmentConfig",
    "DataConfig",
    "DistillConfig",
    "EncoderConfig",
    "Folder",
    "LossConfig",
    "MelConfig",
    "MixConfig",
    "Name",
    "OptimConfig",
    "RunConfig",
    "ScaleConfig",
    "Section",
    "TrackingConfig",
    "TrainConfig",
    "Value",
    "build",
    "data_name",
    "describe",
    "differences",
    "flatten",
    "from_flat",
    "known_keys",
    "load",
    "nearest",
    "nest",
    "override",
    "parse_changes",
    "read_yaml",
    "run_name",
    "signature",
    "write_yaml",
]

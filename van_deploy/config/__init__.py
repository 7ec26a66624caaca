"""Every option, once: its type, default, limits, help and key.

Recipe files, the command line and the keyword arguments of the Python API are made from
these tables. To add an option, add a field to its table:

    layer_norm_eps: float = option(1e-6, "Epsilon of the LayerNorms.", gt=0)

The recipe then reads ``layer_norm_eps``, every command that takes the table has
``--layer-norm-eps``, and its function in the API a keyword argument of that name.
What does not go together is refused by a validator of the table with a
:class:`~van_deploy.schema.Contradiction`, whose placeholders each source spells its way.
"""

from __future__ import annotations

from van_deploy.config.bench import BenchSettings, Budget
from van_deploy.config.deployment import Recipe
from van_deploy.config.engines import BuildOptions, BuildSettings, EngineSettings, FleetSettings
from van_deploy.config.fields import BatchRange, HardwareCompatibility, Profiling
from van_deploy.config.gates import GateProfile, GateSettings
from van_deploy.config.judging import (
    CheckSettings,
    DriftSettings,
    EvaluationSettings,
    RunnerSettings,
    RunSettings,
    VerifySettings,
)
from van_deploy.config.network import (
    EvaluateSettings,
    ExportSettings,
    ModelSettings,
    PreprocessingSettings,
)
from van_deploy.config.precision import Precision, PrecisionSettings, QuantizeSettings
from van_deploy.config.serving import (
    PackageSettings,
    PredictSettings,
    ServeSettings,
    ServiceSettings,
    TritonSettings,
)

__all__ = [
    "BatchRange",
    "BenchSettings",
    "Budget",
    "BuildOptions",
    "BuildSettings",
    "CheckSettings",
    "DriftSettings",
    "EngineSettings",
    "EvaluateSettings",
    "EvaluationSettings",
    "ExportSettings",
    "FleetSettings",
    "GateProfile",
    "GateSettings",
    "HardwareCompatibility",
    "ModelSettings",
    "PackageSettings",
    "Precision",
    "PrecisionSettings",
    "PredictSettings",
    "PreprocessingSettings",
    "Profiling",
    "QuantizeSettings",
    "Recipe",
    "RunSettings",
    "RunnerSettings",
    "ServeSettings",
    "ServiceSettings",
    "TritonSettings",
    "VerifySettings",
]

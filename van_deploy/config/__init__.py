"""Every option, once: its type, default, limits, help and key.

Recipe files, the command line and the keyword arguments of the Python API are made from
these tables. To add an option, add a field to its table, and say in the table's docstring
what it does::

    class ModelSettings(Table):
        \"\"\"Which network.

Attributes:
            layer_norm_eps: Epsilon of the LayerNorms.
        \"\"\"

        layer_norm_eps: float = option(1e-6, gt=0)

The recipe then reads ``layer_norm_eps``, every command that takes the table has
``--layer-norm-eps``, and its function in the API a keyword argument of that name.
What does not go together is yielded by the table's ``conflicts``, whose placeholders
each source spells its way.
"""

from van_deploy.config.commands import (
    BenchSettings,
    Budget,
    CheckSettings,
    DriftSettings,
    EvaluationSettings,
    FleetSettings,
    PackageSettings,
    PredictSettings,
    RunnerSettings,
    RunSettings,
    ServeSettings,
    ServiceSettings,
    TritonSettings,
    VerifySettings,
)
from van_deploy.config.recipe_tables import (
    BuildOptions,
    BuildSettings,
    EngineSettings,
    EvaluateSettings,
    ExportSettings,
    GateProfile,
    GateSettings,
    HardwareCompatibility,
    ModelSettings,
    Precision,
    PrecisionSettings,
    PreprocessingSettings,
    Profiling,
    QuantizeSettings,
    Recipe,
)
from van_deploy.config.sizes import BatchRange

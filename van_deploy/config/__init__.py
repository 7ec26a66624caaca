"""All options: type, default, limits, help and key.

Recipe files, the command line and the keyword arguments of the Python API are made from
these tables. To add an option, add a field to its table, and its help to the ``Attributes:``
of the table's docstring::

    layer_norm_eps: float = option(1e-6, gt=0)

Recipes then have the key ``layer_norm_eps``, commands with the table ``--layer-norm-eps``, and
functions of the API a keyword argument of that name.
The table's ``conflicts`` yields invalid combinations; their placeholders become keys as the
user wrote them.
"""

from van_deploy.config.commands import (
    BenchSettings,
    Budget,
    CheckSettings,
    DriftSettings,
    EvaluationSettings,
    ExportRunSettings,
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
    ExportSettings,
    GateProfile,
    GateSettings,
    HardwareCompatibility,
    Profiling,
    QuantizeSettings,
    Recipe,
)
from van_deploy.config.sizes import BatchRange

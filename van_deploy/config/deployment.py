"""A recipe as data: its tables, and what must fit between them."""

from __future__ import annotations

from operator import attrgetter

import pydantic

from van_deploy.config.engines import EngineSettings
from van_deploy.config.fields import BatchRange, option
from van_deploy.config.gates import GateSettings
from van_deploy.config.network import (
    EvaluateSettings,
    ExportSettings,
    ModelSettings,
    PreprocessingSettings,
)
from van_deploy.config.precision import PrecisionSettings
from van_deploy.config.sizes import size_text
from van_deploy.schema import Contradiction, Settings


class Recipe(Settings):
    """Everything about one deployment; each attribute is a table of the file."""

    model: ModelSettings = option(ModelSettings, "Which network.")
    preprocessing: PreprocessingSettings = option(
        PreprocessingSettings, "What differs from the weights' own preprocessing."
    )
    batch: BatchRange = option(
        BatchRange,
        "Batch sizes min:opt:max to serve; one size alone makes a static graph.",
        panel="Graph",
    )
    export: ExportSettings = option(ExportSettings, "How the graph is written.")
    precision: PrecisionSettings = option(
        PrecisionSettings, "What to make besides FP32, as `van-deploy quantize` does."
    )
    engines: EngineSettings = option(
        EngineSettings, "Which engines to build, as `van-deploy build` does; without it, none."
    )
    evaluate: EvaluateSettings = option(
        EvaluateSettings, "Labelled images to measure accuracy on; without it, none is measured."
    )
    gates: GateSettings = option(GateSettings, "Limits that replace those of docs/gates.md.")

    @pydantic.model_validator(mode="after")
    def _engines_are_of_what_is_made(self) -> Recipe:
        made = ["fp32", *self.precision.make]
        if self.export.embed_preprocess != "none":
            made += [f"{name}-{self.export.embed_preprocess}" for name in made]
        missing = [name for name in self.engines.precisions if name not in made]
        if missing:
            raise Contradiction(
                f"{{engines.precisions}} wants '{missing[0]}', which is not made.",
                f"Add it to {{precision.make}}, or take one of: {', '.join(made)}.",
            )
        return self

    @pydantic.model_validator(mode="after")
    def _feature_maps_are_no_classes(self) -> Recipe:
        of_classes = ("model.labels", "model.head", "precision.max_drop", "evaluate.images")
        given = [key for key in of_classes if attrgetter(key)(self) not in (None, ())]
        if self.export.features and given:
            raise Contradiction(
                f"{{export.features}} gives feature maps, and {{{given[0]}}} is of classes.",
                "Leave one of them out.",
            )
        return self

    @pydantic.model_validator(mode="after")
    def _the_input_is_in_the_range(self) -> Recipe:
        size, sizes = self.preprocessing.image_size, self.export.dynamic_size
        if size is not None and sizes is not None and not sizes.holds(size):
            raise Contradiction(
                f"{{preprocessing.image_size}} {size_text(size)} is outside of "
                f"{{export.dynamic_size}} {sizes}.",
                "Give a size inside of the range, or leave it out to take the middle one.",
            )
        return self

"""What a run leaves to look at, and the KL coefficient that follows a target."""

from gspo_lightning.callbacks.files import (
    AdaptiveKL,
    CurvePlot,
    HFExport,
    PredictionWriter,
    SampleTable,
)

"""The plug-in contract: what models, techniques, workloads and quality metrics derive from.

The registry that finds plug-ins, and the checks that a class keeps the contract, are modules of this package.
"""

from membench.plugins.contract import (
    CONTRACT_CLASSES,
    ByteCount,
    Context,
    Corpus,
    DoesNotFit,
    HeldOut,
    LayerWise,
    Model,
    Options,
    QualityMetric,
    Setting,
    Shape,
    Step,
    Technique,
    Tokens,
    TrainingStep,
    Unsuitable,
    Workload,
    given_back,
    output_head,
    replaced,
    stepping,
)

__all__ = [
    "CONTRACT_CLASSES",
    "ByteCount",
    "Context",
    "Corpus",
    "DoesNotFit",
    "HeldOut",
    "LayerWise",
    "Model",
    "Options",
    "QualityMetric",
    "Setting",
    "Shape",
    "Step",
    "Technique",
    "Tokens",
    "TrainingStep",
    "Unsuitable",
    "Workload",
    "given_back",
    "output_head",
    "replaced",
    "stepping",
]

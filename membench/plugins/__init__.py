"""The plug-in contract: the base classes of models, techniques, workloads and quality metrics.

Plug-in authors import from here. The registry that finds plug-ins, and the checks that a class keeps the contract, are
modules of this package.
"""

from membench.plugins.contract import Context, Model, Setting, Shape, Technique, Workload, stepping
from membench.plugins.layer_wise import LayerWise, SelectsLayers, output_head, replaced
from membench.plugins.logits import WrongOutput, last_logits_of, logits_of
from membench.plugins.options import ByteCount, DoesNotFit, NotInModel, Options, Unsuitable, given_back
from membench.plugins.parallel import Parallel, keeping_parts, own_rows, parallel_last
from membench.plugins.quality_metric import HeldOut, QualityMetric
from membench.plugins.ranks import Dimension, Ranks
from membench.plugins.training import Corpus, Samples, Step, Tokens, TrainingData, TrainingStep

CONTRACT_CLASSES: tuple[type[Options], ...] = (
    Options, Technique, SelectsLayers, LayerWise, Parallel, Model, Workload, QualityMetric,
)  # fmt: skip

__all__ = [
    "CONTRACT_CLASSES",
    "ByteCount",
    "Context",
    "Corpus",
    "Dimension",
    "DoesNotFit",
    "HeldOut",
    "LayerWise",
    "Model",
    "NotInModel",
    "Options",
    "Parallel",
    "QualityMetric",
    "Ranks",
    "Samples",
    "SelectsLayers",
    "Setting",
    "Shape",
    "Step",
    "Technique",
    "Tokens",
    "TrainingData",
    "TrainingStep",
    "Unsuitable",
    "Workload",
    "WrongOutput",
    "given_back",
    "keeping_parts",
    "last_logits_of",
    "logits_of",
    "output_head",
    "own_rows",
    "parallel_last",
    "replaced",
    "stepping",
]

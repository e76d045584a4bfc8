"""Students that were trained: what they gain where text is scarce, and what they and their teacher hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import membench
from membench.builtin.models.transformer import Llama
from membench.plugins import Shape
from membench.records.record import Record

if TYPE_CHECKING:
    from torch import nn

_WIDE = Shape(
    width=512, layers=4, heads=8, key_value_heads=8, inner_width=1376, vocabulary=2048, longest=160, tied=True
)
_LAYER_BYTES = 4 * (4 * 512 * 512 + 3 * 512 * 1376 + 2 * 512)
_OTHER_BYTES = 4 * (2048 * 512 + 512)


def four_wide_layers() -> nn.Module:
    """A teacher large enough for its bytes to show."""
    return Llama.of_shape(_WIDE)._construct()


_STUDENT = "layers = 1\nlearning_rate = 2e-3\n"
_SUITE = f"""
[suite]
name = "distillation"
[matrix]
model = ["trained-tiny"]
technique = ["taught", "alone"]
workload = ["forward"]
[[include]]
model = "wide"
technique = ["taught-briefly", "alone-briefly"]
workload = "forward"
[model.wide]
use = "factory"
function = "tests.test_trained_students:four_wide_layers"
vocabulary_size = 2048
[technique.taught]
use = "distill"
steps = 100
seed = 2
text_tokens = 15000
{_STUDENT}
[technique.alone]
use = "from-scratch"
steps = 100
seed = 2
text_tokens = 15000
{_STUDENT}
[technique.taught-briefly]
use = "distill"
steps = 1
{_STUDENT}
[technique.alone-briefly]
use = "from-scratch"
steps = 1
{_STUDENT}
[settings]
measured_steps = 1
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    folder = tmp_path_factory.mktemp("distillation")
    path = folder / "distillation.toml"
    path.write_text(_SUITE)
    found = membench.run(membench.load_suite(path), output=folder).records
    assert {record.status for record in found} == {"ok"}
    return {f"{record.case['model']}/{record.technique}": record for record in found}


def test_where_text_is_scarce_a_taught_student_beats_the_one_that_learnt_alone(records: dict[str, Record]) -> None:
    teacher, taught, alone = (
        records[f"trained-tiny/{name}"].metrics["bits_per_byte"] or 0 for name in ("none", "taught", "alone")
    )
    assert teacher < taught < alone - 0.03


def test_only_the_student_is_held_when_it_is_done(records: dict[str, Record]) -> None:
    student, teacher = _OTHER_BYTES + _LAYER_BYTES, _OTHER_BYTES + 4 * _LAYER_BYTES
    assert records["wide/none"].metrics["weights_bytes"] == pytest.approx(teacher, rel=0.001)
    for name in ("taught-briefly", "alone-briefly"):
        metrics = records[f"wide/{name}"].metrics
        assert metrics["weights_bytes"] == pytest.approx(student, rel=0.001)
        assert student < (metrics["held_live_bytes"] or 0) < student + 4 * 2**20 < teacher


def test_distilling_costs_teacher_student_gradients_and_states_at_once(records: dict[str, Record]) -> None:
    student, teacher = _OTHER_BYTES + _LAYER_BYTES, _OTHER_BYTES + 4 * _LAYER_BYTES
    taught, alone = (
        records[f"wide/{name}-briefly"].metrics["apply_peak_live_bytes"] or 0 for name in ("taught", "alone")
    )
    assert taught > teacher + 4 * student
    # While the student is made the model is still there; while it is trained, no more.
    assert 4 * student < alone < taught - 0.5 * teacher


def test_a_students_share_of_the_weights_is_no_missed_saving(records: dict[str, Record]) -> None:
    assert not [note for record in records.values() for note in record.notes if "nominal" in note]

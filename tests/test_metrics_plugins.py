"""Quality metrics that are plug-ins: measured on the converted model, shown, limited and judged like the others."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

import membench
from membench.cli import main
from membench.errors import MembenchError
from membench.records.metrics import METRIC_OF_FIELD, METRICS
from membench.records.record import metrics_in
from membench.records.run_file import RunFile
from membench.report import services, text
from membench.suite.gates import outcomes
from membench.suite.rules import rules_of

_ACCURACY, _NATS = "own.next_token_accuracy.higher.%", "own.mean_nats.lower.nats"

_METRICS = """\
from membench.plugins import QualityMetric, Unsuitable


class MeanNats(QualityMetric):
    \"\"\"Nats a token over so many pieces; all of them where the number is 0.\"\"\"

    unit = "nats"
    pieces: int = 0

    def measure(self, module, held_out, context):
        import torch

        lost, count = 0.0, 0
        for piece in held_out.pieces[: self.pieces or None]:
            ids = torch.tensor(piece, device=context.device)
            assert not torch.is_grad_enabled() and not module.training
            logits = held_out.logits(ids[:-1]).float()
            lost += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
            count += len(ids) - 1
        return lost / count


class FromReference(QualityMetric):
    \"\"\"The mean divergence of the reference's distribution from the module's.\"\"\"

    unit = "nats"

    def measure(self, module, held_out, context):
        import torch

        away, count = 0.0, 0
        for number, piece in enumerate(held_out.pieces):
            own = held_out.logits(torch.tensor(piece[:-1], device=context.device)).float().log_softmax(-1)
            theirs = held_out.reference(number).log_softmax(-1)
            away += torch.nn.functional.kl_div(own, theirs, reduction="sum", log_target=True).item()
            count += len(own)
        return away / count


class Raises(QualityMetric):
    def measure(self, module, held_out, context):
        raise ValueError("first line\\nsecond")


class CannotTell(QualityMetric):
    def measure(self, module, held_out, context):
        raise Unsuitable("there is nothing to tell")


class NoNumber(QualityMetric):
    def measure(self, module, held_out, context):
        return float("nan")
"""

_SUITE = """\
[suite]
name = "own"
metrics = ["next_token_accuracy", "mean_nats", "of_one", "from_reference", "raises", "cannot_tell", "no_number"]
[matrix]
model = ["trained-tiny"]
technique = ["none", "nf4"]
workload = ["forward"]
[metric.of_one]
use = "membench_plugins:mean_nats"
pieces = 1
[settings]
measured_steps = 1
[limits]
mean_nats = 1.27
cannot_tell = -1
[regression]
mean_nats = 0.01
[gate]
rules = ["next_token_accuracy >= 0.999 * reference", "mean_nats <= reference + 1"]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> membench.Run:
    folder = tmp_path_factory.mktemp("own")
    (folder / "membench_plugins.py").write_text(_METRICS)
    (folder / "own.toml").write_text(_SUITE)
    return membench.run(membench.load_suite(folder / "own.toml"), output=folder / "results")


def test_its_figure_is_what_it_measures_on_the_converted_model(run: membench.Run) -> None:
    reference, converted = run.records
    for record in run.records:
        # The harness's own figure of the same text, from bits a byte of a model whose tokens are bytes.
        nats = (record.metrics["bits_per_byte"] or 0) * math.log(2)
        assert record.metrics[_NATS] == pytest.approx(nats, rel=1e-5)
        assert 50 < (record.metrics[_ACCURACY] or 0) < 80
        assert record.metrics["own.of_one.lower.nats"] != record.metrics[_NATS]
    assert (converted.metrics[_NATS] or 0) > (reference.metrics[_NATS] or 0)
    distances = [record.metrics["own.from_reference.lower.nats"] for record in run.records]
    assert distances == pytest.approx([0, converted.metrics["kl_nats"]], rel=1e-4, abs=1e-9)
    assert reference.case["metric_plugins"][_NATS] == {
        "use": "mean_nats", "options": {}, "file": "membench_plugins.py",
        "sha256": run.header["plugin_files"]["membench_plugins.py"][:12],
    }  # fmt: skip


def test_what_it_cannot_tell_is_unknown_with_the_reason_and_takes_nothing_else_along(run: membench.Run) -> None:
    record = run.records[-1]
    assert record.status == "ok"
    unknown = {field: record.reasons[field] for field in record.metrics if field in record.reasons}
    assert {field: reason for field, reason in unknown.items() if field.startswith("own.")} == {
        "own.raises.lower": "measuring it ended in ValueError: first line",
        "own.cannot_tell.lower": "there is nothing to tell",
        "own.no_number.lower": "it is not finite",
    }
    assert "metric 'raises' is not known: measuring it ended in ValueError: first line" in record.remarks
    assert "metric 'no_number' is not known: it is not finite" in record.remarks
    assert "the limit on cannot_tell was not checked: there is nothing to tell" in record.unchecked_limits


def test_it_has_a_column_a_row_of_every_metric_and_a_place_in_what_is_exported(run: membench.Run) -> None:
    records = run.records
    assert "next token accuracy" in text.comparison(records).splitlines()[2]
    value = records[-1].metrics[_NATS] or 0
    assert f"{value:.3f} nats" in text.comparison(records)
    assert f"{value:.3f} nats" in text.explanation(records)
    (first, _) = json.loads(text.comparison(records, "json"))
    assert first[_ACCURACY] == records[0].metrics[_ACCURACY]
    told = {entry["name"]: entry for entry in json.loads(services.benchmark_action(records))}
    assert told[f"{records[-1].id} mean_nats"]["unit"] == "nats"
    assert f"{records[-1].id} next_token_accuracy" not in told  # of which more is better
    assert metrics_in([dataclasses.replace(records[0], metrics={"weights_bytes": 1})]) == METRICS


def test_limits_gates_and_tolerances_hold_it_like_any_other(run: membench.Run, tmp_path: Path) -> None:
    reference, converted = run.records
    assert reference.broken_limits == ()
    assert converted.broken_limits == (
        f"mean_nats {converted.metrics[_NATS]:.3f} nats is over its limit of 1.270 nats",
    )
    # What is told of a run that was kept: its header says which metrics are plug-ins'.
    assert set(run.header["own_metrics"]) >= {_ACCURACY, _NATS}
    tolerances, gates = rules_of(run.header, [METRIC_OF_FIELD[f] for f in run.header["own_metrics"]])
    assert [each.metric.field for each in tolerances] == [_NATS]
    assert [outcome.holds for outcome in outcomes(gates, run.records)] == [False, True]
    worse = {**reference.metrics, _NATS: (reference.metrics[_NATS] or 0) + 0.02}
    path = tmp_path / "worse.jsonl"
    with RunFile.create(path, {key: value for key, value in run.header.items() if key != "schema"}) as file:
        file.append(dataclasses.replace(reference, metrics=worse))
    assert membench.read_run(path).records[0].metrics[_NATS] == worse[_NATS]


def test_a_check_of_a_kept_run_fails_where_it_got_worse(
    run: membench.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (reference, _), path = run.records, tmp_path / "worse.jsonl"
    worse = {**reference.metrics, _NATS: (reference.metrics[_NATS] or 0) + 0.02}
    with RunFile.create(path, {key: value for key, value in run.header.items() if key != "schema"}) as file:
        file.append(dataclasses.replace(reference, metrics=worse, broken_limits=()))
    check = ["check", str(path), "--against", str(run.path), "-k", "none"]
    assert main(check) == 1
    assert "mean nats" in capsys.readouterr().out
    assert main([*check, "--fail", "mean_nats:0.03"]) == 3  # nobody knows whether the limit on cannot_tell is kept
    assert main([*check, "--fail", "mean_nats:0.03", "--allow-skipped"]) == 0
    assert main([*check, "--fail", "maen_nats:0.03"]) == 2
    assert "no metric is named 'maen_nats'; did you mean 'mean_nats'?" in capsys.readouterr().err
    # A baseline knows of a figure no more than its field.
    assert main(["baseline", "save", "--run", str(run.path), "--output", str(tmp_path), "kept"]) == 0
    assert main(["check", str(path), "--against", "kept", "--output", str(tmp_path), "-k", "none"]) == 1
    assert main(["check", str(run.path), "--against", "kept", "--output", str(tmp_path), "-k", "nf4"]) == 1
    assert "nothing regressed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('metrics = ["mean_nat"]', "suite.metrics: no metric is named 'mean_nat'; did you mean 'mean_nats'?"),
        ('metrics = ["kl"]',
         "suite.metrics: 'kl': membench has a metric 'kl'; give this one another name in [metric.NAME]"),
        ('metrics = ["membench:next_token_accuracy", "next_token_accuracy"]',
         "suite.metrics: 'next_token_accuracy': there are two of that name; give one another name in [metric.NAME]"),
        ('metrics = ["Mean-Nats"]\n[metric.Mean-Nats]\nuse = "mean_nats"',
         "suite.metrics: 'Mean-Nats': a metric's name has small letters, digits and '_', and its unit 16 characters at"
         " most, none of them a space, '.' or '_'"),
        ('[limits]\nmean_nats = 1', "limits.mean_nats: no such metric; known, among "),
        ('metrics = ["mean_nats"]\n[limits]\nmean_nats = "1 MiB"',
         "limits.mean_nats = '1 MiB': write a bare number, without a unit"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path: Path, lines: str, said: str) -> None:
    (tmp_path / "membench_plugins.py").write_text(_METRICS)
    path = tmp_path / "own.toml"
    path.write_text(
        f'[suite]\nname = "own"\n{lines}\n[matrix]\nmodel = ["trained-tiny"]\ntechnique = ["none"]\n'
        'workload = ["forward"]\n'
    )
    with pytest.raises(MembenchError) as raised:
        membench.load_suite(path)
    assert str(raised.value).startswith(f"{path}: {said}")


def test_a_record_whose_field_is_no_metric_of_a_plug_in_is_refused(run: membench.Run, tmp_path: Path) -> None:
    path = tmp_path / "damaged.jsonl"
    path.write_text(run.path.read_text().replace('"own.mean_nats.lower.nats":', '"own.mean_nats.less.nats":'))
    with pytest.raises(MembenchError) as raised:
        membench.read_run(path)
    assert "metrics.own.mean_nats.less.nats: a plug-in's metric is 'own.NAME.lower' or" in str(raised.value)


def test_listing_says_unit_and_direction(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "metrics"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "metrics"
    assert any(line.startswith("next_token_accuracy in %, higher is better Share of held-out") for line in lines)

import io
import json
import math
import sys

import pytest

from panterra.errors import InputError
from panterra.train.logs import LOGS, open_logs, progress_bar

ABOUT = {"run": "walk", "settings": {"lr": 0.1}}


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_json_lines_hold_each_step_once_whatever_was_cut(tmp_path):
    with open_logs(("jsonl",), tmp_path, step=0, **ABOUT) as log:
        for step in (1, 2, 3, 4):
            log(step, {"loss": 1 / step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the kill came here
    with open_logs(("jsonl",), tmp_path, step=2, **ABOUT) as log:
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]
        log(3, {"loss": 0.5})
        assert lines(tmp_path)[-1] == {"step": 3, "loss": 0.5}  # there at once
    with open_logs(("jsonl",), tmp_path, step=0, **ABOUT):
        assert lines(tmp_path) == []


def test_numbers_come_back_exactly_and_what_is_none_is_null(tmp_path):
    values = {"third": 1 / 3, "nan": math.nan, "inf": -math.inf}
    with open_logs(("jsonl",), tmp_path, step=0, **ABOUT) as log:
        log(1, values)
    assert lines(tmp_path) == [{"step": 1, "third": 1 / 3, "nan": None, "inf": None}]


def test_tensorboard_shows_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_logs(("tensorboard",), tmp_path, step=0, **ABOUT) as log:
        for step in (1, 2, 3):
            log(step, {"loss": float(step)})
    with open_logs(("tensorboard",), tmp_path, step=1, **ABOUT) as log:
        log(2, {"loss": 20.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 20.0)]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_log_that_is_not_installed_is_named(tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=f"pip install {name}"), open_logs((name,), tmp_path, step=0, **ABOUT):
        pass


def test_a_log_that_nobody_knows_is_refused(tmp_path):
    with (
        pytest.raises(InputError, match=f"no log 'paper'; known: {', '.join(LOGS)}"),
        open_logs(("jsonl", "paper"), tmp_path, step=0, **ABOUT),
    ):
        pass


def test_wandb_continues_a_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (0, 1):
        with open_logs(("wandb",), tmp_path, step=step, **ABOUT) as log:
            log(step + 1, {"loss": 0.5})
    assert len({path.suffix for path in tmp_path.rglob("run-*.wandb")}) == 1


def test_mlflow_continues_a_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    for step in (0, 1):
        with open_logs(("mlflow",), tmp_path, step=step, **ABOUT) as log:
            log(step + 1, {"loss/contrast": 0.5 + step})
    run = mlflow.get_run((tmp_path / "mlflow_id").read_text())
    assert run.data.metrics == {"loss/contrast": 1.5}
    assert run.info.run_name == "walk"


def test_a_pipe_gets_no_bar(capsys):
    with progress_bar("walk") as show:
        show(3, 10, 12.0)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_steps_and_throughput(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    with progress_bar("walk") as show:
        show(3, 10, 12.0)
    assert "walk" in terminal.getvalue()
    assert "3/10" in terminal.getvalue()
    assert "12 samples/s" in terminal.getvalue()

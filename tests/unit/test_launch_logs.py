"""The error that matters in a log that torchrun has written over."""

from __future__ import annotations

from pathlib import Path

from torchft.launch.logs import last_error

LOG = """\
Traceback (most recent call last):
  File "train.py", line 3, in main
torchft.errors.MismatchError: group_1 trains another model: the first parameter that differs is w
E1120 20:11:19 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1)
Traceback (most recent call last):
  File "run.py", line 397, in launch_agent
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: train.py FAILED
"""


def test_the_workers_error_not_torchruns_report_of_it(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG)
    assert last_error(tmp_path / "log") == (
        "torchft.errors.MismatchError: group_1 trains another model: "
        "the first parameter that differs is w"
    )


def test_a_quiet_or_missing_log_tells_no_error(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("step 1\n")
    assert last_error(tmp_path / "log") is None
    assert last_error(tmp_path / "absent") is None

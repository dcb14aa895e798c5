"""Copies between host and device that nobody waits for, with stand-ins of a GPU's memory and events."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pentad.parallel.kernels import upload
from pentad.parallel.kernels.upload import Constant, Download

CPU = torch.device("cpu")


def test_on_a_cpu_nothing_is_copied() -> None:
    x = torch.arange(3.0)
    assert upload.upload(x, CPU) is x and Constant(x).on(CPU) is x
    found = Download(x)
    assert found.landed() and found.tolist() == [0.0, 1.0, 2.0]


def test_a_constant_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[torch.device] = []

    def copied(x: Tensor, device: torch.device) -> Tensor:
        copies.append(device)
        return x.clone()

    monkeypatch.setattr(upload, "upload", copied)
    constant = Constant(torch.ones(2))
    assert constant.on(CPU) is constant.on(CPU) and copies == [CPU]


def test_a_download_is_there_when_what_was_queued_before_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def record(self) -> None:
            done.append("recorded")

        def query(self) -> bool:
            return "run" in done

        def synchronize(self) -> None:
            done.append("run")

    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(upload, "_page_locked", torch.empty_like)
    x = torch.ones(2)
    found = Download(x)
    x.zero_()  # what comes later does not count
    assert done == ["recorded"] and not found.landed()
    assert found.tolist() == [1.0, 1.0] and found.landed()

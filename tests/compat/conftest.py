"""Stubs generated from `proto/` by the public gRPC tools: clients that share no code with ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.stubs import Stubs

PROTO = Path(__file__).parents[2] / "proto"


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stubs]:
    protoc = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")
    well_known = Path(protoc.__file__).parent / "_proto"
    out = tmp_path_factory.mktemp("stubs")
    flags = [f"-I{PROTO}", f"-I{well_known}", f"--python_out={out}", f"--grpc_python_out={out}"]
    assert protoc.main(["protoc", *flags, "torchft.proto"]) == 0
    sys.path.insert(0, str(out))
    try:
        messages = importlib.import_module("torchft_pb2")
        services = importlib.import_module("torchft_pb2_grpc")
        yield Stubs(messages, services)
    finally:
        sys.path.remove(str(out))

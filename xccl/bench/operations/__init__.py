"""The operations, by name. A new one is a file here with a record, and its line below."""

from __future__ import annotations

from xccl.bench.operation import Operation
from xccl.bench.operations import all_to_all, send

OPERATIONS: dict[str, Operation] = {module.OPERATION.name: module.OPERATION for module in (send, all_to_all)}

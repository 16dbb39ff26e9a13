"""The parity gate: an artifact is used only after it gave the network's answers on real photos."""

from dsgnn.export.parity.comparison import (
    Answers,
    Infer,
    compare,
    compare_slots,
    folder_photos,
    gate,
    parity_photos,
)
from dsgnn.export.parity.limits import (
    LIMITS,
    Parity,
    ParityError,
    machine,
    only_reported,
    settle,
    table,
)

__all__ = [
    "LIMITS",
    "Answers",
    "Infer",
    "Parity",
    "ParityError",
    "compare",
    "compare_slots",
    "folder_photos",
    "gate",
    "machine",
    "only_reported",
    "parity_photos",
    "settle",
    "table",
]

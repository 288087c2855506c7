"""What a case is given: the options of the run and a scratch folder of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.options import Options
from benchmarks.ranks import Measured, Work, launch


@dataclass(frozen=True, slots=True)
class Bench:
    options: Options
    scratch: Path

    def launch(self, world_size: int, work: Work, *args: Any) -> Measured:
        """Runs `work` on new ranks in the case's scratch folder."""
        return launch(world_size, work, self.scratch, self.options, *args)

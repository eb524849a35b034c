"""Log-probabilities of the reference model that are computed once, before training, and kept in a file."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..distributed.collectives import gather_objects
from ..lora.adapter_files import WEIGHTS_NAME

#: Rounds of batches, one per rank, between two writes of the file.
_SAVED_EVERY = 100


class ReferenceLogProbs:
    """The reference's log-probabilities of all answers of a data set, to train and to validate on.

    They are computed in batches whose rows do not depend on the number of ranks, so that a file does not either. It is
    written from time to time, so a run that is killed while it computes them goes on where it was.

    Args:
        path: The file (safetensors): ``log_probs`` float32 [N, 2], NaN where they are not computed yet. Of pair i they
            are those of the chosen and the rejected answer; of labelled answer i those of it and of the other answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table: Tensor | None = None
        """[N, 2], float32; ``None`` before :meth:`find`."""

    @property
    def is_known(self) -> bool:
        """Whether all are computed."""
        return self.table is not None

    def of(self, index: Tensor, device: torch.device) -> Tensor:
        """Those of the pairs or answers ``index``, int64 [P]: float32 [P, 2] on ``device``."""
        assert self.table is not None, "find() comes first"
        self.table = self.table.to(device)
        return self.table[index]

    def find(self, module: Any) -> None:
        """Read the file, and compute what it lacks. All ranks must call this together.

        Args:
            module: The :class:`~lightning_qlora.modules.training.preference.QLoRAPreference`, attached to a Trainer
                that is fitting or validating with a data module.

        Raises:
            ValueError: If the data module cannot give its rows in a fixed order; or if something is left to compute
                that the adapters, which training has changed, can no longer tell.
        """
        data, trainer = module.trainer.datamodule, module.trainer
        if not hasattr(data, "reference_batch"):
            raise ValueError(
                "--precompute_reference needs a data module with reference_batch(), such as PreferenceDataModule."
            )
        identity = self._identity(module, data)
        # Rank 0 alone reads, because others may not see its disk.
        table = gather_objects(self._read(identity, data.num_train + data.num_val) if trainer.is_global_zero else None)[
            0
        ]
        assert table is not None
        todo = [number for number in range(data.num_reference_batches) if self._lacks(table, data, number)]
        if todo:
            if module.init_adapter is not None and trainer.global_step > 0:
                raise ValueError(
                    f"{self.path} does not hold the reference of this run, and its model, {module.init_adapter}, has "
                    "been trained since. Put the file back, or start in a new --output_dir."
                )
            rank_zero_info(
                f"Computing the reference's log-probabilities in {len(todo)} of {data.num_reference_batches} batches."
            )
            self._compute(module, data, table, todo, identity)
        self.table = table

    @staticmethod
    def _lacks(table: Tensor, data: Any, number: int) -> bool:
        return bool(table[data.reference_index(number)].isnan().any())

    def _compute(self, module: Any, data: Any, table: Tensor, todo: list[int], identity: dict[str, Any]) -> None:
        trainer = module.trainer
        ranks, rank = trainer.world_size, trainer.global_rank
        found: list[tuple[list[int], list[list[float]]]] = []
        rounds = math.ceil(len(todo) / ranks)
        for turn in range(rounds):
            place = turn * ranks + rank
            # A rank that gets none computes a blank one: sharded weights are gathered by all ranks together.
            batch = data.reference_batch(todo[place] if place < len(todo) else None)
            batch = trainer.strategy.batch_to_device(batch, module.device)
            with trainer.precision_plugin.forward_context():
                own = module.fixed_log_probs(batch, adapters=module.init_adapter is not None)
                if module.objective.paired:
                    values = own.view(-1, 2)
                else:
                    other = module.fixed_log_probs(batch["other"], adapters=module.init_adapter is not None)
                    values = torch.stack([own, other], dim=1)
            found.append((batch["index"].tolist(), values.tolist()))
            if (turn + 1) % _SAVED_EVERY == 0 or turn + 1 == rounds:
                for index, rows in (part for parts in gather_objects(found) for part in parts):
                    if index:
                        table[index] = torch.tensor(rows, dtype=torch.float32)
                found.clear()
                if trainer.is_global_zero:
                    self._write(table, identity)

    @staticmethod
    def _identity(module: Any, data: Any) -> dict[str, Any]:
        """What the log-probabilities depend on."""
        adapter = None
        if module.init_adapter is not None:
            adapter = hashlib.sha256((module.init_adapter / WEIGHTS_NAME).read_bytes()).hexdigest()
        return {
            "base": module.identity.fingerprint, "adapter": adapter, "data": data.fingerprint,
            "val_data": data.val_fingerprint, "precision": str(module.trainer.precision_plugin.precision),
            "batch_size": data.batch_size,
        }  # fmt: skip

    def _read(self, identity: dict[str, Any], count: int) -> Tensor:
        """The file's table, or one of NaN where there is no file or one of something else."""
        empty = torch.full((count, 2), math.nan)
        if not self.path.is_file():
            return empty
        with safe_open(self.path, "pt") as file:
            saved = json.loads((file.metadata() or {}).get("identity", "{}"))
            if saved == identity:
                table: Tensor = file.get_tensor("log_probs")
                return table
        changed = [name for name in identity if saved.get(name) != identity[name]]
        rank_zero_info(f"{self.path} is of another run ({', '.join(changed)} differ), and is computed anew.")
        return empty

    def _write(self, table: Tensor, identity: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".part")
        save_file({"log_probs": table}, written, {"identity": json.dumps(identity)})
        written.replace(self.path)

"""What of the engine goes into a checkpoint, and back: DeepSpeed's own files, with a record of what lies where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import HeadraceError
from pretrain.distributed import Distributed
from pretrain.optimizer import MatrixWise

from .by_name import load_by_name
from .expert_groups import ExpertGroups
from .files import CheckpointFiles
from .layout import TAG, Key, Layout, Place, read_layout, resolve, write_layout
from .low_precision import write_low_precision
from .shards import Shard


class EngineCheckpoints:
    """Saves and loads one engine.

    Args:
        engine: DeepSpeed's, whose checkpoint engine is replaced.
        optimizer: the one that DeepSpeed was given.
        shards: what it steps on this rank.
        shapes: of all parameters on this rank, by name.
        stage: of ZeRO.
        ranks: this process among its peers.
        experts: those that it shares experts with.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        shards: Sequence[Shard],
        shapes: Mapping[str, tuple[int, ...]],
        stage: int,
        ranks: Distributed,
        experts: ExpertGroups,
    ) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._shards = shards
        self._shapes = dict(shapes)
        self._stage = stage
        self._ranks = ranks
        self._experts = experts
        self._files = CheckpointFiles(engine.checkpoint_engine, self._check_saved, ranks.device)
        engine.checkpoint_engine = self._files
        # copies of DeepSpeed's own tools: an error of the disk there would come between its barriers
        engine._copy_recovery_script = lambda folder: None

    def begin_save(self, folder: Path, later: bool) -> Callable[[], list[Path]]:
        """Write and flush this rank's part, or copy it; see :meth:`.engine.Engine.begin_save`."""
        layout = self.layout
        self._files.later = later
        try:
            self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        except OSError as error:
            # the others wait for this rank in a barrier of DeepSpeed's: to go on to the next collective would hang all
            raise HeadraceError(f"DeepSpeed could not save below {folder}: {error}") from error

        def write() -> list[Path]:
            written = self._files.write()
            return [*written, write_layout(folder, layout)] if self._ranks.rank == 0 else written

        return write

    def load(self, folder: Path) -> None:
        """Restore what :meth:`save` wrote, on whatever topology; see :meth:`.engine.Engine.load`."""
        saved = read_layout(folder)
        # DeepSpeed itself would give all ranks the experts of the first
        if saved == self.layout and not self._experts.divided:
            self._load_alike(folder)
        else:
            self.load_by_name(folder, saved)

    def _load_alike(self, folder: Path) -> None:
        """By DeepSpeed itself, which reads every file where it was written."""
        wrapper = self._engine.optimizer
        groups, clip = wrapper.param_groups, getattr(wrapper, "clip_grad", None)
        configured = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise HeadraceError(
                f"DeepSpeed found no state to load below {folder / TAG}, though its files are complete."
            )
        # the configuration decides, not what it was when the checkpoint was saved
        for group, settings in zip(wrapper.param_groups, configured, strict=True):
            group.update(settings)
        if clip is not None:
            wrapper.clip_grad = clip

    def load_by_name(self, folder: Path, saved: Layout) -> int:
        """Slice by slice (:mod:`.by_name`); returns the bytes that this rank copied into its optimizer. Collective."""
        if saved.shapes != self.layout.shapes:
            differing = sorted(dict(set(saved.shapes.items()) ^ set(self.layout.shapes.items())))
            raise HeadraceError(f"{folder} holds other parameters than this model: {', '.join(differing[:4])}")
        copied = load_by_name(folder, saved, self._shards, self._optimizer, self._homes)
        write_low_precision(self._engine.optimizer, self._stage)
        content = torch.load(folder / saved.model, map_location="cpu", mmap=True, weights_only=False)
        with torch.no_grad():
            stored = content["module"]
            for name, buffer in self._engine.module.named_buffers():
                if name in stored:  # the others follow from the configuration
                    buffer.copy_(stored[name])
        for counter in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self._engine, counter, content[counter])
        return copied

    @property
    def _homes(self) -> dict[str, Tensor]:
        return self._optimizer.homes() if isinstance(self._optimizer, MatrixWise) else {}

    @cached_property
    def layout(self) -> Layout:
        """Of every checkpoint of this engine. Collective when it is first asked for."""
        own = [place for _, place in self._saved]
        model = Path(self._engine._get_ckpt_name("", TAG)).as_posix()
        found = self._ranks.gather_objects((model, self._shapes, own))
        shapes = {name: shape for _, of_rank, _ in found for name, shape in of_rank.items()}
        return Layout(found[0][0], shapes, tuple(place for _, _, places in found for place in places))

    @cached_property
    def _saved(self) -> list[tuple[Shard, Place]]:
        """The tensors that this rank saves, and where they come to lie."""
        saves = [True] * len(self._shards)
        if self._stage == 0 and self._ranks.rank:
            # every rank holds the same, and rank 0 alone saves it, but for experts that it has not
            groups, first = self._optimizer.param_groups, self._experts.alike.rank == 0
            saves = [first and groups[shard.group].get("moe", False) for shard in self._shards]
        if self._stage:
            name = self._engine._get_zero_ckpt_name("", TAG)
        elif self._experts.divided:
            name = self._engine._get_optimizer_ckpt_name("", TAG, self._experts.across.rank)
        else:
            name = self._engine._get_ckpt_name("", TAG)
        file, homes = Path(name).as_posix(), self._homes
        places = [
            Place(
                file,
                shard.weights,
                (*self._states, number),
                shard.tensor.numel(),
                shard.parts,
                tuple(sorted(name for name, home in homes.items() if home is shard.tensor)),
            )
            for number, shard in enumerate(self._shards)
        ]
        return [(shard, place) for shard, place, own in zip(self._shards, places, saves, strict=True) if own]

    @property
    def _states(self) -> tuple[Key, ...]:
        """What leads to the optimizer's states, which torch numbers in the order of its tensors."""
        if self._stage == 0:
            has_masters = hasattr(self._engine.optimizer, "fp32_groups")
            return ("optimizer", "optimizer_state_dict", "state") if has_masters else ("optimizer", "state")
        return ("optimizer_state_dict", "optimizer_state_dict" if self._stage == 3 else "base_optimizer_state", "state")

    def _check_saved(self, path: str, content: Any) -> None:
        """Hold what DeepSpeed is about to write against the record of it, tensor by tensor.

        At stage 0 the optimizer of each rank's experts comes in a file of its own, to which their weights are added.

        Raises:
            HeadraceError: something else would lie where the record says that the weights or their state lie.
        """
        for shard, place in self._saved:
            if not path.endswith(f"/{place.file}"):
                continue
            if self._stage == 0 and self._experts.divided:
                content.setdefault("module", {})[place.weights[-1]] = shard.tensor.detach()
            weights, state = resolve(content, place.weights), resolve(content, place.state)
            own = self._optimizer.state.get(shard.tensor) or {}
            # DeepSpeed may leave filling out, so the saved tensor may be shorter; without a step there is no state
            if (place.parts and weights.data_ptr() != shard.tensor.data_ptr()) or (own and state is not own):
                raise HeadraceError(
                    f"{path}: DeepSpeed saves something else under {list(place.weights)} or {list(place.state)} than "
                    f"the optimizer's tensor of {', '.join(part.name for part in place.parts[:3])}. Use the tested "
                    "version of DeepSpeed, and leave out what engine.deepspeed changes in its checkpoints."
                )

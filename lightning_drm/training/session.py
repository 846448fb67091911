"""What a run has collected so far, and how it becomes a merged model.

    note_base → training, by whatever loop → collect → … the next task … → fuse

The session holds the task vectors that have arrived, the base that they share, the ranks that keep them, and of every
task's module what the merged model needs beside its weights. It needs no Trainer: a loop written by hand, Lightning
Fabric, `DRMMergeCallback` and `MergeTrainer` all talk to it in the same way.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning.fabric import is_wrapped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_drm.deltas import (
    Base,
    Collected,
    TaskVector,
    backbone_parameters,
    fingerprint,
    is_quantized_base,
    save_task_vector,
    transposed_names,
)
from lightning_drm.deltas.compiled import uncompiled
from lightning_drm.deltas.kinds import Kind
from lightning_drm.deltas.sharded import shard_like
from lightning_drm.deltas.wrappers import refuse_flat
from lightning_drm.distributed.ranks import ALONE, Ranks
from lightning_drm.distributed.watch import watched
from lightning_drm.fusion import (
    Decompositions,
    Fusion,
    Override,
    Recipe,
    facts_on_kinds,
    merge_side_by_side,
    merging_bytes,
    model_card,
    too_large_as_a_whole,
    treatments,
)
from lightning_drm.fusion.depth import notes_on_depth, problems_of_depth
from lightning_drm.merging import DRM, LowRank, Method, Need
from lightning_drm.merging.low_rank import densify
from lightning_drm.modules import MultiTaskModule, head_names_of, of_all_tasks
from lightning_drm.names import check_task_name
from lightning_drm.storage import write_json
from lightning_drm.training.assembly import Assembled, assemble, with_deltas
from lightning_drm.training.delta_cache import DeltaCache, Store
from lightning_drm.training.exchange import Owners, merge_factors_together, merge_together
from lightning_drm.training.kept_modules import KeptModules
from lightning_drm.training.merged_folder import loading_code, write_merged
from lightning_drm.training.progress import merging_bar
from lightning_drm.training.room import home_of_merged
from lightning_drm.training.run_folder import BATCH_NORM, RECORD_FILE, STATISTICS, RunFolder
from lightning_drm.training.statistics import extended


class MergeSession:
    """Collects what each task's training added to a shared base, and fuses it into one model.

    Where several processes train together (``torch.distributed``), all of them make the same calls in the same order.
    They also merge together: each keeps and merges its share of the parameters.

    Args:
        tasks: The tasks' names, in the order of the test dataloaders.
        method: How deltas are merged.
        dirpath: Run folder, where deltas, heads and the merged model are written. Nothing is written without it.
        head: Names of the submodules or parameters that are a task's head; the module's own ``head_names`` if left out.
        coefficients: Coefficient by task; 1.0 for a task that is not named.
        convolutions: ``"matrix"`` merges convolution weights as ``(out, in·k·k)`` matrices, ``"average"`` does not.
        non_matrix: What a matrix method does to all other parameters: the weighted ``"average"`` of all tasks, or of
            those that ``"elect"`` the same sign.
        overrides: Exceptions by name; the first that matches a parameter counts.
        store: Where deltas wait for the other tasks: on the ``device``, in host memory (``cpu``), or on ``disk``.
            ``auto`` takes the disk if there is a run folder, else the device while it has room, else host memory.
        batch_norm_batches: How many training batches of each task (of each process) estimate the running statistics of
            the merged model's batch norms again, where `fuse` is given batches; 0 leaves them merged like all other
            buffers. It costs nothing where there are none, or where training has kept their statistics fixed.

    Raises:
        ValueError: If names repeat or cannot be folder names, coefficients are given for unknown tasks,
            ``store="disk"`` has no ``dirpath``, or ``batch_norm_batches`` is negative.

    Example:
        >>> import copy
        >>> from lightning_drm import TaskArithmetic
        >>> base = nn.Linear(2, 2, bias=False)
        >>> session = MergeSession(["up", "down"], method=TaskArithmetic(scale=0.5), head=[])
        >>> for task, step in {"up": 1.0, "down": -3.0}.items():
        ...     model = copy.deepcopy(base)
        ...     session.note_base(model)
        ...     _ = model.weight.data.add_(step)  # stands for training
        ...     session.collect(model, task)
        >>> merged = session.fuse().task_module("up")
        >>> torch.allclose(merged.weight, base.weight - 1)
        True
    """

    def __init__(
        self,
        tasks: Sequence[str],
        method: Method = DRM(),
        dirpath: str | os.PathLike[str] | None = None,
        *,
        head: Sequence[str] | None = None,
        coefficients: Mapping[str, float] | None = None,
        convolutions: Literal["average", "matrix"] = "average",
        non_matrix: Literal["average", "elect"] = "average",
        overrides: Sequence[Override] = (),
        store: Store = "auto",
        batch_norm_batches: int = 100,
    ) -> None:
        self.tasks = list(tasks)
        for task in self.tasks:
            check_task_name(task)
        self.recipe = Recipe(method, dict(coefficients or {}), convolutions, non_matrix, tuple(overrides))
        self.run_folder = RunFolder(dirpath) if dirpath is not None else None
        self.store = store
        self.head = head
        self.batch_norm_batches = batch_norm_batches
        problems = []
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            problems.append(f"tasks must be different names, at least one, got {self.tasks}")
        if store not in ("auto", "device", "cpu", "disk"):
            problems.append(f"store must be auto, device, cpu or disk, got {store!r}")
        if store == "disk" and dirpath is None:
            problems.append("store='disk' needs a dirpath to write to")
        if batch_norm_batches < 0:
            problems.append(f"batch_norm_batches must be 0 or more, got {batch_norm_batches}")
        if problems:
            raise ValueError(f"{'; '.join(problems)}.")
        self.recipe.check(self.tasks)
        self._base = Base()
        self._vectors: dict[str, TaskVector] = {}
        self._modules = KeptModules(self.tasks)
        self._ranks: Ranks | None = None
        self._owners = Owners(self.recipe, self.tasks)
        self._device = torch.device("cpu")  # of the module that was collected last
        self._merged: MultiTaskModule | None = None

    @property
    def missing(self) -> list[str]:
        """The tasks that have not arrived yet."""
        return [task for task in self.tasks if task not in self._vectors]

    @property
    def task_vectors(self) -> dict[str, TaskVector]:
        """The task vectors that have arrived, in the order of ``tasks``.

        With several ranks, deltas that another rank keeps are meta tensors here.
        """
        return {task: self._vectors[task] for task in self.tasks if task in self._vectors}

    @property
    def is_merged(self) -> bool:
        """Whether the merged model is there."""
        return self._merged is not None

    @property
    def merged(self) -> MultiTaskModule:
        """What `fuse` returned last.

        Raises:
            RuntimeError: If nothing was fused yet, naming the tasks that are missing.
        """
        if self._merged is None:
            reason = f"tasks {', '.join(self.missing)} are missing" if self.missing else "call fuse() first"
            raise RuntimeError(f"Nothing is merged yet: {reason}.")
        return self._merged

    @property
    def ranks(self) -> Ranks:
        """The processes that collect and merge together; all of the default process group unless `join` said else."""
        if self._ranks is None:
            self.join(dist.get_world_size() if dist.is_initialized() else 1)
        assert self._ranks is not None
        return self._ranks

    def join(self, world_size: int) -> Ranks:
        """Lets all ranks of the default process group collect and merge together from now on.

        Args:
            world_size: How many processes take part; 1 leaves this one alone.

        Returns:
            The ranks.
        """
        if self._ranks is None or self._ranks.size != world_size:
            self._ranks = Ranks.of_process_group() if world_size > 1 else ALONE
            self._owners = Owners(self.recipe, self.tasks)
        return self._ranks

    def keep_module(self, module: nn.Module, task: str) -> None:
        """Notes of a task's module what the merged model needs beside its weights; `collect` does so by itself.

        Needed before a module is sharded, after which PyTorch refuses to copy it, and for a task that is restored.

        Args:
            module: The task's own module, not sharded; it stays as it is.
            task: The task's name.

        Raises:
            ValueError: If there is no such task.
        """
        self._require_task(task)
        self._modules.keep(_unwrapped(module), task)

    def knows_module(self, task: str) -> bool:
        """Whether `keep_module` or `collect` has seen a task's own module."""
        return task in self._modules

    def note_base(self, module: nn.Module, task: str | None = None) -> None:
        """Notes the weights that every task starts from, and refuses now what could not be merged after training.

        Args:
            module: A task's module before its first training step, with its adapters in place, on any device. Call it
                again for each task: the base must be the same.
            task: The task's name, for messages.

        Raises:
            ValueError: If the base differs from an earlier task's, if the ranks differ, or if the module or the recipe
                does not fit; names what.
        """
        module = _unwrapped(module)
        head = head_names_of(module, self.head)
        self._base.remember(module, head, task, self.ranks)
        trained = self._base.trained(module, head)
        shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
        kinds = {name: parameter.kind for name, parameter in trained.items()}
        problems = self.recipe.misfits(kinds, shapes, transposed_names(module, trained))
        if problems := problems + problems_of_depth(self.recipe.method, self._base.hashes):
            raise ValueError("\n".join(problems))
        if is_quantized_base(backbone_parameters(module, head)):
            self._require_factors(self.recipe, kinds)
        self._owners.share_out(trained, self.ranks.size)

    def collect(
        self,
        module: nn.Module,
        task: str,
        *,
        settings: Mapping[str, object] | None = None,
        num_steps: int | None = None,
    ) -> None:
        """Takes what training added to the base; stores it if there is a run folder. The module stays as it is.

        A task that is collected again replaces what was collected before.

        Args:
            module: The task's module after training, however it was trained.
            task: The task's name.
            settings: Hyper-parameters of the finetune, to be stored with it.
            num_steps: How many optimizer steps it took, to be stored with it.

        Raises:
            ValueError: If there is no such task, a delta is not finite, or frozen parameters have changed.
            RuntimeError: If `note_base` was not called before training, or the module is sharded and was not kept.
        """
        module = self._trained(module, task)
        self._modules.keep_trained(module, task)
        head, cache = head_names_of(module, self.head), self._cache
        vector = self._base.task_vector(
            module, head, task, settings, num_steps=num_steps, ranks=self.ranks, keep=cache.place
        )
        self._vectors[task] = cache.take_in(vector)
        self._merged = None
        self._device = next(module.parameters()).device

    def collect_statistics(
        self,
        module: nn.Module,
        task: str,
        batches: Iterable[Any],
        statistics: Sequence[Need] = ("gram",),
        *,
        num_samples: int = 256,
        count_padding: bool = False,
    ) -> None:
        """Takes statistics of a collected task's training data, for the methods that need them.

        They belong to the deltas that the task has now, and are stored with them. All ranks call it together.

        Args:
            module: The task's module, trained, with whole weights; it stays as it is.
            task: The task's name.
            batches: Its training data. Of a ``DataLoader``, samples are chosen, always the same ones, and each rank
                takes its share; of anything else all batches are taken, which each rank has of its own, on the module's
                device.
            statistics: Which: ``gram`` (the inputs of linear layers, for RegMean and WUDI), ``fisher``.
            num_samples: How many samples, over all ranks.
            count_padding: Whether positions count in Gram matrices that the batches' ``attention_mask`` leaves out.

        Raises:
            ValueError: If there is no such task, it was not collected, or the module does not give what is asked.
        """
        self._require_task(task)
        if task not in self._vectors:
            raise ValueError(f"Task {task!r} was not collected yet, so there is nothing that statistics belong to.")
        module, vector = _unwrapped(module), self._vectors[task]
        refuse_flat(module)
        how = Collected(num_samples, count_padding)
        found = extended(vector, module, head_names_of(module, self.head), batches, statistics, how, self.ranks)
        if self.run_folder is not None:
            self.ranks.wait()  # until no rank reads the file any more that is replaced
            if self.ranks.is_first:
                self.run_folder.save_statistics(task, found)
            self.ranks.wait()
            found = self.run_folder.load_task_vector(task).statistics or found
        self._vectors[task] = replace(vector, statistics=found)
        self._merged = None

    def snapshot(
        self, module: nn.Module, task: str, num_steps: int, *, settings: Mapping[str, object] | None = None
    ) -> None:
        """Stores what training has added to the base so far, and changes nothing. All ranks call it together.

        Args:
            module: The task's module in its training.
            task: The task's name.
            num_steps: How many optimizer steps it has taken.
            settings: Hyper-parameters of the finetune, to be stored with it.

        Raises:
            ValueError: If there is no run folder, and as `collect`.
            RuntimeError: If `note_base` was not called before training.
        """
        if self.run_folder is None:
            raise ValueError("Snapshots are files of the run folder: give a dirpath.")
        module = self._trained(module, task)
        place = "cpu" if self.ranks.is_first else "meta"
        vector = self._base.task_vector(
            module,
            head_names_of(module, self.head),
            task,
            settings,
            num_steps=num_steps,
            ranks=self.ranks,
            keep=lambda name, delta: delta.to(place),
        )
        if self.ranks.is_first:
            save_task_vector(vector, self.run_folder.snapshot(task, num_steps))
        self.ranks.wait()

    def restore(self, tasks: Sequence[str] | None = None) -> list[str]:
        """Takes up task vectors that the run folder already has.

        Args:
            tasks: Which ones; whatever the folder has of those that are missing if left out.

        Returns:
            The names of the tasks that were taken up.

        Raises:
            FileNotFoundError: If one of the named tasks was never finetuned.
            ValueError: If there is no run folder, or a base differs.
        """
        if self.run_folder is None:
            raise ValueError("There is no dirpath, so there is nothing to restore from.")
        if tasks is None:
            found = [task for task in self.missing if self.run_folder.has_task_vector(task)]
            tasks = self.ranks.gather(found)[0]  # other ranks may see new files late
        for task in tasks:
            vector = self.run_folder.load_task_vector(task)
            self._base.require(vector.base_hashes, task, where=str(self.run_folder.path))
            self._vectors[task] = vector
            self._merged = None
        return list(tasks)

    def fuse(
        self,
        method: Method | None = None,
        *,
        recipe: Recipe | None = None,
        module: nn.Module | None = None,
        device: torch.device | str | None = None,
        batch_norm: Mapping[str, Iterable[Any]] | None = None,
        vectors: Mapping[str, TaskVector] | None = None,
    ) -> MultiTaskModule:
        """Merges all task vectors, and writes the merged model if there is a run folder.

        Nothing is used up: another method can fuse again, without training.

        Args:
            method: The merging method; the session's if left out.
            recipe: All that decides the merge, in place of the session's method, coefficients and exceptions.
            module: Any module of this base, trained or not. It is needed where nothing was collected here, and stands
                in for the modules of tasks that were only restored; else the one that was collected last does.
            device: Where to compute; where the last task was collected, or else the given module's, if left out.
            batch_norm: By task, batches of its training data (a `torch.utils.data.DataLoader`, say), on which the
                running statistics of batch norms are estimated again: ``batch_norm_batches`` of each. Each of these
                tasks then has statistics of its own; others share those that are merged like all other buffers. They
                are not asked for where no batch norm has learned statistics.
            vectors: By task, what is merged in place of the task vectors that have arrived: the same deltas with other
                statistics, as `propagated` gives them.

        Returns:
            The merged model, on the device of the given or the last collected module, or sharded as that module is; in
            host memory, with a warning, where the device has no room for it beside what is there.

        Raises:
            RuntimeError: If tasks are missing.
            ValueError: If what is to be merged does not fit together, or another rank was killed, naming it.
        """
        if self.missing:
            raise RuntimeError(f"Cannot merge: tasks {', '.join(self.missing)} have not arrived.")
        if method is not None and recipe is not None:
            raise ValueError("fuse takes a method or a recipe, which has a method of its own, got both.")
        recipe = recipe or (self.recipe if method is None else replace(self.recipe, method=method))
        recipe.check(self.tasks)
        if module is not None:
            module = _unwrapped(module)
            refuse_flat(module)
        modules = self._modules.of_all_tasks(module, warn=self.ranks.is_first)
        home = next(module.parameters()).device if module is not None else self._device
        writes = self.run_folder is not None and self.ranks.is_first
        merged: dict[str, Tensor] = {}
        written: dict[str, Tensor] = {}
        for task in batch_norm or ():
            self._require_task(task)
        heads = {task: dict(vector.head) for task, vector in self.task_vectors.items()}
        with watched(self.ranks, _advice(self.run_folder)):  # which all ranks leave together
            base = self._base.tensors(module, head_names_of(module, self.head) if module is not None else ())
            place = torch.device(device or home)
            chosen = self.task_vectors if vectors is None else vectors
            fusion = self._fusion(recipe, modules[self.tasks[0]], place, chosen)
            wanted = home
            factors: dict[str, LowRank] = {}
            with merging_bar(type(recipe.method).__name__, self.ranks) as progress:
                if self._is_quantized(modules[self.tasks[0]]):
                    self._require_factors(recipe, fusion.kinds)
                    factors = merge_factors_together(fusion, self._owners, self.ranks, home, progress)
                    weights: Iterable[tuple[str, Tensor]] = base.items()
                else:
                    home = home_of_merged(wanted, base, self._merging_bytes(fusion, base), self.ranks)
                    weights = merge_together(fusion, base, self._owners, self.ranks, home, progress)
                for name, weight in weights:
                    # Copied where it is the base's: training may go on, and must not change the merged model by it.
                    own = weight.to(home, copy=name not in fusion.kinds or name in factors)
                    merged[name] = shard_like(own, base[name])
                    if writes:
                        written[name] = own.cpu()
            estimating = place if home == wanted else home
            assembled = self._assembled(modules, merged, heads, batch_norm, factors, home=home, device=estimating)
            if writes:
                merged_parts: dict[str, Tensor | LowRank] = {**written, **factors}
                shapes = {name: tuple(part.shape) for name, part in merged_parts.items()}
                facts = facts_on_kinds(fusion.treatments, fusion.kinds, shapes)
                facts += [*notes_on_depth(recipe.method, merged_parts, fusion.kinds), *fusion.notes]
                self._write(recipe, chosen, modules, written, heads, assembled, facts, factors)
        self._merged = assembled.module
        return assembled.module

    def finetuned(self, module: nn.Module, task: str) -> MultiTaskModule:
        """Rebuilds one task's finetuned model from its task vector. All ranks call it together.

        Args:
            module: The task's module, untrained and not sharded; it stays as it is.
            task: The task's name.

        Returns:
            A module with that task alone, on the given module's device.

        Raises:
            ValueError: If the module was fitted under FSDP1.
        """
        module = _unwrapped(module)
        refuse_flat(module)
        vector = self._vectors[task]
        deltas = ((name, self._cache.fetch(vector, name)) for name in vector.deltas)
        heads = {task: vector.head}
        if self._is_quantized(module):
            factors = {name: delta.to(_device(module)) for name, delta in deltas if isinstance(delta, LowRank)}
            return MultiTaskModule.assemble(
                {task: module}, self.base_weights(module), heads, head=self.head, factors=factors
            )
        dense = ((name, densify(delta)) for name, delta in deltas)
        backbone = with_deltas(self._base, module, self.head, dense)
        return MultiTaskModule.assemble({task: module}, backbone, heads, head=self.head)

    def base_weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The base's tensors by name.

        Args:
            module: An untrained module of this base.
        """
        return self._base.tensors(module, head_names_of(module, self.head))

    def merge_side_by_side(
        self,
        recipes: Sequence[Recipe],
        module: nn.Module,
        *,
        device: torch.device | str | None = None,
        vectors: Sequence[Mapping[str, TaskVector]] | None = None,
        decompositions: Decompositions | None = None,
    ) -> Iterator[tuple[str, list[Tensor]]]:
        """Merges by several recipes, reading each parameter's deltas once for all of them. Writes nothing.

        Args:
            recipes: How to merge.
            module: Any module of this base, trained or not.
            device: Where to compute; where the module is, if left out.
            vectors: For each recipe, and by task, what to merge: the same deltas, of which statistics may differ. All
                task vectors that have arrived if left out.
            decompositions: Keeps what later merges of the same task vectors can use again.

        Yields:
            Name of every parameter that a task has trained, and its merged deltas, one for each recipe.

        Raises:
            ValueError: If a recipe does not fit, or the base is quantized.
        """
        self._require_dense(module)
        place = torch.device(device or next(module.parameters()).device)
        chosen = [self.task_vectors] * len(recipes) if vectors is None else vectors
        fusions = [
            self._fusion(recipe, module, place, own, decompositions)
            for recipe, own in zip(recipes, chosen, strict=True)
        ]
        yield from merge_side_by_side(fusions)

    def with_deltas(
        self,
        deltas: Iterable[tuple[str, Tensor]],
        module: nn.Module,
        tasks: Sequence[str] | None = None,
        *,
        heads: Mapping[str, Mapping[str, Tensor]] | None = None,
        batch_norm: Mapping[str, Iterable[Any]] | None = None,
    ) -> MultiTaskModule:
        """A model whose backbone is the base plus any deltas. Writes nothing.

        Args:
            deltas: Pairs of a parameter's name and its dense delta; all other parameters are the base's.
            module: An untrained module of this base, on the device where the model is to be.
            tasks: The model's tasks; all if left out.
            heads: By task, its head's tensors by name; those that were finetuned if left out.
            batch_norm: As for `fuse`.
        """
        self._require_dense(module)
        device = next(module.parameters()).device
        chosen = list(self.tasks if tasks is None else tasks)
        finetuned = {task: self._vectors[task].head for task in chosen} if heads is None else heads
        known = self._modules.of_all_tasks(module, warn=False)
        return self._assembled(
            {task: known[task] for task in chosen},
            with_deltas(self._base, module, self.head, deltas),
            {task: finetuned[task] for task in chosen},
            batch_norm,
            home=device,
            device=device,
        ).module

    def _assembled(
        self,
        modules: Mapping[str, nn.Module],
        backbone: Mapping[str, Tensor],
        heads: Mapping[str, Mapping[str, Tensor]],
        batches: Mapping[str, Iterable[Any]] | None,
        factors: Mapping[str, LowRank] | None = None,
        *,
        home: torch.device,
        device: torch.device,
    ) -> Assembled:
        """A model with its heads at home, whose batch norms are estimated on a device."""
        return assemble(
            modules,
            backbone,
            {task: {name: tensor.to(home) for name, tensor in state.items()} for task, state in heads.items()},
            self.task_vectors,
            factors=factors,
            head=self.head,
            batches=batches,
            max_batches=self.batch_norm_batches,
            device=device,
            ranks=self.ranks,
        )

    def _fusion(
        self,
        recipe: Recipe,
        module: nn.Module,
        device: torch.device,
        vectors: Mapping[str, TaskVector],
        decompositions: Decompositions | None = None,
    ) -> Fusion:
        """What merges this rank's share of the parameters; finds owners for what only stored task vectors train."""
        parameters = backbone_parameters(module, head_names_of(module, self.head))
        trained = {name for vector in vectors.values() for name in vector.deltas}
        self._owners.share_out({name: p for name, p in parameters.items() if name in trained}, self.ranks.size)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        kinds = {name: kind for vector in vectors.values() for name, kind in vector.kinds.items()}
        known = treatments(recipe, kinds, list(vectors), list(vectors.values()))
        return Fusion(
            recipe,
            list(vectors.values()),
            device,
            shapes=shapes,
            in_pieces=too_large_as_a_whole(known, shapes, device),
            transposed=transposed_names(module, parameters),
            share={name for name, owner in self._owners.items() if owner == self.ranks.rank},
            reduce=self.ranks.sum,
            decompositions=decompositions,
        )

    def _merging_bytes(self, fusion: Fusion, base: Mapping[str, Tensor]) -> int:
        """About how many bytes of its device a fusion takes beside deltas and weights."""
        shapes = {name: tuple(base[name].shape) for name in fusion.kinds}
        return merging_bytes(
            fusion.treatments,
            shapes,
            len(self.tasks),
            fusion.device,
            ranks=self._owners.low_rank,
            in_pieces=fusion.in_pieces,
        )

    def _write(
        self,
        recipe: Recipe,
        vectors: Mapping[str, TaskVector],
        modules: Mapping[str, nn.Module],
        backbone: Mapping[str, Tensor],
        heads: Mapping[str, Mapping[str, Tensor]],
        assembled: Assembled,
        facts: Sequence[str],
        factors: Mapping[str, LowRank],
    ) -> None:
        run_folder = self.run_folder
        assert run_folder is not None
        first, statistics = self.tasks[0], assembled.statistics
        if statistics:
            common = {name: tensor for name, tensor in of_all_tasks(statistics).items() if name in backbone}
            backbone = {**backbone, **{name: tensor.to(backbone[name].dtype) for name, tensor in common.items()}}
        alone = MultiTaskModule.assemble(
            {first: modules[first]}, backbone, {first: heads[first]}, head=self.head, factors=factors
        )
        module = alone.task_module(first)
        card = model_card(
            recipe,
            {task: {"parameters with a delta": len(vector.deltas)} for task, vector in vectors.items()},
            base=getattr(module, "backbone_name", None),
            base_fingerprint=fingerprint(self._base.hashes),
            facts=[*facts, *([_STATISTICS_FACT] if statistics else []), *([_ADAPTER_FACT] if factors else [])],
            loading=loading_code(first, module),
        )
        record: dict[str, Any] = {
            "method": recipe.description(self.tasks),
            "base_fingerprint": fingerprint(self._base.hashes),
            "deltas": {task: run_folder.fingerprint(task) for task in self.tasks},
        }
        if assembled.learned:  # else no setting can change them, and the record is that of versions without one
            number = self.batch_norm_batches if statistics.keys() == set(assembled.learned) else 0
            record[BATCH_NORM] = {"batches": number, "tasks": sorted(statistics)}
        if recipe.method.needs is not None:
            how = {task: vector.statistics.collected for task, vector in vectors.items() if vector.statistics}
            record[STATISTICS] = {task: asdict(found[recipe.method.needs]) for task, found in how.items()}

        def finish(partial: Path) -> None:
            write_json(partial / RECORD_FILE, record)
            run_folder.put_aside(record)

        known = {task: own for task, own in modules.items() if task in self._modules}
        names = head_names_of(module, self.head)
        write_merged(run_folder.merged, module, names, heads, card, finish, statistics, known, factors)

    def _is_quantized(self, module: nn.Module) -> bool:
        return is_quantized_base(backbone_parameters(module, head_names_of(module, self.head)))

    def _require_factors(self, recipe: Recipe, kinds: Mapping[str, Kind]) -> None:
        """Refuses a recipe whose result would be no adapter, which is all that a quantized base can take up."""
        reasons = recipe.misfits_of_factors(kinds, self.tasks)
        if recipe.method.propagate:
            reasons.append(f"{type(recipe.method).__name__} with propagate needs whole weights")
        if reasons:
            raise ValueError(
                f"The base is quantized, so what is merged must be an adapter, but {'; '.join(reasons)}: take another "
                "method, or load the base in a floating-point precision."
            )

    def _require_dense(self, module: nn.Module) -> None:
        if self._is_quantized(module):
            raise ValueError(
                "The base is quantized, and side by side, merges are studied as whole weights: fit, merge and test one "
                "method at a time, or load the base in a floating-point precision."
            )

    def _trained(self, module: nn.Module, task: str) -> nn.Module:
        self._require_task(task)
        if not self._base.hashes:
            raise RuntimeError(f"Task {task!r} cannot be collected: call note_base(module) before it is trained.")
        return _unwrapped(module)

    def _require_task(self, task: str) -> None:
        if task not in self.tasks:
            raise ValueError(f"There is no task {task!r}; tasks: {', '.join(self.tasks)}.")

    @property
    def _cache(self) -> DeltaCache:
        return DeltaCache(self.store, self.run_folder, self._owners, self.ranks)


_ADAPTER_FACT = "an adapter: peft loads it on the quantized base that the tasks started from"
_STATISTICS_FACT = (
    "batch norms: running statistics of all tasks' training data; `batch_norm/<task>.safetensors` holds those of a task"
)


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module that Fabric, DDP or `torch.compile` was given."""
    while (bare := uncompiled(module)) is not module or is_wrapped(bare) or isinstance(bare, DistributedDataParallel):
        module = cast(nn.Module, bare.module) if bare is module else bare
    return module


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _advice(run_folder: RunFolder | None) -> str:
    """What to do when a rank was killed while all of them merged."""
    if run_folder is None:
        return "Nothing was stored, since there is no dirpath: the fits have to be done again."
    return f"The deltas of all tasks are in {run_folder.path}: fit or merge again, and no task is trained twice."

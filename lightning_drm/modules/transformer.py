"""One task of a transformers backbone, of any kind, finetuned in full or with LoRA."""

import copy
import inspect
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
import transformers
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from typing_extensions import override

from lightning_drm import kinds
from lightning_drm.deltas import backbone_parameters, head_state, quantized_layers
from lightning_drm.deltas.compiled import uncompiled
from lightning_drm.deltas.wrappers import unwrapped
from lightning_drm.kinds import LABELS, Classification, Kind, TaskMetrics, metrics_of
from lightning_drm.kinds.metric_states import keep_precision
from lightning_drm.modules.counted_samples import own_samples
from lightning_drm.modules.measurement import EQUAL
from lightning_drm.modules.pooling import PooledClassifier
from lightning_drm.modules.sharding import data_parallel, is_sharded, shard_for_training
from lightning_drm.pretrained import public_name, resolve_pretrained


class TransformerTask(LightningModule):
    """Finetunes a transformers backbone on one task, in full or with LoRA.

    What the task is, and what is measured, comes from its data (`configure_for`).

    Args:
        backbone: Hub name, folder, or ``package:<module>/<folder>`` of the pretrained model that all tasks start from.
        num_classes: Number of classes, or of other outputs of the head. Leave it out in a configuration of several
            tasks: each task's data gives it.
        kind: What is predicted, `Classification` if left out. Leave it out where the task's data say it.
        modality: Whether the backbone reads text or images.
        pooling: ``"model"`` uses the model that transformers defines for the backbone and the kind of task, with its
            own pooling and head; ``"mean"`` averages the last hidden states over the tokens (sentence encoders),
            ``"first"`` takes the first one, and ``"pooler"`` is the encoder's own pooled output, each followed by a
            linear head. Kinds of task that predict something for each token have a linear head on each token's last
            hidden state then. Of a model of images and texts, such as CLIP, these use the vision tower for images.
        lora: Adapters to train in place of the backbone's weights (``peft.LoraConfig``); in full if left out.
        optimizer: From parameters to an optimizer; ``torch.optim.AdamW`` as it comes if left out.
        lr_scheduler: From an optimizer to a learning-rate scheduler, stepped after every batch.
        head_lr: Learning rate of the head; the optimizer's own if left out.
        dropout: Dropout before the linear head, where ``pooling`` is not ``"model"``.
        dtype: Precision of the weights. A finetune in bfloat16 loses small deltas, hence float32.
        trust_remote_code: Run Python code that comes with the pretrained model, on the hub or in its folder. It can do
            anything that you can; without it, such a model is refused.
        revision: The version of a model on the hub: a commit, a tag or a branch; the newest one if left out.
        quantization: Fields of ``transformers.BitsAndBytesConfig``, such as ``{load_in_4bit: true}``, to load the
            backbone quantized. It needs ``lora``, and what is merged is an adapter.
        gradient_checkpointing: Compute activations a second time in place of keeping them, which saves memory.

    Attributes:
        class_names: The classes in the order of the logits, where the task's data name them.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int | None = None,
        kind: Kind | None = None,
        modality: Literal["text", "image"] = "text",
        pooling: Literal["model", "mean", "first", "pooler"] = "model",
        lora: LoraConfig | None = None,
        optimizer: OptimizerCallable | None = None,  # a class here would give its defaults to any other (jsonargparse)
        lr_scheduler: LRSchedulerCallable | None = None,
        head_lr: float | None = None,
        dropout: float = 0.0,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
        trust_remote_code: bool = False,
        revision: str | None = None,
        quantization: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone_name = backbone
        self.modality = modality
        self.pooling = pooling
        self.lora = lora
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.head_lr = head_lr
        self.dropout = dropout
        self.load_dtype = dtype
        self.trust_remote_code = trust_remote_code
        self.revision = revision
        self.quantization = quantization
        self.gradient_checkpointing = gradient_checkpointing
        self.kind = kind
        self.class_names: list[str] | None = None
        self.model: nn.Module | None = None
        # Lightning's own mean rounds the batches' sizes where processes share them.
        self.mean_loss = MeanMetric(nan_strategy=math.nan)
        if num_classes is not None:
            self.configure_task(num_classes)

    def configure_task(self, num_classes: int) -> None:
        """Loads the pretrained backbone and gives it a new head; measures what the kind of task usually measures.

        Args:
            num_classes: Number of classes, or of other outputs.
        """
        kind = self.kind or Classification()
        self._configure(kind, num_classes, TaskMetrics(kind.metrics(num_classes)))

    def configure_for(self, data: LightningDataModule) -> None:
        """Loads the pretrained backbone and gives it a head for a task, whose data say what it is.

        Args:
            data: A `DatasetTask`; or a data module of yours, with ``num_classes``, and a ``kind`` and ``metrics()``
                where the task is not classification judged by accuracy.

        Raises:
            ValueError: If the data do not say the number of classes, or are of another kind than this module.
        """
        if not hasattr(data, "num_classes"):
            raise ValueError(f"{type(data).__name__} has no `num_classes`, which {type(self).__name__} asks for.")
        kind = getattr(data, "kind", None) or self.kind or Classification()
        if self.kind is not None and type(kind) is not type(self.kind):
            raise ValueError(
                f"The module is of the kind {type(self.kind).__name__}, its data of the kind {type(kind).__name__}."
            )
        metrics = metrics_of(data) or TaskMetrics(kind.metrics(data.num_classes))
        self.class_names = getattr(data, "class_names", None)
        self._configure(kind, data.num_classes, metrics)
        config = getattr(self._built, "config", None)
        if not kind.shares_head and isinstance(config, PretrainedConfig) and config.pad_token_id is None:
            config.pad_token_id = getattr(data, "pad_token_id", None)  # where a text ends, for the heads of decoders

    def description(self) -> dict[str, Any] | None:
        """What `from_description` builds it of again, but for its weights, in JSON's types.

        ``None`` for a class or a kind of task of a user's own, whose code others do not have.
        """
        kind = self._kind
        if type(self) is not TransformerTask or _kind_called(type(kind).__name__) is not type(kind):
            return None
        settings = {name: getattr(kind, name) for name in inspect.signature(type(kind)).parameters}
        return {
            "kind": {type(kind).__name__: settings},
            "num_classes": self.hparams["num_classes"],
            "class_names": self.class_names,
            "modality": self.modality,
            "pooling": self.pooling,
            "dtype": self.load_dtype,
            **self._description_of_base(),
        }

    def _description_of_base(self) -> dict[str, Any]:
        """What an adapter is for; nothing of a base that is part of the merged model."""
        if not quantized_layers(self):
            return {}
        base = {"backbone": public_name(self.backbone_name), "revision": self.revision}
        return {"base": {**base, "quantization": self.quantization}}

    @classmethod
    def from_description(cls, backbone: str, description: Mapping[str, Any]) -> Self:
        """Builds a module for predictions, which measures nothing.

        Args:
            backbone: Folder of the backbone, unless the description names another one, under an adapter.
            description: What `description` gave.

        Raises:
            KeyError: If it lacks something, or names no kind of task.
        """
        ((name, settings),) = description["kind"].items()
        if (kind := _kind_called(name)) is None:  # the file may come from anywhere: nothing else is called by its name
            raise KeyError(name)
        base = description.get("base", {"backbone": backbone})
        module = cls(**base, **{name: description[name] for name in ("modality", "pooling", "dtype")})
        module.class_names = description["class_names"]
        module._build(kind(**settings), description["num_classes"])
        return module.eval()

    def _configure(self, kind: Kind, num_outputs: int, metrics: TaskMetrics) -> None:
        self.val_metrics, self.test_metrics = copy.deepcopy(metrics), metrics
        self._build(kind, num_outputs)

    def _build(self, kind: Kind, num_outputs: int) -> None:
        self._require_fit(kind)
        self.hparams["num_classes"] = num_outputs
        self.kind = kind
        model = self._load(kind, num_outputs)
        self.model = model
        # transformers names it after the architecture ("bert", "vision_model", …), not always after its own prefix.
        # Found now, for under FSDP1 a process will see of each part's size only its own piece.
        sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
        self._backbone_attribute = "" if kind.shares_head else max(sizes, key=lambda name: sizes[name])
        # from_pretrained returns models in evaluation mode, and Lightning keeps the mode it finds.
        self.train()
        if self.lora is not None:
            inject_adapter_in_model(copy.deepcopy(self.lora), self.backbone)
            for name in self.head_names:
                self.get_submodule(name).requires_grad_(True)
            if isinstance(model, PooledClassifier):
                model.freeze_unused()  # adapters in there, too
        self.strict_loading = not quantized_layers(self)  # their checkpoints have scales that nothing reads back
        if self.gradient_checkpointing:
            # The other form of checkpoints needs inputs with gradients, which frozen embeddings do not give.
            self.backbone.gradient_checkpointing_enable({"use_reentrant": False})

    @override
    def configure_model(self) -> None:
        """Shards the model over the ranks, under Lightning's `ModelParallelStrategy`."""
        if self.device_mesh is not None and not is_sharded(self):
            shard_for_training(self._built, data_parallel(self.device_mesh))

    @property
    def _source(self) -> dict[str, Any]:
        """What to load, as arguments of every `from_pretrained`."""
        return {
            "pretrained_model_name_or_path": resolve_pretrained(self.backbone_name, self.revision),
            "trust_remote_code": self.trust_remote_code,  # in any case: transformers would ask on the terminal
            **({"revision": self.revision} if self.revision is not None else {}),
        }

    @property
    def _quantized(self) -> dict[str, Any]:
        """How the weights are quantized as they are loaded, as arguments of `from_pretrained`."""
        if self.quantization is None:
            return {}
        return {"quantization_config": BitsAndBytesConfig(**self.quantization)}

    def _load(self, kind: Kind, num_outputs: int) -> nn.Module:
        if self.pooling != "model":
            encoder = self._load_encoder()
            return PooledClassifier(encoder, num_outputs, self.pooling if kind.pools else None, self.dropout)
        if self.modality not in kind.auto_class:
            raise ValueError(f"{type(kind).__name__} tasks are of {', '.join(kind.auto_class)}, not {self.modality}.")
        auto_class = kind.auto_class[self.modality]
        try:
            model, found = getattr(transformers, auto_class).from_pretrained(
                **self._source,
                **self._quantized,
                **kind.model_settings(num_outputs),
                dtype=self.load_dtype,
                ignore_mismatched_sizes=not kind.shares_head,
                output_loading_info=True,
            )
        except ValueError as error:
            if not str(error).startswith("Unrecognized configuration class"):  # followed by all that transformers knows
                raise
            raise ValueError(
                f"{self.backbone_name} is no model for {type(kind).__name__} tasks: transformers has no {auto_class} "
                "of its architecture."
            ) from error
        if kind.shares_head and (missing := _listed(found["missing_keys"])):
            raise ValueError(
                f"Expected all weights of {type(model).__name__} in {self.backbone_name}, as no task has a head of its "
                f"own, but it lacks {missing}."
            )
        return cast(nn.Module, model)

    def _load_encoder(self) -> PreTrainedModel:
        config = AutoConfig.from_pretrained(**self._source)
        tower = getattr(config, "vision_config", None) if self.modality == "image" else None
        if tower is None:
            return cast(
                PreTrainedModel, AutoModel.from_pretrained(**self._source, **self._quantized, dtype=self.load_dtype)
            )
        lists_the_other_tower = logging.getLogger("transformers.modeling_utils")
        with _only_errors(lists_the_other_tower):
            encoder, found = AutoModel.from_pretrained(
                **self._source, **self._quantized, config=tower, dtype=self.load_dtype, output_loading_info=True
            )
        if missing := _listed(found["missing_keys"]):
            raise ValueError(
                f"Expected all weights of {type(encoder).__name__} in {self.backbone_name}, but it lacks {missing}."
            )
        return cast(PreTrainedModel, encoder)

    def _require_fit(self, kind: Kind) -> None:
        """Refuses settings that a kind of task has no use for."""
        problems = []
        if self.pooling != "model" and kind.shares_head:
            problems.append(
                f"pooling must be 'model', as they need more than one vector per sample, got {self.pooling!r}"
            )
        if kind.shares_head and self.head_lr is not None:
            problems.append(f"head_lr must be left out, as all of the model is merged, got {self.head_lr}")
        if kind.shares_head and self.dropout:
            problems.append(f"dropout must be left out, as it is that of a head, got {self.dropout}")
        if unknown := sorted(set(self.quantization or {}) - set(inspect.signature(BitsAndBytesConfig).parameters)):
            raise ValueError(f"quantization has no {', '.join(unknown)}: BitsAndBytesConfig has no such fields.")
        if problems:
            raise ValueError(f"For {type(kind).__name__} tasks, {'; '.join(problems)}.")

    @property
    def backbone(self) -> PreTrainedModel:
        """The part that all tasks share."""
        return cast(PreTrainedModel, uncompiled(uncompiled(self._built).get_submodule(self._backbone_attribute)))

    @property
    def head_names(self) -> tuple[str, ...]:
        """Everything of the model that is not the backbone; nothing for kinds of task that share all of it."""
        if self._kind.shares_head:
            return ()
        children = unwrapped(self._built).named_children()
        names = (name for name, child in children if any(True for _ in child.parameters()))
        return tuple(f"model.{name}" for name in names if name != self._backbone_attribute)

    @property
    def _built(self) -> nn.Module:
        if self.model is None:
            raise RuntimeError(
                "TransformerTask has no model yet: give num_classes, or call configure_task(num_classes) or "
                "configure_for(data)."
            )
        return self.model

    @property
    def score(self) -> str | None:
        """The name of the metric that the task is judged by."""
        return self._measured.score if self._measured is not None else None

    @property
    def higher_is_better(self) -> bool | None:
        """The score's direction."""
        return self._measured.score_info.higher_is_better if self._measured is not None else None

    @property
    def score_metric(self) -> Metric | None:
        """The metric behind the score."""
        return self._measured.score_metric if self._measured is not None else None

    @property
    def _measured(self) -> TaskMetrics | None:
        return getattr(self, "test_metrics", None)

    @override
    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits of the processor's outputs (``input_ids``, ``pixel_values``, …), ``(batch, classes)`` for classes."""
        return self._kind.logits(self._built, inputs)

    def classify(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits and targets of a batch, which holds the processor's outputs and ``labels``."""
        return self(**self._kind.inputs(self._built, batch)), batch[LABELS]

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss that the task is trained by."""
        return self._kind.loss(logits, target)

    @override
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        logits, target = self.classify(batch)
        loss = self.loss(logits.float(), target)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch[LABELS]))
        return loss * self._token_weight(target)

    @override
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, self.val_metrics, "val_loss")

    @override
    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, self.test_metrics)

    @override
    def on_validation_epoch_start(self) -> None:
        keep_precision(self, self.device)

    @override
    def on_test_epoch_start(self) -> None:
        keep_precision(self, self.device)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val", self.val_metrics)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_metrics("test", self.test_metrics)

    def _evaluate(
        self, batch: Mapping[str, Tensor], batch_idx: int, metrics: TaskMetrics, loss_name: str | None = None
    ) -> None:
        batch, counts = own_samples(self, batch, batch_idx)
        kind = self._kind
        measured = kind.generate(self._built, batch)
        if loss_name is not None or measured is None:
            logits, target = self.classify(batch)
            measured = measured or kind.prediction(logits.float(), target)
            if loss_name is not None:
                if counts and (count := kind.count(target)):  # a mean of nothing is no number
                    self.mean_loss.update(self.loss(logits.float(), target), count)
                self.log(loss_name, self.mean_loss)
        if counts:
            metrics.update(*measured)

    def _log_metrics(self, stage: str, metrics: TaskMetrics) -> None:
        for name, value in metrics.results().items():
            self.log(f"{stage}_{name}", value, prog_bar=stage == "val" and name == metrics.score, **EQUAL)
        metrics.reset()

    def _token_weight(self, target: Tensor) -> Tensor | float:
        """Makes the mean over processes, which averages their gradients, one over all of their tokens.

        Args:
            target: This process's labels.
        """
        if not self._kind.by_tokens or self._trainer is None or self.trainer.world_size == 1:
            return 1.0
        count = torch.tensor(float(self._kind.count(target)), device=self.device)
        mean = self.trainer.strategy.reduce(count.clone(), reduce_op="mean")
        return count / cast(Tensor, mean).clamp(min=1.0)

    @property
    def _kind(self) -> Kind:
        assert self._built is not None, "raises where there is no model"
        assert self.kind is not None, "comes with the model"
        return self.kind

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        head = {id(tensor) for tensor in head_state(self, self.head_names).values()}
        trained = [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in head]}]
        if head:
            own_lr = {"lr": self.head_lr} if self.head_lr is not None else {}
            groups.append({"params": [p for p in trained if id(p) in head], **own_lr})
        optimizer = (self.optimizer or torch.optim.AdamW)(groups)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def save_backbone(self, folder: Path) -> None:
        """Writes the backbone for ``from_pretrained``, and its processor if the pretrained model came with one.

        Args:
            folder: The folder to write to.
        """
        self.backbone.save_pretrained(folder)
        self.save_processor(folder)

    def save_processor(self, folder: Path) -> None:
        """Writes the backbone's processor, if the pretrained model came with one.

        Args:
            folder: The folder to write to.
        """
        processor = AutoTokenizer if self.modality == "text" else AutoImageProcessor
        try:
            processor.from_pretrained(**self._source).save_pretrained(folder)
        except (OSError, ValueError) as error:  # users may prepare inputs by other means: the weights come first
            rank_zero_warn(
                f"The merged model is written without a processor, as {self.backbone_name} has none: {error}"
            )

    def load_backbone(self, folder: Path) -> None:
        """Reads back what `save_backbone` wrote.

        Args:
            folder: The folder to read from.
        """
        saved = backbone_parameters(type(self.backbone).from_pretrained(folder, dtype=self.load_dtype), ())
        for name, parameter in backbone_parameters(self.backbone, ()).items():  # below adapters, where there are any
            parameter.tensor.data.copy_(saved[name].tensor)


@contextmanager
def _only_errors(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _kind_called(name: str) -> type[Kind] | None:
    """A kind of task of this package by its class's name."""
    found = getattr(kinds, name, None)
    return found if isinstance(found, type) and issubclass(found, Kind) else None


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")

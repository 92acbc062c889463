"""AHL (Zhu et al., 2024): DRA's or DevNet's heads learn to adapt to many simulated kinds of anomalies.

On the features of a trained base model: each task adapts the heads to some normals and anomalies and asks how
they do on others; a small recurrent network foretells which adapted heads will generalise, and weights them.
Differences from the official code are in docs/implementation_details.md.
"""

import logging
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import StepLR

from kka.detectors.ahl_steps import (
    Batch,
    Parameters,
    Psi,
    adapt,
    generalisation_errors,
    importance_weights,
    official_errors,
    query_gradient,
)
from kka.detectors.ahl_tasks import (
    FeatureBank,
    Task,
    bank_labels,
    check_clusters,
    cluster_normals,
    make_tasks,
)
from kka.detectors.contract import Evaluate
from kka.detectors.deviation import DevNetHeads, DRAHeads, Groups, draw_prior, find_groups
from kka.detectors.devnet import DECAY_EVERY, MAX_NORM, DevNet, DevNetSettings
from kka.detectors.dra import DRA, DRASettings, check_dra_settings
from kka.detectors.pseudo_anomalies import KINDS, PseudoAnomalies
from kka.errors import TrainingError, UserError
from kka.journal import Journal, Stateful
from kka.seeds import generator, seeded
from kka.settings import option
from kka.train_set import TrainSet

BASE_MODELS: dict[str, tuple[type[DevNet], type[DevNetSettings]]] = {
    "dra": (DRA, DRASettings),
    "devnet": (DevNet, DevNetSettings),
}
POOL_BATCH = 64
CLUSTERS = "clusters of the normals"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AHLSettings(DRASettings):
    """AHL's options beside those of its base model; preset cpu has fewer steps, on kept features."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "cpu": {
            **DRASettings.PRESETS["cpu"],
            "n_epochs": 15,
            "inner_steps": 6,
            "query_batches": 4,
            "n_remembered": 240,
        },
    }

    base_model: str = option("dra", "the model whose heads learn to adapt", tuple(BASE_MODELS))
    base_epochs: int = option(30, "its training epochs (DevNet's own default: 50)")
    n_epochs: int = option(30, "epochs of collaborative learning")
    pseudo: tuple[str, ...] = option(KINDS, f"kinds of pseudo anomalies: {', '.join(KINDS)}")
    turned: bool = option(
        True,
        "features of --views turned copies, as in the base model's training; False: of images as they are",
    )
    n_clusters: int = option(3, "clusters of normals; every ordered pair of them makes a task")
    seen_split: str = option(
        "disjoint",
        "seen anomalies of a task: one half each for support and query, or all for the query",
        ("disjoint", "overlap"),
    )
    pseudo_kinds: str = option(
        "different", "those of support and query (official code: same)", ("different", "same")
    )
    heads: str = option(
        "base",
        "what adapts: the base model's heads as trained, or new ones as in the official code",
        ("base", "new"),
    )
    inner_steps: int = option(41, "steps of adaptation to the support")
    inner_lr: float = option(2e-4, "their learning rate")
    second_order: bool = option(True, "differentiate through the first of them")
    query_batches: int = option(20, "batches of the query on which an adapted model is judged")
    ahl_lr: float = option(2e-3, "learning rate of the unified model, a tenth after every tenth epoch")
    ahl_weight_decay: float = option(1e-4, "its L2 penalty")
    memory: int = option(5, "epochs of scores from which the next ones are foretold")
    n_remembered: int = option(0, "images, a random part, whose scores are remembered; 0: all of the tasks")
    psi_lr: float = option(2e-3, "learning rate of the network that foretells them")
    psi_weight_decay: float = option(1e-3, "its L2 penalty")
    importance: str = option(
        "paper",
        "weights of the tasks: Eq. (6)-(7), those of the official code, or all equal",
        ("paper", "code", "equal"),
    )


def check_ahl_settings(settings: AHLSettings) -> None:
    """Raises UserError naming the flag of the first value out of range."""
    s = settings
    check_dra_settings(s)
    for name in ("inner_steps", "query_batches", "memory", "inner_lr", "ahl_lr", "psi_lr"):
        if not getattr(s, name) > 0:
            raise UserError(f"--{name} must be above 0, it is {getattr(s, name)}")
    if s.n_clusters < 2:
        raise UserError(f"--n_clusters must be at least 2, it is {s.n_clusters}")
    for name in ("base_epochs", "n_remembered"):
        if getattr(s, name) < 0:
            raise UserError(f"--{name} must not be negative, it is {getattr(s, name)}")


class AHL:
    """AHL on DRA or DevNet; known and generated anomalies are the seen ones, unless the flag says pseudo."""

    def __init__(self, settings: AHLSettings, seed: int = 0, device: str | torch.device = "cpu") -> None:
        check_ahl_settings(settings)
        self.settings, self.seed, self.device = settings, seed, torch.device(device)
        detector, own = BASE_MODELS[settings.base_model]
        shared = {field.name: getattr(settings, field.name) for field in fields(own)}
        shared |= {"n_epochs": settings.base_epochs}
        if own is DRASettings:
            shared |= {"pseudo": DRASettings().pseudo}
        self.base = detector(own(**shared), seed, device)
        self.made = PseudoAnomalies(settings.texture_dir, settings.image_size)
        self.warm_start = False

    @property
    def image_size(self) -> int:
        """Side of the images that the network takes."""
        return self.settings.image_size

    def fit(self, train: TrainSet, journal: Journal | None = None, evaluate: Evaluate | None = None) -> None:
        """Train the base model, keep its features, teach its heads to adapt; resumes from the journal.

        Raises UserError for too few images or unfit weights, TrainingError if a loss is not finite.
        """
        journal, s = journal or Journal(), self.settings
        groups = find_groups(train, s.generated_as == "pseudo")
        if s.n_epochs:
            check_clusters(len(groups.normals), s.n_clusters)
        if not self.warm_start:
            self.base.fit_phase("base", train, journal)
            self._renew_heads()
        if not s.n_epochs:
            return
        folder = journal.folder / "features" if journal.folder else None
        bank = None
        if CLUSTERS not in journal.facts:
            bank = self._fill_bank(train, groups, folder)
            normals = bank.arrays[0][groups.normals.numpy()]
            journal.facts[CLUSTERS] = cluster_normals(normals, s.n_clusters, self.seed)
        flags = (s.seen_split == "disjoint", s.pseudo_kinds == "different")
        tasks = make_tasks(journal.facts[CLUSTERS], groups, len(s.pseudo), *flags, self.seed)
        learning = Collaboration(s, self.base, tasks, bank_labels(groups, len(s.pseudo)), self.seed)
        for epoch in journal.epochs("train", s.n_epochs, learning.parts):
            bank = bank or self._fill_bank(train, groups, folder)
            loss, curve = learning.run_epoch(bank, epoch), {}
            if evaluate is not None and s.test_every and (epoch + 1) % s.test_every == 0:
                curve = {"test_auc": evaluate(self.score)}
            journal.record("train", epoch, loss=loss, **curve)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def score(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N,), on the CPU."""
        return self.base.score(images)

    def scorer(self) -> nn.Module:
        """(N, 3, S, S) uint8 -> (N,), as one module."""
        return self.base.scorer()

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, C) mean of the features at full size, on the CPU."""
        return self.base.embed(images)

    def state_dict(self) -> dict[str, Any]:
        """Weights of backbone and unified heads, and the references."""
        return self.base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start from these weights: the base model is not trained again."""
        self._renew_heads()
        self.base.load_state_dict(state)
        self.warm_start = True

    def _renew_heads(self) -> None:
        """Official code: new heads, whose residual is neither normalised by a batch nor absolute."""
        s, channels = self.settings, self.base.model.backbone.shapes[0][0]
        if s.heads == "base":
            return
        with seeded(self.seed, "heads"):
            heads = (
                DRAHeads(channels, s.topk, s.residual_stride, fixed_norm=True, absolute=False)
                if s.base_model == "dra"
                else DevNetHeads(channels, s.topk)
            )
            kaiming(heads)
        self.base.model.heads = heads.to(self.device)

    def _fill_bank(self, train: TrainSet, groups: Groups, folder: Path | None) -> FeatureBank:
        """Features of the training images, and of each kind of pseudo anomaly of the normals."""
        s, n, n_normals = self.settings, len(train), len(groups.normals)
        kinds, total = s.pseudo, n + len(s.pseudo) * n_normals

        def images(first: int, count: int) -> Tensor:
            rows = torch.arange(first, first + count) % total
            sources = torch.where(rows < n, rows, groups.normals[(rows - n).clamp(min=0) % n_normals])
            chosen = [kinds[(row - n) // n_normals] if row >= n else None for row in rows.tolist()]
            stream = generator(self.seed, "bank", first)
            made = self.made.of(train, sources, chosen, stream).to(self.device)
            return self.base.turn(made, stream) if s.turned else made

        self.base.model.eval()
        return FeatureBank(self.base.model, images, total, s.views if s.turned else 1, folder)


def kaiming(heads: nn.Module) -> None:
    """Weights of the official code's new heads: Kaiming normal, biases 0."""
    for layer in heads.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


class Collaboration:
    """Collaborative differentiable learning: unified heads, one adapted copy for each task, and psi."""

    def __init__(
        self, settings: AHLSettings, base: DevNet, tasks: list[Task], labels: Tensor, seed: int
    ) -> None:
        s = settings
        self.settings, self.base, self.tasks, self.labels, self.seed = s, base, tasks, labels, seed
        self.heads = base.model.heads.eval()
        rows = torch.cat([torch.cat([task.support.rows, task.query.rows]) for task in tasks])
        self.pool = rows.unique()
        if s.n_remembered:
            order = torch.randperm(len(self.pool), generator=generator(seed, "pool"))
            self.pool = self.pool[order[: s.n_remembered].sort().values]
        self.normals = torch.cat([task.support.normals for task in tasks]).unique()
        with seeded(seed, "psi"):  # on the CPU: its dropout must follow the seed on every device
            self.psi = Psi(len(tasks), len(self.pool), s.memory)
        self.optimizer = torch.optim.Adam(self.heads.parameters(), s.ahl_lr, weight_decay=s.ahl_weight_decay)
        self.scheduler = StepLR(self.optimizer, DECAY_EVERY, gamma=0.1)
        decay = s.psi_weight_decay
        self.psi_optimizer = torch.optim.Adam(self.psi.parameters(), s.psi_lr, weight_decay=decay)
        self.parts: dict[str, Stateful] = {
            "model": base.model, "optimizer": self.optimizer, "scheduler": self.scheduler,
            "psi": self.psi, "psi_optimizer": self.psi_optimizer,
        }  # fmt: skip

    def run_epoch(self, bank: FeatureBank, epoch: int) -> float:
        """One step of the unified heads (Eq. 2, 4); returns the weighted loss."""
        s = self.settings
        start: Parameters = dict(self.heads.named_parameters())
        weights = self.weights(epoch)
        total, gradients = 0.0, [torch.zeros_like(value) for value in start.values()]
        now = torch.zeros(len(self.pool), len(self.tasks))
        for i, task in enumerate(self.tasks):
            stream = generator(self.seed, "episode", epoch, i)
            support = self._batches(bank, task.support.batches(s.batch_size, s.inner_steps, stream), stream)
            adapted = adapt(self.heads, start, support, s.inner_lr, s.second_order)
            query = self._batches(bank, task.query.batches(s.batch_size, s.query_batches, stream), stream)
            loss, parts = query_gradient(self.heads, start, adapted, query, s.query_batches)
            torch._foreach_add_(gradients, parts, alpha=weights[i])
            total += weights[i] * loss
            now[:, i] = self._score_pool(bank, adapted)
        if not math.isfinite(total):
            raise TrainingError(f"the loss became {total} in epoch {epoch}; lower --inner_lr or --ahl_lr")
        self._step(list(start.values()), gradients)
        self._teach_psi(now, epoch)
        return total

    def weights(self, epoch: int) -> list[float]:
        """Of the tasks' losses; equal until psi has seen enough epochs to have learnt from one."""
        s, n = self.settings, len(self.tasks)
        if s.importance == "equal" or epoch <= s.memory:
            return [1 / n] * n
        self.psi.eval()
        with torch.no_grad():
            scores, labels = self.psi(self.psi.history), self.labels[self.pool]
        if s.importance == "paper":
            supports = [torch.isin(self.pool, task.support.rows) for task in self.tasks]
            errors = generalisation_errors(scores, (labels > 0).float(), supports)
            return importance_weights(errors).tolist()
        queries = [torch.isin(self.pool, task.query.rows) for task in self.tasks]
        errors = official_errors([scores[rows] for rows in queries], [labels[rows] for rows in queries])
        return (0.5 + 0.5 * importance_weights(errors)).tolist()

    def _batches(self, bank: FeatureBank, rows: Iterable[Tensor], stream: Generator) -> Iterable[Batch]:
        """Batches with new references and new draws of the prior each; read one by one."""
        device = self.base.device
        for part in rows:
            chosen = torch.randint(len(self.normals), (self.settings.n_references,), generator=stream)
            references = [maps.mean(0) for maps in bank.take(self.normals[chosen], device, stream)]
            draws = draw_prior(stream, self.heads.n_draws).to(device)
            yield Batch(bank.take(part, device, stream), references, self.labels[part].to(device), draws)

    @torch.no_grad()
    def _score_pool(self, bank: FeatureBank, parameters: Parameters) -> Tensor:
        """Scores of the remembered images by adapted heads, (N,) on the CPU."""
        parts = []
        for rows in self.pool.split(POOL_BATCH):
            inputs = (bank.take(rows, self.base.device), self.base.model.references)
            parts.append(self.heads.combine(functional_call(self.heads, parameters, inputs)))
        return torch.cat(parts).cpu()

    def _step(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        self.optimizer.step()
        self.scheduler.step()

    def _teach_psi(self, now: Tensor, epoch: int) -> None:
        """Let psi foretell the scores of this epoch from the last ones, then remember them."""
        if epoch >= self.settings.memory:
            self.psi.train()
            stream = generator(self.seed, "psi", epoch)
            with seeded(self.seed, "dropout", epoch):
                for rows in torch.randperm(len(now), generator=stream).split(POOL_BATCH):
                    loss = torch.nn.functional.mse_loss(self.psi(self.psi.history[rows]), now[rows])
                    self.psi_optimizer.zero_grad()
                    loss.backward()
                    self.psi_optimizer.step()
        self.psi.history.copy_(torch.cat([self.psi.history[:, 1:], now[:, None]], 1))

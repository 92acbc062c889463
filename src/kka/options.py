"""Options of an experiment that do not belong to the detector."""

from dataclasses import dataclass

from kka.errors import UserError
from kka.settings import option
from kka.tracking import HELP as REPORT_TO
from kka.tracking import check_report_to

DETECTOR, FROZEN = "detector", "frozen"
EVALUATOR = "evaluator"
WHO_JUDGES = "who judges in Eq. (6): --detector itself, or frozen features, which take seconds"


@dataclass(frozen=True)
class ExperimentSettings:
    """Data, labels, split and run folder; names are the official code's where it has them."""

    dataset_name: str = option("flower", "flower, cifar100 (mycifar), ucm_caption, garden, folder or mvtec")
    data_path: str | None = option(None, "folder of the data set; None: data/<name>, made if it can be")
    xp_path: str | None = option(None, "run folder; None: log/<data set>/<name>")
    name: str | None = option(None, "name of the run folder in log/<data set>; None: made from the settings")
    overwrite: bool = option(False, "begin anew: remove the run that the folder holds, finished or not")
    load_config: str | None = option(None, "config.json whose settings are taken where no flag is given")
    load_model: str | None = option(None, "run folder, model.safetensors or model.tar to start from")
    seed: int = option(0, "seed of every random draw; -1: a random one, recorded")
    runs: int = option(1, "number of runs with seeds from --seed on, reported as mean and 95 % interval")
    vmap_seeds: int = option(
        1,
        "seeds of --runs, or classes of --each_class, that are trained together as one model; without both "
        "that many seeds (Deep SAD)",
    )
    each_class: bool = option(
        False,
        "an experiment for each of --normal_class (none: each class of the data set), not one with all",
    )
    device: str = option("cuda", "cpu, cuda or cuda:N; without a GPU the CPU is taken")
    strict_device: bool = option(False, "stop if the device is not there")
    num_threads: int = option(0, "threads of PyTorch; 0: its default")
    n_jobs_dataloader: int = option(0, "threads that decode images; 0: one per core")
    user_dict: str | None = option(
        None, 'JSON, or a file with it: {"0": [training folders], "1": [test folders]}'
    )
    iterate: bool = option(
        False, "test on test normals and generated anomalies (the official iterating mode)"
    )
    normal_class: tuple[int | str, ...] = option(
        (), "folders taken as normal, by number, for mvtec by name; none: the data set's own"
    )
    normal_superclass: str | None = option(None, "superclass of CIFAR-100 taken as normal, e.g. furniture")
    anomaly_path: str | None = option(
        None, "folder of the generated anomalies; None: <data_path>/0", alias="kka_anomalies"
    )
    n_anomalies: int = option(-1, "size of a random part of them; -1 all, 0 none")
    n_anomaly: int = option(
        0, "real anomalies of the test set that are known: they are trained on as labelled, and not tested"
    )
    know_class: str | None = option(
        None, "the kind they all come from, which is then not tested at all (hard setting); None: all kinds"
    )
    known_outlier_class: int = option(1, "label of known anomalies; only 1, the anomaly folder, exists")
    n_known_outlier_classes: int = option(1, "number of known anomaly classes; only 1 exists", None)
    ratio_known_normal: float | None = option(None, "share of labelled normals (official code: 0)")
    ratio_known_outlier: float | None = option(
        None, "share of labelled anomalies; None: all (official: 0.01)"
    )
    ratio_pollution: float | None = option(None, "share of anomalies treated as normal (official code: 0.1)")
    split: str = option(
        "own",
        "who judges the generated anomalies: the detector, or two that did not train on them",
        ("own", "crossfit"),
    )
    evaluator: str = option(DETECTOR, f"{WHO_JUDGES} and have a run folder within", (DETECTOR, FROZEN))
    threshold_from: str = option(
        "train", "normals whose farthest decides Eq. (6)", ("train", "heldout", "test")
    )
    threshold_quantile: float = option(1.0, "quantile of their scores; 1 is the maximum")
    hard_margin: float = option(0.0, "added to the threshold (official drange)")
    hard_inclusive: bool = option(False, "count a score equal to the threshold as hard (official code)")
    easy_top_k: int | None = option(
        None, "take the K highest scores as easy (official: 100); None: all not hard"
    )
    match_generated: bool = option(
        True, "first bring generated images to the size and JPEG quality of the normals (official code: not)"
    )
    bgr: bool = option(False, "swap red and blue, as the official code")
    skip_bad_images: bool = option(False, "leave unreadable images out and count them, instead of stopping")
    checkpoint_every: float = option(10.0, "seconds between two checkpoints")
    report_to: tuple[str, ...] = option((), REPORT_TO)


# Settings that change where or how fast a run is made, or that its identity holds by content.
PLACE = frozenset({
    "data_path", "xp_path", "name", "overwrite", "load_config", "load_model", "runs", "vmap_seeds",
    "each_class", "device", "strict_device", "num_threads", "n_jobs_dataloader", "anomaly_path", "user_dict",
    "checkpoint_every", "report_to",
})  # fmt: skip


def check_options(settings: ExperimentSettings) -> None:
    """Raises UserError naming the flag of the first value that makes no sense."""
    check_report_to(settings.report_to)
    if settings.runs < 1:
        raise UserError(f"--runs must be at least 1, it is {settings.runs}")
    if settings.vmap_seeds < 1:
        raise UserError(f"--vmap_seeds must be at least 1, it is {settings.vmap_seeds}")
    if settings.seed < -1:
        raise UserError(f"--seed must be -1 (random) or at least 0, it is {settings.seed}")
    if (settings.known_outlier_class, settings.n_known_outlier_classes) != (1, 1):
        raise UserError(
            "--known_outlier_class and --n_known_outlier_classes can only be 1: the known anomalies are the "
            "generated ones; choose them with --anomaly_path and --n_anomalies"
        )
    for name in ("num_threads", "n_jobs_dataloader", "checkpoint_every"):
        if getattr(settings, name) < 0:
            raise UserError(f"--{name} must not be negative, it is {getattr(settings, name)}")
    if settings.n_anomalies < -1:
        raise UserError(f"--n_anomalies must be -1 (all), 0 (none) or a number, it is {settings.n_anomalies}")
    if settings.n_anomaly < 0:
        raise UserError(f"--n_anomaly must not be negative, it is {settings.n_anomaly}")
    if settings.know_class is not None and settings.n_anomaly == 0:
        raise UserError("--know_class needs --n_anomaly, the number of known anomalies")
    if not 0 < settings.threshold_quantile <= 1:
        raise UserError(f"--threshold_quantile must lie in (0, 1], it is {settings.threshold_quantile}")
    if settings.easy_top_k is not None and settings.easy_top_k < 1:
        raise UserError(f"--easy_top_k must be at least 1, it is {settings.easy_top_k}")
    for name in ("name", "xp_path", "data_path", "anomaly_path", "load_model", "user_dict"):
        if getattr(settings, name) == "":
            raise UserError(f"--{name} is empty; leave it out for the default")
    check_name(settings.name)


def check_name(name: str | None) -> None:
    """Raises UserError for a --name that is not the name of one folder."""
    if name is not None and ("/" in name or name in ("", ".", "..")):
        raise UserError(f"--name {name!r} must be one folder name; use --xp_path for a path")

"""What happened inside of loops that src/reproduce.py made: hard shares, margins, captions, pictures.

    python src/reproduce.py table3 --data_sets garden --modes add rep
    python benchmarks/loops.py log/table3/garden/loop_add_* log/table3/garden/loop_rep_* --reader DIR

Each folder holds the loops of one mode, one for each seed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deep_sad import table

from kka.anomalies import read_items
from kka.attributes import agreement, load_reader, to_tensor
from kka.datasets import garden
from kka.datasets.images import read_image
from kka.draw import read_captions
from kka.errors import UserError, run_script
from kka.files import read_json, write_bytes, write_json
from kka.metrics import mean_interval
from kka.runs import CONFIG, RESULTS
from kka.settings import build_parser, make_settings, option
from kka.tiny_glm import is_garden_caption

LOOKS = (("usable", 100), ("in_grammar", 100), ("shared", 1))


@dataclass(frozen=True)
class StudySettings:
    """Options of the study."""

    reader: str | None = option(
        None, "folder of the reader of attributes that looks at the garden's pictures"
    )
    out: str = option(str(Path(__file__).parent / "results" / "loop_garden"), "table without suffix")


def main() -> None:
    parser = build_parser("What happened inside of loops.", StudySettings)
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="the loops of one mode, all seeds")
    values = vars(parser.parse_args())
    s = make_settings(StudySettings, values)
    found = [
        path.parent for folder in values["folders"] for path in sorted(Path(folder).glob(f"*/{RESULTS}"))
    ]
    if not found:
        raise UserError(f"{', '.join(values['folders'])}: no finished loop, no */{RESULTS}, in there")
    loops = [read_loop(folder, s.reader) for folder in found]
    modes = list(dict.fromkeys(loop["mode"] for loop in loops))
    config = read_json(found[0] / CONFIG)
    report = {"settings": published(config), "git_commit": config["git_commit"], "loops": loops}
    write_json(Path(f"{s.out}.json"), report, indent=1)
    write_bytes(Path(f"{s.out}.md"), to_markdown(report, modes).encode())
    print(to_markdown(report, modes))


def published(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a loop without seed and mode, and of folders only their names."""
    kept = {key: value for key, value in config["settings"].items() if key not in ("seed", "mode", "xp_path")}
    return {k: Path(v).name if isinstance(v, str) and Path(v).is_absolute() else v for k, v in kept.items()}


def read_loop(folder: Path, reader: str | None) -> dict[str, Any]:
    """Results of a finished loop, and what its captions and pictures are like."""
    settings = read_json(folder / CONFIG)["settings"]
    if "mode" not in settings:
        raise UserError(f"{folder} is no loop; give the folder in which the loops of a mode are")
    loop = {"mode": settings["mode"], "seed": settings["seed"], **read_json(folder / RESULTS)}
    for row in loop["rounds"]:
        row |= look_at(folder / f"round_{row['round']}", reader)
    untuned = folder / "untuned"  # a loop of no round has none, nor one whose LLM had no more captions
    loop["untuned"] = look_at(untuned, reader) if (untuned / "fresh").exists() else {}
    return loop


def look_at(place: Path, reader: str | None) -> dict[str, Any]:
    """What became of an LLM's answers; in the garden also what they say and whether the pictures show it."""
    described = read_json(place / "described.json")
    captions = [str(record["caption"]) for record in read_captions(place / "captions.jsonl")]
    found: dict[str, Any] = {"answers": described["captions"] + sum(described["rejected"].values())}
    found["usable"] = described["captions"] / found["answers"]
    parsed = [garden.parse_caption(caption) for caption in captions if is_garden_caption(caption)]
    if not parsed:
        return found
    normal = asdict(garden.SPECIES[garden.NORMAL])
    found["in_grammar"] = len(parsed) / len(captions)
    found["shared"] = mean([sum(flower.get(k) == v for k, v in normal.items()) for flower in parsed])
    if reader is not None:
        folder = place / ("fresh" if (place / "fresh").exists() else "0")
        items = read_items(folder)
        pictures = to_tensor([read_image(folder / item.file) for item in items])
        found["follow"] = agreement(load_reader(Path(reader)), pictures, [item.caption for item in items])
    return found


def to_markdown(report: dict[str, Any], modes: Sequence[str]) -> str:
    """A table for each mode: means over seeds and half widths of their 95 % t-intervals."""
    parts = [f"commit {report['git_commit']}"]
    for mode in modes:
        loops = [loop for loop in report["loops"] if loop["mode"] == mode]
        rows = [["none", "", "", "", "", "", mean_of([mean(loop["none"]) for loop in loops])]]
        for k in range(min(len(loop["rounds"]) for loop in loops)):
            rows.append([f"KKA({k})", *round_cells([loop["rounds"][k] for loop in loops], loops)])
        header = "|set|hard, %|hard, untuned LLM, %|loops with more hard ones|DPO margin|test AUC, %"
        parts.append(f"\nmode {mode}, {len(loops)} seeds\n" + table(header, rows))
    parts.append("\nfresh captions and pictures, mean of the modes, by seed\n" + looks(report["loops"]))
    return "\n".join(parts)


def looks(loops: Sequence[dict[str, Any]]) -> str:
    """A table of what the LLM answered, and in the garden of what it says and the pictures show."""
    seeds = dict.fromkeys(loop["seed"] for loop in loops)
    groups = [[loop for loop in loops if loop["seed"] == seed] for seed in seeds]
    rows = [["untuned", *look_cells([[loop["untuned"] for loop in group] for group in groups])]]
    for k in range(min(len(loop["rounds"]) for loop in loops)):
        rows.append([f"round {k}", *look_cells([[loop["rounds"][k] for loop in group] for group in groups])])
    titles = ["", "usable, %", "in the grammar, %", "attributes shared with the normal"]
    titles += [f"{name} follows, %" for name in garden.ATTRIBUTES]
    known = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    return table("|".join(titles[i] for i in known), [[row[i] for i in known] for row in rows])


def look_cells(found: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """Means over seeds, for each of which there are its loops; empty where nothing is known."""
    cells = [mean_of(seed_means(found, key), scale) for key, scale in LOOKS]
    follow = [[each["follow"] for each in group if "follow" in each] for group in found]
    return cells + [mean_of(seed_means(follow, name)) for name in garden.ATTRIBUTES]


def seed_means(found: Sequence[Sequence[dict[str, Any]]], key: str) -> list[float]:
    """One value for each seed: its modes share what they do not change, and are no repetitions."""
    known = [[each[key] for each in group if key in each] for group in found]
    return [mean(values) for values in known if values]


def round_cells(rounds: list[dict[str, Any]], loops: list[dict[str, Any]]) -> list[str]:
    """One round of all loops of a mode."""
    compared = [row for row in rounds if row["hard_untuned"] is not None]
    margins = [row["margin"] for row in rounds if row["margin"] is not None]
    more = sum(row["hard"] > row["hard_untuned"] for row in compared)
    return [
        f"{sum(row['size'] for row in rounds) / len(rounds):.0f}",
        mean_of([row["hard"] for row in rounds]),
        mean_of([row["hard_untuned"] for row in compared]),
        f"{more} of {len(compared)}" if compared else "",
        mean_of(margins, 1) + (f" (n = {len(margins)})" if 0 < len(margins) < len(rounds) else ""),
        mean_of([mean(row["test_aucs"]) for row in rounds]),
    ]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def mean_of(values: Sequence[float], scale: float = 100) -> str:
    """Mean and half width of the 95 % interval; nothing for no values."""
    if not values:
        return ""
    middle, half = mean_interval(values)
    return f"{scale * middle:.2f}" + ("" if half is None else f" ± {scale * half:.2f}")


if __name__ == "__main__":
    run_script(main)

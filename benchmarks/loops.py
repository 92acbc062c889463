"""Does the loop help? Algorithm 1 over seeds and modes, one table.

    python benchmarks/loops.py                                           # the garden, as `make demo` does it
    python benchmarks/loops.py --out FILE -- --drawer_backend garden     # the same but for these flags
    python benchmarks/loops.py --base none --out FILE -- --dataset_name ucm_caption ...

Loops that are finished are not run again, and an interrupted one continues. What does not depend on the mode
(the round without anomalies, round 0, the tuned LLM of round 1 and its images) is done once for each seed.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deep_sad import processor, table

from kka.anomalies import read_items
from kka.attributes import agreement, load_reader, to_tensor
from kka.datasets import garden
from kka.datasets.images import read_image
from kka.draw import read_captions
from kka.errors import UserError, run_script
from kka.files import read_json, write_bytes, write_json
from kka.loop_folder import share_common
from kka.metrics import mean_interval
from kka.runs import RESULTS, ROOT, git_commit
from kka.settings import build_parser, make_settings, option
from kka.tiny_glm import is_garden_caption

sys.path.insert(0, str(ROOT / "src"))
from demo import FLAGS

LOOKS = (("usable", 100), ("in_grammar", 100), ("shared", 1))

log = logging.getLogger("loops")


@dataclass(frozen=True)
class StudySettings:
    """Options of the study."""

    seeds: int = option(5, "loops of each mode")
    base: str = option("demo", "flags of src/iterate.py to which those behind -- are added", ("demo", "none"))
    modes: tuple[str, ...] = option(("add", "rep"), "how the set is updated")
    folder: str = option(str(ROOT / "log" / "study"), "folder of the loops")
    reader: str | None = option(
        None, "folder of the reader of attributes that looks at the garden's pictures"
    )
    out: str = option(str(Path(__file__).parent / "results" / "loop_garden"), "table without suffix")


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    words, flags = divide(sys.argv[1:])
    s = make_settings(StudySettings, vars(build_parser("Loops, compared.", StudySettings).parse_args(words)))
    if s.base == "demo":
        flags = [*(str(word) for name, value in FLAGS.items() for word in (f"--{name}", value)), *flags]
    shown = [Path(word).name if os.sep in word else word for word in flags]  # published: no one's folders
    report: dict[str, Any] = {"flags": shown, "git_commit": git_commit(), "processor": processor()}
    report["threads"] = torch.get_num_threads()
    report["loops"] = [run(flags, mode, seed, s) for seed in range(s.seeds) for mode in s.modes]
    write_json(Path(f"{s.out}.json"), report, indent=1)
    write_bytes(Path(f"{s.out}.md"), to_markdown(report, s.modes).encode())
    print(to_markdown(report, s.modes))


def divide(words: list[str]) -> tuple[list[str], list[str]]:
    """Our flags, and behind -- those of src/iterate.py."""
    where = words.index("--") if "--" in words else len(words)
    return words[:where], words[where + 1 :]


def run(flags: list[str], mode: str, seed: int, s: StudySettings) -> dict[str, Any]:
    """One loop; returns its results."""
    folder = Path(s.folder) / f"{mode}_{seed}"
    if not (folder / RESULTS).exists():
        for other in s.modes[: s.modes.index(mode)]:
            share_common(Path(s.folder) / f"{other}_{seed}", folder, mode)
        last = ["--mode", mode, "--seed", str(seed), "--xp_path", str(folder)]
        command = [sys.executable, str(ROOT / "src" / "iterate.py"), *flags, *last]
        log.info("%s, seed %d", mode, seed)
        if subprocess.run(command).returncode:
            raise UserError(f"the loop in {folder} failed; see above, and start this command again")
    loop = {"mode": mode, "seed": seed, **read_json(folder / RESULTS)}
    for row in loop["rounds"]:
        row |= look_at(folder / f"round_{row['round']}", s.reader)
    loop["untuned"] = look_at(folder / "untuned", s.reader)
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
    parts = [f"{report['processor']}, {report['threads']} threads, commit {report['git_commit']}"]
    for mode in modes:
        loops = [loop for loop in report["loops"] if loop["mode"] == mode]
        rows = [["none", "", "", "", "", "", mean_of([mean(loop["none"]) for loop in loops])]]
        for k in range(min(len(loop["rounds"]) for loop in loops)):
            rows.append([f"KKA({k})", *round_cells([loop["rounds"][k] for loop in loops], loops)])
        header = "|set|hard, %|hard, untuned LLM, %|loops with more hard ones|DPO margin|test AUC, %"
        parts.append(f"\nmode {mode}, {len(loops)} seeds\n" + table(header, rows))
    parts.append("\nfresh captions and pictures, all modes\n" + looks(report["loops"]))
    return "\n".join(parts)


def looks(loops: Sequence[dict[str, Any]]) -> str:
    """A table of what the LLM answered, and in the garden of what it says and the pictures show."""
    rows = [["untuned", *look_cells([loop["untuned"] for loop in loops])]]
    for k in range(min(len(loop["rounds"]) for loop in loops)):
        rows.append([f"round {k}", *look_cells([loop["rounds"][k] for loop in loops])])
    titles = ["", "usable, %", "in the grammar, %", "attributes shared with the normal"]
    titles += [f"{name} follows, %" for name in garden.ATTRIBUTES]
    known = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    return table("|".join(titles[i] for i in known), [[row[i] for i in known] for row in rows])


def look_cells(found: Sequence[dict[str, Any]]) -> list[str]:
    """Means over loops, empty where nothing is known."""
    cells = [mean_of([each[key] for each in found if key in each], scale) for key, scale in LOOKS]
    follow = [each["follow"] for each in found if "follow" in each]
    return cells + [mean_of([each[name] for each in follow]) for name in garden.ATTRIBUTES]


def round_cells(rounds: list[dict[str, Any]], loops: list[dict[str, Any]]) -> list[str]:
    """One round of all loops of a mode."""
    later = rounds[0]["hard_untuned"] is not None
    margins = [row["margin"] for row in rounds if row["margin"] is not None]
    more = sum(row["hard"] > row["hard_untuned"] for row in rounds) if later else 0
    return [
        f"{sum(row['size'] for row in rounds) / len(rounds):.0f}",
        mean_of([row["hard"] for row in rounds]),
        mean_of([row["hard_untuned"] for row in rounds]) if later else "",
        f"{more} of {len(rounds)}" if later else "",
        mean_of(margins, 1),
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

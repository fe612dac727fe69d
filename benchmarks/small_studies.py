"""An hour's study of `hydra_lv_small` on half of each volume, and what an average of it gains.

Run it alone: `.venv/bin/python benchmarks/small_studies.py [--minutes 60] [--piece-s 300] [--out
FOLDER] [--data FOLDER]`. One half of a volume is trained, the other scored. The same command goes
on where the last one ended, so it may be run in pieces: each call runs `--piece-s` seconds of
studies. Those of three phantoms stand beside those of the two real volumes, which are not part of
the repository.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _targets import verdict

from hydralv_tune.data.volumes import write_array
from hydralv_tune.numerics.phantom.volume import make_phantom
from hydralv_tune.results.ensemble import find_ensemble, kept_facts
from hydralv_tune.study.study import open_if_exists

REAL = {
    "hydra-11-5": ("im_sparse.h5", "label.h5", "im_sparse_valid.h5", 2),
    "vnc-mito": ("im.h5", "label.h5", None, 1),
}
"""Image, labels, mask, and the axis that is cut: the one whose halves hold most alike."""
PHANTOMS = {f"phantom-{seed}": seed for seed in (11, 12, 13)}
PHANTOM_SHAPE, PHANTOM_INSTANCES = (24, 128, 256), 24
MARGIN = 8
TARGETS = {"hydra-11-5": (0.12, 0.78), "vnc-mito": (0.10, 0.75)}
"""After an hour, on the half that was held out: the error at most, and the F1 at least."""


def main() -> None:
    """Run what is left of the studies for a while, and print how each stands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--piece-s", type=float, default=300.0)
    parser.add_argument("--volumes", nargs="*", default=[*REAL, *PHANTOMS])
    parser.add_argument("--out", type=Path, default=Path("runs/small_studies"))
    default = Path(__file__).parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default)
    chosen = parser.parse_args()
    left = chosen.piece_s
    for name in chosen.volumes:
        words, axis = files_of(name, chosen.data, chosen.out)
        if words is None:
            print(f"{name}: not in {chosen.data}, so it is not measured.")
            continue
        folder = chosen.out / name
        more = min(chosen.minutes * 60 - spent_s(folder), left)
        if more >= 1:
            started = time.monotonic()
            run(words, axis, folder, more)
            seconds = time.monotonic() - started
            (folder / "spent_s").write_text(str(spent_s(folder) + seconds))
            left -= seconds
        show(name, folder, chosen.minutes * 60)


def files_of(name: str, data: Path, out: Path) -> tuple[list[str] | None, int]:
    """Return the options that name a volume, and the axis that is cut."""
    if name in REAL:
        image, label, mask, axis = REAL[name]
        folder = data / name
        if not folder.is_dir():
            return None, axis
        words = ["--image", str(folder / image), "--label", str(folder / label)]
        return [*words, *(["--mask", str(folder / mask)] if mask else [])], axis
    folder = out / "volumes" / name
    if not (folder / "mask.h5").exists():
        made = make_phantom(PHANTOM_SHAPE, instances=PHANTOM_INSTANCES, seed=PHANTOMS[name])
        for kind, array in (("im", made.image), ("label", made.label), ("mask", made.mask)):
            write_array(folder / f"{kind}.h5", array, voxel_size_nm=made.voxel_size_nm)
    named = (("--image", "im"), ("--label", "label"), ("--mask", "mask"))
    return [word for option, kind in named for word in (option, str(folder / f"{kind}.h5"))], 2


def spent_s(folder: Path) -> float:
    """Return the seconds that the calls before have spent on a study."""
    try:
        return float((folder / "spent_s").read_text())
    except OSError:
        return 0.0


def run(words: list[str], axis: int, folder: Path, seconds: float) -> None:
    """Start or continue a study for some seconds; what is under way then goes on in the next."""
    split = f"{{kind: holdout, axis: {axis}, fraction: 0.5, margin: {MARGIN}}}"
    command = [
        sys.executable, "-m", "hydralv_tune", "run", "hydra_lv_small", *words,
        "--study", folder.name,
        "--out", str(folder), "--trials", "1000", "--timeout-s", f"{seconds:.0f}",
        "--set", f"data.split={split}", "--json",
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "run.out").open("ab") as log:
        subprocess.run(command, stdout=log, stderr=log, check=False)


def show(name: str, folder: Path, whole_s: float) -> None:
    """Print the best trial, the best value over time, and the ensemble once the hour is up."""
    study = open_if_exists(f"sqlite:///{folder / 'study.db'}", name)
    if study is None:
        print(f"{name}: nothing is trained yet.")
        return
    try:
        facts, trials = study.facts(), study.trials()
    finally:
        study.close()
    best = facts["best"]
    print(f"{name}: {spent_s(folder):.0f} of {whole_s:.0f} s; {counts(facts)}")
    if best is None:
        return
    error, f1 = TARGETS.get(name, (None, None))
    print(f"  best trial {best['number']}")
    print(f"    error {best['adapted_rand_error']:.4f}"
          f"{verdict(best['adapted_rand_error'], at_most=error)}")  # fmt: skip
    print(f"    F1 {best['f1_iou50']:.4f}{verdict(best['f1_iou50'], at_least=f1)}")
    done = sorted(
        (view for view in trials if view.state == "COMPLETE" and view.finished is not None),
        key=lambda view: view.finished,
    )
    first = min(view.started for view in done if view.started is not None)
    value = float("inf")
    for view in done:
        if view.value is not None and view.value < value:
            value = view.value
            minutes = (view.finished - first).total_seconds() / 60
            print(f"  after {minutes:6.1f} min: {value:.4f} (trial {view.number})")
    if spent_s(folder) >= whole_s - 1 and len(done) > 1:
        kept = kept_facts(folder) or find_ensemble(f"sqlite:///{folder / 'study.db'}", name)
        print(f"  {kept['sentence']}")
        print("  " + json.dumps({key: kept[key] for key in ("single", "gain_interval", "seconds")}))


def counts(facts: dict[str, Any]) -> str:
    """Return how many trials there are of each state."""
    return ", ".join(f"{number} {state}" for state, number in facts["trials"].items() if number)


if __name__ == "__main__":
    main()

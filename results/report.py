"""What finished runs of rank1_ewc.py say together: the paper's Table 1, Figures 4 and 5, and comparisons.

    python -m results.report RUNS                                          # every finished run below a folder
    python -m results.report RUN RUN .. --over lam --to results/lambda     # these runs, over a setting

The first writes table1.md, table1.csv, paired.csv, figure4.png and figure5-<dataset>.png into RUNS; the second
results/lambda.json and results/lambda.png. Both read the result.json of each run and train nothing. A row of a
table is a method, named with the flags that set it apart ("gd --ema 0.99"); its runs differ in the seed alone.
"""

import argparse
import csv
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import LogLocator, MaxNLocator
from scipy.stats import t as student_t

import rank1_ewc as r

ROWS = ("joint", "diag-only", "rank1-only", "gd", "diag", "rank1")  # of the paper's Table 1
PUBLISHED = {  # AFID / forgetting there, in the order of ROWS
    "mnist": ("2.6 / -", "62.2 / 51.1", "65.2 / 58.3", "10.1 / 2.3", "14.3 / 5.2", "7.6 / 0.6"),
    "fashion": ("5.7 / -", "99.9 / 81.7 *", "96.9 / 82.1 *", "19.1 / 3.9", "27.7 / 9.1", "15.4 / 0.9"),
    "cifar10": ("23.3 / -", "128.6 / 74.4 *", "120.0 / 77.4 *", "61.2 / 16.6", "72.6 / 17.9", "50.5 / 7.4"),
    "imagenet32": ("11.7 / -", "86.1 / 34.2", "74.3 / 41.3", "69.0 / 46.2", "73.8 / 25.8", "48.5 / 15.2"),
}
PUBLISHED_AFID = {  # after tasks 1 to 5, and its standard errors over three seeds: the paper's Figure 4
    "mnist": {
        "gd": ((8.3, 9.1, 9.7, 8.7, 10.1), (0.1, 0.8, 0.6, 0.5, 0.9)),
        "diag": ((8.3, 10.9, 13.6, 13.0, 14.3), (0.1, 1.8, 1.6, 1.8, 1.3)),
        "rank1": ((8.3, 8.8, 8.0, 8.6, 7.6), (0.1, 0.5, 0.5, 0.1, 0.1)),
    },
    "fashion": {
        "gd": ((16.7, 16.7, 18.2, 19.2, 19.1), (3.3, 1.5, 1.5, 0.8, 0.9)),
        "diag": ((16.7, 17.0, 18.8, 25.3, 27.7), (3.3, 1.7, 1.1, 1.9, 2.2)),
        "rank1": ((16.7, 15.4, 15.3, 15.3, 15.4), (3.3, 2.1, 1.5, 0.9, 0.6)),
    },
    "cifar10": {
        "gd": ((37.6, 50.1, 54.7, 59.3, 61.2), (1.0, 4.4, 0.9, 4.2, 3.2)),
        "diag": ((37.6, 52.9, 64.1, 72.8, 72.6), (1.0, 1.3, 2.5, 6.4, 3.2)),
        "rank1": ((37.6, 48.4, 51.5, 53.0, 50.5), (1.0, 1.0, 1.3, 0.4, 1.2)),
    },
}
MEASURES = ("AFID", "forgetting", "FID of a task just learned")
DEFAULTS = {name: row[0] for name, row in r.SETTINGS.items() if name not in r.FREE_SETTINGS}
PENALTY_SETTINGS = {"lam", "curvature", "form", "fisher_samples", "fisher_timesteps"}  # gd has none of these
TAB20 = matplotlib.colormaps["tab20"].colors
COLORS = TAB20[::2] + TAB20[1::2]  # ten strong ones, then their pale sisters

# ----------------------------------------------------------------------------------------------------------
# Runs: each is what its result.json holds, and with it "folder", "settings", "measures" and "curvature".


def read_run(folder: Path) -> dict:
    """The finished run in a folder. Stops if there is none, or if its result.json is damaged or lacks parts."""
    path = folder / "result.json"
    if not path.is_file():
        r.stop(f"{folder} holds no finished run (result.json): train it first, or leave it out")
    run = r.read_result(path)
    try:
        if run["dataset"] not in r.DATASETS or run["method"] not in r.METHODS:
            raise ValueError(f"{run['dataset']} or {run['method']} is not known")
        joint, tasks, fid = r.METHODS[run["method"]].joint, len(run["fid_real"]), np.array(run["fid"], float)
        learned = None if joint else float(np.diag(fid).mean())
        run["measures"] = dict(zip(MEASURES, (run["afid"][-1], run["forgetting"], learned)))
        run["curvature"] = [run["lam"] * fisher["energy"] for fisher in run["fisher"] if "energy" in fisher]
        numbers = [*run["afid"], *run["measures"].values(), *run["curvature"], run.get("fid_pooled")]
        if not np.isfinite([v for v in numbers if v is not None]).all() or type(run["seed"]) is not int:
            raise ValueError("a number is not one")
        if fid.shape != (1 if joint else tasks, tasks) or len(fid) != len(run["afid"]):
            raise ValueError("rows or columns of the FID matrix are missing")
        return run | {"folder": folder, "settings": settings_of(run)}
    except r.DAMAGED as error:
        r.stop(f"{path} is damaged or lacks parts ({type(error).__name__}: {error}): leave it out")


def settings_of(run: dict) -> dict:
    """The settings that a run's numbers depend on; those that its method makes no use of are left out.

    A setting that result.json does not name has the paper's value. A list becomes text: [16, 32] -> "16,32".
    """
    method, config = r.METHODS[run["method"]], {k: v for k, v in run["config"].items() if v is not None}
    unused = set(r.FREE_SETTINGS) | (set() if method.penalty else PENALTY_SETTINGS)
    unused |= set() if method.replay else {"replay_per_class"}
    unused |= {"lam"} if "curvature" in config else set()  # lambda then followed from the first Fisher
    if "fisher_from" in config:  # another name of the first of the timesteps
        config["fisher_timesteps"] = [config.pop("fisher_from"), r.NUM_STEPS]
    settings = DEFAULTS | config | {name: run[name] for name in ("dataset", "method", "seed", "fid_features")}
    settings["bf16"] = bool(settings["bf16"])
    as_text = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in settings.items()}
    return {name: value for name, value in as_text.items() if name not in unused}


def flag(name: str, value) -> str:
    """A setting as the command line has it: --ema 0.99."""
    text = f"{value:g}" if isinstance(value, float) else value
    return f"--{name.replace('_', '-')} {text}"


def row_name(run: dict, names: Iterable[str] = ("ema", "form"), method: bool = True) -> str:
    """The run's method and those of the settings `names` that have not the paper's value: "gd --ema 0.99"."""
    settings = {name: run["settings"].get(name) for name in names}
    flags = [flag(name, v) for name, v in settings.items() if v not in (None, False, DEFAULTS.get(name))]
    return " ".join([run["method"]] * method + flags) or "all runs"


def is_baseline(gd: dict, run: dict) -> bool:
    """Whether `gd` is the run that shows what `run` adds: GD, of the same seed and otherwise equal settings.

    That of a GD run with --ema is the one without.
    """
    wanted = run["settings"] | ({"ema": 0.0} if run["method"] == "gd" else {})
    shared = (wanted.keys() & gd["settings"].keys()) - {"method"}
    return gd["method"] == "gd" and gd is not run and all(gd["settings"][n] == wanted[n] for n in shared)


def mean_and_error(values: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over the first axis, the seeds; NaN where one is None; of one seed no error."""
    v = np.asarray(values, dtype=float)
    error = v.std(0, ddof=1) / math.sqrt(len(v)) if len(v) > 1 else np.full_like(v[0], np.nan)
    return v.mean(0), error


def paired(runs: Sequence[dict], against: Sequence[dict]) -> list[dict]:
    """Each measure's mean difference between the runs of a row and their baselines, seed by seed.

    The baselines (is_baseline) are looked for in `against`. low and high: the 95% interval of the mean, by
    Student's t with a degree of freedom less than there are seeds; None with one seed.
    """
    pairs, rows = [(run, gd) for run in runs for gd in against if is_baseline(gd, run)], []
    for measure in MEASURES:
        values = [(run["measures"][measure], gd["measures"][measure]) for run, gd in pairs]
        differences = [ours - theirs for ours, theirs in values if None not in (ours, theirs)]
        if differences:
            mean, error = map(float, mean_and_error(differences))
            half = None if math.isnan(error) else float(student_t.ppf(0.975, len(differences) - 1)) * error
            low, high = (None, None) if half is None else (mean - half, mean + half)
            row = {"against": row_name(pairs[0][1]), "measure": measure, "seeds": len(differences)}
            rows.append(row | {"mean": mean, "low": low, "high": high})
    return rows


# ----------------------------------------------------------------------------------------------------------
# Tables.


def plus_minus(mean: float, error: float) -> str:
    """A mean and its standard error as text; "-" for what is NaN."""
    digits = 2 if abs(mean) < 3 else 1
    text = "-" if math.isnan(mean) else f"{mean:.{digits}f}"
    return text + (f" ± {error:.{digits}f}" if error > 0 else "")


def markdown(rows: list[dict]) -> str:
    """A table of texts and numbers, its columns as wide as their widest cell; "-" for None."""
    texts = [[f"{v:.2f}" if type(v) is float else "-" if v is None else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(rows[0], *texts)]
    lines = [list(rows[0]), ["-" * width for width in widths], *texts]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def write_csv(path: Path, columns: Sequence[str], rows: list[dict]) -> None:
    """A table as a file, whole or not at all; None and NaN are empty cells."""
    with r.whole(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: "" if v is None or v != v else v for k, v in row.items()} for row in rows)


def code_note(runs: Sequence[dict]) -> str | None:
    """What to say of runs that come from different code, or from code that they do not name."""
    counts = Counter(f"script {run['script']}" if run.get("script") else "script unknown" for run in runs)
    if len(counts) == 1 and "script unknown" not in counts:
        return None
    return "code: " + ", ".join(f"{name} ({count} runs)" for name, count in counts.items()) + "."


def setting_note(dataset: str, features: str, runs: Sequence[dict]) -> str:
    """What the FID is taken on, and by which settings the runs differ from the paper's."""
    usual, other = DEFAULTS | (r.DATASETS[dataset] if dataset in PUBLISHED else {}), []
    for name in usual.keys() - {"dataset", "method", "seed", "device", "bf16"}:
        paper = as_text(usual[name])
        values = {as_text(run["settings"].get(name, paper)) for run in runs} - {paper}
        if values:
            other.append(f"{name} {', '.join(map(str, sorted(values)))} (paper {paper})")
    setting = f"not the paper's setting: {'; '.join(sorted(other))}" if other else "the paper's setting"
    incomparable = dataset in PUBLISHED and not features.startswith("inception")
    apart = "; the paper's numbers, on Inception's, cannot be compared with these" if incomparable else ""
    return f"{dataset}: FID on features of {features}{apart}; {setting}."


# ----------------------------------------------------------------------------------------------------------
# The first form: Table 1, Figure 4 and Figure 5 of the paper, from every finished run below a folder.

Groups = dict[tuple[str, str], dict[str, list[dict]]]  # (dataset, FID features) -> row of the table -> its runs


def refuse_together(run: dict, other: dict) -> None:
    """Stop if two runs do not belong in one table: they are the same row and seed, or differ in a setting.

    Rows may differ in --ema and in what is the penalty's; the runs of one row in nothing but their seed.
    """
    same_row, folders = row_name(run) == row_name(other), f"{other['folder']} and {run['folder']}"
    if same_row and run["seed"] == other["seed"]:
        r.stop(f"{folders} are both {row_name(run)} with seed {run['seed']}: report only one of them")
    free = {"seed", "device"} | (set() if same_row else {"method", "ema"} | PENALTY_SETTINGS)
    theirs, ours = other["settings"], run["settings"]
    for name in sorted((theirs.keys() & ours.keys()) - free):
        if theirs[name] != ours[name]:
            what = f"{flag(name, theirs[name])} and {ours[name]}"
            r.stop(f"{folders} do not belong in one table ({what}): report their folders apart")


def gather(folder: Path) -> Groups:
    """All finished runs below a folder, in the order of the tables. Stops if some do not belong together."""
    runs = [read_run(path.parent) for path in sorted(folder.rglob("result.json"))]
    if not runs:
        r.stop(f"{folder} holds no finished run (result.json): train some first")
    datasets, methods, groups = list(r.DATASETS), list(r.METHODS), {}
    runs.sort(key=lambda run: (datasets.index(run["dataset"]), methods.index(run["method"]), row_name(run)))
    for run in runs:
        rows = groups.setdefault((run["dataset"], run["fid_features"]), {})
        for other in chain(*rows.values()):
            refuse_together(run, other)
        rows.setdefault(row_name(run), []).append(run)
    return groups


def table_rows(dataset: str, features: str, runs_of: dict[str, list[dict]]) -> list[dict]:
    """The rows of Table 1 of a dataset: the paper's, whether there are runs or not, and those that we add."""
    published, methods, rows = dict(zip(ROWS, PUBLISHED.get(dataset, ()))), list(r.METHODS), []
    for name in sorted({*runs_of, *ROWS}, key=lambda name: (methods.index(name.split()[0]), name)):
        runs = runs_of.get(name, [])
        row = {"dataset": dataset, "method": name, "seeds": len(runs)}
        for column in ("AFID", "forgetting", "pooled FID"):
            values = [(run["measures"] | {"pooled FID": run.get("fid_pooled")})[column] for run in runs]
            row[column], row[f"{column} s.e."] = map(float, mean_and_error(values or [None]))
        curvatures = [*chain(*(run["curvature"] for run in runs))]
        row["curvature"] = float(np.mean(curvatures)) if curvatures else None
        rows.append(row | {"paper: AFID / forgetting": published.get(name), "FID features": features})
    return rows


def report(folder: Path) -> None:
    """Print Table 1 and the paired differences of all runs below a folder, and write these and the figures."""
    groups = gather(folder)
    rows, differences, notes, pictures = [], [], [], {}
    for group, runs_of in groups.items():
        dataset, features = group
        runs = [*chain(*runs_of.values())]
        rows += table_rows(dataset, features, runs_of)
        notes.append(setting_note(dataset, features, runs))
        for name, row_runs in runs_of.items():
            found = paired(row_runs, runs)
            differences += [{"dataset": dataset, "method": name} | difference for difference in found]
            pictures.setdefault(dataset, {}).setdefault(name, []).extend(row_runs)
    absent = [dataset for dataset in PUBLISHED if dataset not in pictures]
    if absent:
        notes.append(f"missing, no finished run: {', '.join(absent)}.")

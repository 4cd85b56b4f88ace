"""What finished runs of rank1_ewc.py say together: the paper's Table 1, Figures 4 and 5, and comparisons.

    python -m results.report RUNS                                        # every finished run below a folder
    python -m results.report RUN RUN .. --over lam --to results/lambda   # these runs, over a setting or curvature
    python -m results.report RUN .. --over lam --to results/direct --against RUN ..    # from these, not from GD
    python -m results.report --include README.md          # renew the tables that a text includes, from files

The first writes table1.md, table1.csv, paired.md, paired.csv, summary.md, figure4.png and
figure5-<dataset>.png into RUNS, the second results/lambda.md, .json and .png. A row is a method, named with
the flags that set it apart ("gd --ema 0.99"); its runs differ in the seed alone. Only result.json and
samples-task*.png are read. In a text, all between a line "<!-- include: FILE -->" and the next "<!-- end -->"
becomes FILE as it now is, its path from the checkout's root on.
"""

import argparse
import csv
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, combinations, cycle
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import LogLocator, MaxNLocator
from scipy.stats import t as student_t

import rank1_ewc as r
from results import beyond

ROWS = ("joint", "diag-only", "rank1-only", "gd", "diag", "rank1")  # of the paper's Table 1
PUBLISHED = {  # AFID / forgetting there, row by row; *: from the authors' result files
    "mnist": ("2.6 / -", "62.2 / 51.1", "65.2 / 58.3", "10.1 / 2.3", "14.3 / 5.2", "7.6 / 0.6"),
    "fashion": ("5.7 / -", "99.9 / 81.7 *", "96.9 / 82.1 *", "19.1 / 3.9", "27.7 / 9.1", "15.4 / 0.9"),
    "cifar10": ("23.3 / -", "128.6 / 74.4 *", "120.0 / 77.4 *", "61.2 / 16.6", "72.6 / 17.9", "50.5 / 7.4"),
    "imagenet32": ("11.7 / -", "86.1 / 34.2", "74.3 / 41.3", "69.0 / 46.2", "73.8 / 25.8", "48.5 / 15.2"),
}
CURVES = {  # the paper's Figure 4: AFID after tasks 1 to 5, and its standard errors over three seeds
    ("mnist", "gd"): ((8.3, 9.1, 9.7, 8.7, 10.1), (0.1, 0.8, 0.6, 0.5, 0.9)),
    ("mnist", "diag"): ((8.3, 10.9, 13.6, 13.0, 14.3), (0.1, 1.8, 1.6, 1.8, 1.3)),
    ("mnist", "rank1"): ((8.3, 8.8, 8.0, 8.6, 7.6), (0.1, 0.5, 0.5, 0.1, 0.1)),
    ("fashion", "gd"): ((16.7, 16.7, 18.2, 19.2, 19.1), (3.3, 1.5, 1.5, 0.8, 0.9)),
    ("fashion", "diag"): ((16.7, 17.0, 18.8, 25.3, 27.7), (3.3, 1.7, 1.1, 1.9, 2.2)),
    ("fashion", "rank1"): ((16.7, 15.4, 15.3, 15.3, 15.4), (3.3, 2.1, 1.5, 0.9, 0.6)),
    ("cifar10", "gd"): ((37.6, 50.1, 54.7, 59.3, 61.2), (1.0, 4.4, 0.9, 4.2, 3.2)),
    ("cifar10", "diag"): ((37.6, 52.9, 64.1, 72.8, 72.6), (1.0, 1.3, 2.5, 6.4, 3.2)),
    ("cifar10", "rank1"): ((37.6, 48.4, 51.5, 53.0, 50.5), (1.0, 1.0, 1.3, 0.4, 1.2)),
}
MEASURES = ("AFID", "forgetting", "FID of a task just learned")
OF_PENALTY = {"lam", "form", "fisher_samples", "fisher_timesteps"}  # gd has none
ALL_METHODS = r.METHODS | beyond.METHODS
METHODS, DATASETS = list(ALL_METHODS), list(r.DATASETS)
COLORS = [f"C{i}" for i in range(10)] + ["black", "gold", "lime", "navy", "tan", "crimson"]
LEGEND = """Mean ± standard error over the seeds; curvature: what the penalty adds, mean lambda c* ||mu||^2 (of
the diagonal lambda times its trace); *: the authors' files."""
PAIRED = ("dataset", "method", "against", "measure", "seeds", "mean", "low", "high")  # columns
ROW_FLAGS = ("ema", "form")  # of Table 1: what a row is named with, beside its method
Rows = dict  # what tells a row from others -> its runs, one a seed


# ----------------------------------------------------------------------------------------------------------
# A run is what its result.json holds, and with it "folder", "settings", "measures" and "curvature".


def plain(value):
    """A setting as one would type it: [16, 32] -> "16,32", 10.0 -> 10, True -> "True"."""
    if isinstance(value, list | bool):
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


PAPER = r.settings_of(r.Settings(**{name: plain(row[0]) for name, row in r.SETTINGS.items()}))
PAPER |= {name: plain(value) for name, value in r.RETIRED.items()}  # older runs name these
PAPER |= {"bf16": "False", "replay_steps": PAPER["sample_steps"]}  # where result.json does not say


def all_settings(named: dict) -> dict:
    """The paper's settings, and over them those named; the pool takes the samples' steps if it names none."""
    named = {name: plain(value) for name, value in named.items() if value is not None}
    return PAPER | {"replay_steps": named.get("sample_steps", PAPER["sample_steps"])} | named


def read_run(folder: Path) -> dict:
    """The finished run in a folder. Stops if there is none, or if result.json is damaged or lacks parts."""
    path = folder / "result.json"
    if not path.is_file():
        r.stop(f"{folder} holds no finished run (result.json): train it first, or leave it out")
    run = r.read_result(path)
    try:
        method, tasks, fid = ALL_METHODS[run["method"]], len(run["fid_real"]), np.array(run["fid"], float)
        learned = None if method.joint else float(np.diag(fid).mean())
        measures = dict(zip(MEASURES, (run["afid"][-1], run["forgetting"], learned)))
        measures["pooled FID"] = run.get("fid_pooled")
        curvature = [run["lam"] * fisher.get("energy", fisher.get("trace")) for fisher in run["fisher"]]
        if fid.shape != (1 if method.joint else tasks, tasks) or run["dataset"] not in DATASETS:
            raise ValueError("its dataset is not known, or its numbers are not all there")
        settings = all_settings(run["config"])
        settings |= {name: plain(run[name]) for name in ("dataset", "method", "lam", "seed", "fid_features")}
    except r.DAMAGED as error:
        r.stop(f"{path} is damaged or lacks parts ({type(error).__name__}: {error}): leave it out")
    unused = set() if method.penalty else OF_PENALTY
    unused = unused if method.replay else unused | {"replay_per_class", "replay_steps"}
    settings = {name: value for name, value in settings.items() if name not in unused} | {"tasks": tasks}
    return run | {"folder": folder, "settings": settings, "measures": measures, "curvature": curvature}


def usual_settings(run: dict) -> dict:
    """What its dataset's settings are, or those of --small, where no flag says otherwise."""
    small = run["dataset"] != "digits" and run["settings"]["channels"] == plain(r.SMALL["channels"])
    return all_settings(r.DATASETS[run["dataset"]] | (r.SMALL if small else {}))


def row_name(run: dict, names: Iterable[str] = ROW_FLAGS) -> str:
    """A run's method, and those settings among `names` that are not its dataset's usual: "gd --ema 0.99"."""
    usual = usual_settings(run)
    settings = {name: run["settings"].get(name, usual.get(name)) for name in names}
    flags = [f"--{n.replace('_', '-')} {v}" for n, v in settings.items() if v != usual.get(n)]
    return " ".join([run["method"], *flags])


def group_rows(runs: Sequence[dict], row_of: Callable) -> Rows:
    """The runs of each row, row_of(run), method after method. Stops if two of a row have the same seed."""
    rows = {}
    for run in sorted(runs, key=lambda run: (METHODS.index(run["method"]), row_name(run), run["seed"])):
        row = rows.setdefault(row_of(run), [])
        if row and row[-1]["seed"] == run["seed"]:
            r.stop(f"{row[-1]['folder']} and {run['folder']} are the same row and seed: leave one out")
        row.append(run)
    return rows


def mean_and_error(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The mean over the seeds and its standard error. None: no mean if a value is None, of one no error."""
    if None in values or not values:
        return None, None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(np.mean(values)), error


def means(runs: Sequence[dict], names: Sequence[str] = MEASURES) -> dict[str, float | None]:
    """The means and standard errors of these measures over the runs of a row."""
    row = {}
    for name in names:
        row[name], row[f"{name} s.e."] = mean_and_error([run["measures"][name] for run in runs])
    return row


def baseline(run: dict, among: Sequence[dict]) -> dict | None:
    """The run of GD with the same seed that shows what `run` adds: of equal settings but the method.

    Of a run of GD it is the one that differs in the fewest settings, and there is as usual.
    """
    own, usual, found = run["settings"], usual_settings(run), []
    for gd in [other for other in among if other["method"] == "gd" and other is not run]:
        settings = gd["settings"]
        differing = {n for n in own.keys() & settings.keys() if own[n] != settings[n] and n != "method"}
        as_usual = run["method"] == "gd" and all(settings[n] == usual.get(n) for n in differing)
        if own["seed"] == settings["seed"] and (not differing or as_usual):
            found.append((len(differing), gd))
    fewest = [gd for n, gd in found if n == min(n for n, _ in found)]
    return fewest[0] if len(fewest) == 1 else None


def paired(runs: Sequence[dict], base_of: Callable, names: Iterable[str] = ROW_FLAGS) -> list[dict]:
    """The mean difference of each measure between the runs of a row and others, seed by seed: a line a measure.

    Each run is paired with base_of(run), which may be None. low and high are the 95% interval of the mean, by
    Student's t with a degree of freedom less than pairs; None for a single pair. `names`: the settings that
    the others are named with.
    """
    pairs, lines = [(run, base) for run in runs if (base := base_of(run))], []
    for measure in MEASURES:
        values = [(run["measures"][measure], base["measures"][measure]) for run, base in pairs]
        differences = [a - b for a, b in values if None not in (a, b)]
        if differences:
            mean, error = mean_and_error(differences)
            line = {"against": row_name(pairs[0][1], names), "measure": measure, "seeds": len(differences)}
            line |= {"mean": mean, "low": None, "high": None}
            if error is not None:
                half = float(student_t.ppf(0.975, len(differences) - 1)) * error
                line |= {"low": mean - half, "high": mean + half}
            lines.append(line)
    return lines


def markdown(rows: list[dict]) -> str:
    """A table, its columns as wide as their widest cell: a mean's standard error behind it, "-" for None.

    Columns of None alone are left out.
    """
    names = [name for name in (rows[0] if rows else []) if any(row[name] is not None for row in rows)]
    lines = [[name for name in names if not name.endswith("s.e.")]]
    for row in rows:
        cells = []
        for name in lines[0]:
            value, error = row[name], row.get(f"{name} s.e.")
            digits = ".2f" if isinstance(value, float) and abs(value) < 3 else ".1f"
            text = f"{value:{digits}}" if isinstance(value, float) else "-" if value is None else str(value)
            cells.append(f"{text} ± {error:{digits}}" if error is not None else text)
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines if line) + "\n"


def differences_table(lines: Sequence[dict]) -> list[dict]:
    """Put the paired differences in words, a row a row of runs: mean (low to high), the mean's 95% interval."""
    columns, rows = dict.fromkeys(f"{name}: difference" for name in MEASURES), {}
    for line in lines:
        names = {key: str(value) for key, value in line.items() if key not in PAIRED[3:]}
        row = rows.setdefault(tuple(names.values()), names | {"seeds": line["seeds"]} | columns)
        interval = "" if line["low"] is None else f" ({line['low']:.2f} to {line['high']:.2f})"
        row[f"{line['measure']}: difference"] = f"{line['mean']:+.2f}{interval}"
    return list(rows.values())


# ----------------------------------------------------------------------------------------------------------
# The first form: Table 1, Figure 4 and Figure 5 of the paper, from every finished run below a folder.


def gather(folder: Path) -> dict[tuple[str, str], Rows]:
    """(dataset, FID features) -> the rows of Table 1, of all finished runs below a folder.

    Stops if two of these do not belong in one table: its rows may differ in the method, --ema and what is the
    penalty's, the runs of a row in the seed alone.
    """
    runs, groups = [read_run(path.parent) for path in sorted(folder.rglob("result.json"))], {}
    if not runs:
        r.stop(f"{folder} holds no finished run (result.json): train some first")
    for run in sorted(runs, key=lambda run: DATASETS.index(run["dataset"])):
        groups.setdefault((run["dataset"], run["fid_features"]), []).append(run)
    for pair in chain(*(combinations(group, 2) for group in groups.values())):
        one, other = (run["settings"] for run in pair)
        same_row = row_name(pair[0]) == row_name(pair[1])
        free = {"seed", "device"} | (set() if same_row else {"method", "ema"} | OF_PENALTY)
        for name in sorted((one.keys() & other.keys()) - free):
            if one[name] != other[name]:
                what = f"--{name.replace('_', '-')} {one[name]} and {other[name]}"
                folders = f"{pair[0]['folder']} and {pair[1]['folder']}"
                r.stop(f"{folders} do not belong in one table ({what}): report their folders apart")
    return {key: group_rows(group, row_name) for key, group in groups.items()}


def setting_note(dataset: str, features: str, runs: Sequence[dict]) -> str:
    """What the FID is taken on, that of real images, and by which settings the runs differ from the paper's."""
    other, special = [], r.DATASETS[dataset] if dataset in PUBLISHED else {}
    for name, value in PAPER.items():
        paper = plain(special.get(name, value))
        values = {str(run["settings"].get(name, paper)) for run in runs} - {str(paper)}
        if values and name not in ("dataset", "method", "seed", "device", "bf16"):
            other.append(f"{name} {', '.join(sorted(values))} (paper {paper})")
    setting = f"not the paper's setting: {'; '.join(other)}" if other else "the paper's setting"
    real = np.mean([run["fid_real"] for run in runs])
    features = f"FID on features of {features} (the paper's: inception)"
    return f"- {dataset}: {features}; in the samples' place real training images have {real:.1f}; {setting}."


def code_note(runs: Iterable[dict]) -> list[str]:
    """A line that says how many runs come from which version of the script, unless all are of one."""
    scripts = Counter(run.get("script") or "unknown" for run in runs)
    versions = ", ".join(f"script {name} ({n} runs)" for name, n in scripts.items())
    return [f"- code: {versions}."] if len(scripts) > 1 or "unknown" in scripts else []


def report(folder: Path) -> None:
    """Write and print Table 1 and the paired differences of all runs below a folder; draw Figures 4 and 5."""
    groups, table, differences, notes = gather(folder), [], [], []
    kinds = Counter(dataset for dataset, _ in groups)  # of features
    for (dataset, features), rows in groups.items():
        title = dataset if kinds[dataset] == 1 else f"{dataset} ({features})"
        comparable = features.startswith("inception")  # else the paper's FIDs cannot stand beside ours
        published = dict(zip(ROWS, PUBLISHED.get(dataset, ()))) if comparable else {}
        every_run = [run for runs in rows.values() for run in runs]
        base_of = partial(baseline, among=every_run)
        for name in sorted({*rows, *published}, key=lambda name: (METHODS.index(name.split()[0]), name)):
            runs = rows.get(name, [])
            row = {"dataset": title, "method": name, "seeds": len(runs)}
            row |= means(runs, (*MEASURES, "pooled FID"))
            row["curvature"], _ = mean_and_error([value for run in runs for value in run["curvature"]])
            table.append(row | {"paper: AFID / forgetting": published.get(name), "FID features": features})
            differences += [{"dataset": title, "method": name} | line for line in paired(runs, base_of)]
        notes.append(setting_note(dataset, features, every_run))
        plot_samples(title, rows, folder / f"figure5-{re.sub(r'[^A-Za-z0-9]+', '-', title).strip('-')}.png")
    plot_afid(groups, folder / "figure4.png")
    absent = [name for name in PUBLISHED if name not in [dataset for dataset, _ in groups]]
    notes += [f"- missing, no finished run: {', '.join(absent)}."] if absent else []
    shown, rows = differences_table(differences), chain(*(rows.values() for rows in groups.values()))
    text = "\n".join([markdown(table), LEGEND, *notes, *code_note(chain(*rows)), ""])
    print(text, markdown(shown), sep="\n")
    texts = {"table1.md": text, "paired.md": markdown(shown), "summary.md": markdown(summary(table, shown))}
    for path, content in texts.items():
        with r.whole(folder / path) as file:
            file.write(content.encode())
    for path, columns, lines in (("table1.csv", table[0], table), ("paired.csv", PAIRED, differences)):
        with r.whole(folder / path) as file, io.TextIOWrapper(file, newline="") as text_file:
            writer = csv.DictWriter(text_file, columns)
            writer.writeheader()
            writer.writerows(lines)
    print(f"In {folder}: table1.md, table1.csv, paired.md, paired.csv, figure4.png, figure5-<dataset>.png")


def summary(table: Sequence[dict], differences: Sequence[dict]) -> list[dict]:
    """Join the rows of Table 1 that have runs with their differences from GD, in few columns."""
    names = ("dataset", "method", "seeds", "AFID", "AFID s.e.", "forgetting", "forgetting s.e.")
    columns = ("against", f"{MEASURES[0]}: difference", f"{MEASURES[1]}: difference")
    from_gd, rows = {(line["dataset"], line["method"]): line for line in differences}, []
    for row in table:
        if row["seeds"]:
            difference = from_gd.get((row["dataset"], row["method"]), {})
            rows.append({n: row[n] for n in names} | {n: difference.get(n) for n in columns})
    return rows


def plot_afid(groups: dict[tuple[str, str], Rows], path: Path) -> None:
    """Figure 4: AFID after each task, a panel a dataset and kind of features, bands of one standard error.

    Where the features are the paper's, its curves stand beside ours, dashed, with bars of a standard error.
    """
    names = ["gd", "diag", "rank1", *(name for rows in groups.values() for name in rows)]
    colors = dict(zip(dict.fromkeys(names), cycle(COLORS)))
    figure = Figure(figsize=(7.5 * len(groups), 4), layout="constrained")
    for axes, (dataset, features) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        for name, runs in groups[dataset, features].items():
            after, joint = np.arange(1, len(runs[0]["fid_real"]) + 1), name.startswith("joint")
            curve = [mean_and_error(afids) for afids in zip(*(run["afid"] for run in runs))]
            mean, error = np.array(curve * len(after) if joint else curve, float).T  # joint: of no task
            axes.plot(after, mean, ":" if joint else "-", color=colors[name], label=f"{name} ({len(runs)})")
            axes.fill_between(after, mean - error, mean + error, color=colors[name], alpha=0.2, lw=0)
        comparable = features.startswith("inception") and "limit" not in features and len(after) == 5
        for name in ("gd", "diag", "rank1"):
            if comparable and (dataset, name) in CURVES:
                style = {"color": colors[name], "ls": "--", "capsize": 2, "label": f"paper: {name}"}
                axes.errorbar(after, *CURVES[dataset, name], **style)
        axes.set(xlabel="after task", ylabel=f"AFID (features: {features})", title=dataset, yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
        axes.grid(alpha=0.3)
        axes.legend(title="row (seeds)", fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    with r.whole(path) as file:
        figure.savefig(file, dpi=120)


def plot_samples(dataset: str, rows: Rows, path: Path) -> None:
    """Figure 5: five samples of each of the first two classes, a row a row of Table 1, a column a task.

    Cut out of the runs' samples-task*.png, of one seed: all start from the same noises.
    """
    every_run = [run for runs in rows.values() for run in runs]
    seed, tasks = min(run["seed"] for run in every_run), len(every_run[0]["fid_real"])
    columns = sorted({round(k) for k in np.linspace(1, tasks, min(tasks, 5))})
    figure = Figure(figsize=(1.6 + 2.2 * len(columns), 0.5 + 0.95 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, name in zip(panels, rows):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        folders = [run["folder"] for run in rows[name] if run["seed"] == seed]
        for axes, k in zip(line, columns):
            axes.set(xticks=[], yticks=[], title=f"after task {k}" if line[0] is panels[0, 0] else "")
            axes.spines[:].set_visible(False)
            pictures = [folder / f"samples-task{k}.png" for folder in folders]
            if pictures and pictures[0].exists():
                axes.imshow(imread(pictures[0])[: 2 * 34 + 2, : 5 * 34 + 2])  # cells of 32, margins of 2
            elif k == tasks or not name.startswith("joint"):
                axes.text(0.5, 0.5, "missing", ha="center", va="center", transform=axes.transAxes)
    figure.suptitle(f"{dataset}, seed {seed}")
    with r.whole(path) as file:
        figure.savefig(file, dpi=120)


# ----------------------------------------------------------------------------------------------------------
# The second form: runs over a setting.


def distinguishing(runs: Sequence[dict], over: str) -> list[str]:
    """The settings, as few as suffice, that besides `over` tell apart the runs of a method."""
    chosen = []
    for name in PAPER:
        values = {}  # of the runs that look alike so far
        for run in runs:
            alike = tuple(run["settings"].get(other) for other in ["method", *chosen])
            values.setdefault(alike, set()).add(run["settings"].get(name))
        if name not in ("seed", "device", over) and any(len(different) > 1 for different in values.values()):
            chosen.append(name)
    return chosen


def mean_drift(runs: Sequence[dict]) -> str | None:
    """How far the weights ended from the old theta* along each direction: root mean square, of unit vectors."""
    squares = []
    for run in runs:
        norms = [fisher["mu_norm"] for fisher in run["fisher"] if "mu_norm" in fisher]
        drift = run["drift"][-1] if norms else []  # of each task's direction or directions, task after task
        squares += [(d / norms[i * len(norms) // len(drift)]) ** 2 for i, d in enumerate(drift)]
    return f"{np.sqrt(np.mean(squares)):.1e}" if squares else None


def span_of_mu(runs: Sequence[dict]) -> dict[str, str | None]:
    """The smallest and the largest c* and norm of mu of these runs' tasks: "2.6 to 14"; None without a mu."""
    of_mu = [
        run for run in runs if ALL_METHODS[run["method"]].penalty in (r.Rank1Penalty, beyond.ProximalPenalty)
    ]
    fishers = [fisher for run in of_mu for fisher in run["fisher"]]
    spans = {"c*": None, "norm of mu": None}
    for column, name in zip(spans, ("c_star", "mu_norm")):
        values = [float(f"{fisher[name]:.2g}") for fisher in fishers]
        spans[column] = f"{min(values):g} to {max(values):g}" if values else None
    return spans


def compare(folders: Sequence[Path], over: str, to: Path, against: Sequence[Path] = ()) -> None:
    """Print the measures of runs over a setting, or over lambda as curvature, and how far they lie from GD.

    `against`: from these runs instead, which must be a single row. Writes TO.md and TO.json, and TO.png if some
    line has three points or more.
    """
    runs, others = [read_run(folder) for folder in folders], [read_run(folder) for folder in against]
    setting, every_run = "lam" if over == "curvature" else over, runs + others
    if len({run["fid_features"] for run in every_run}) > 1:
        r.stop("FIDs on features of different networks cannot be compared: compare their runs apart")
    names, features = distinguishing(every_run, setting), runs[0]["fid_features"]
    told = [name for name in (*names, setting) if name != "method"]  # what a baseline is named with

    def row_of(run: dict) -> tuple:
        name = row_name(run, names)
        name = name.removeprefix(run["method"]).strip() if over == "method" else name
        return name or "all", run["settings"].get(setting)

    if len(group_rows(others, row_of)) > 1:
        r.stop("--against takes the runs of one row, a seed each: name others apart")
    same_seed = {other["seed"]: other for other in others}
    base_of = (lambda run: same_seed.get(run["seed"])) if others else partial(baseline, among=runs)
    rows, table, differences = group_rows(runs, row_of), [], []
    lines = list(dict.fromkeys(line for line, _ in rows))
    for key in sorted(rows, key=lambda key: (lines.index(key[0]), 0 if type(key[1]) is str else key[1] or 0)):
        row = {"line": key[0], setting: key[1]}
        if over == "curvature":
            curvature, _ = mean_and_error([value for run in rows[key] for value in run["curvature"]])
            row["curvature"] = curvature and float(f"{curvature:.3g}")
        differences += [row | difference for difference in paired(rows[key], base_of, told)]
        seeds = [run["seed"] for run in rows[key]]
        row |= span_of_mu(rows[key]) | {"drift": mean_drift(rows[key]), "seeds": seeds}
        table.append(row | means(rows[key]))
    shown = [row | {name: row[name] and str(row[name]) for name in (setting, over)} for row in table]
    notes = [f"- FID on features of {features}.", *code_note(every_run)]
    parts = [markdown(shown), markdown(differences_table(differences)), *notes]
    text = "\n".join(part for part in parts if part.strip()).rstrip() + "\n"
    print(text)
    with r.whole(Path(f"{to}.md")) as file:
        file.write(text.encode())
    content = {"over": over, "features": features, "rows": table, "paired": differences}
    r.write_json(Path(f"{to}.json"), content)
    points = {(row["line"], row[over]) for row in differences or table if row[over] is not None}
    of_each_line = Counter(line for line, _ in points).values()
    several = max(of_each_line, default=0) > 2  # two points are read in the table
    if several:
        plot_lines(table, differences, over, features, Path(f"{to}.png"))
    print(f"In {to}.md, {to}.json{f', {to}.png' if several else ''}")


def plot_lines(table: list[dict], differences: list[dict], over: str, features: str, path: Path) -> None:
    """Draw over a setting how far runs lie from others, or without such the means; a panel a measure.

    A line a name; runs that do not have the setting are a horizontal line. Bars and bands are the 95% interval
    of a difference, of a mean one standard error.
    """
    points = [(row, m, row[m], row[f"{m} s.e."]) for row in table for m in MEASURES if row[m] is not None]
    if differences:
        half = [None if line["low"] is None else line["mean"] - line["low"] for line in differences]
        points = [(line, line["measure"], line["mean"], h) for line, h in zip(differences, half)]
    colors = dict(zip(dict.fromkeys(row["line"] for row, *_ in points), cycle(COLORS)))
    values = {row[over] for row, *_ in points} - {None}
    numeric = not any(isinstance(value, str) for value in values)
    wide = values and numeric and min(values) > 0 and max(values) > 10 * min(values)
    sizes = [abs(mean) + (half or 0) for _, _, mean, half in points]
    base = differences[0]["against"] if differences else ""
    base = "GD" if base.startswith("gd") else base
    flattened = differences and max(sizes) > 20 * np.median(sizes)  # by a far point, on a linear axis
    figure, handles = Figure(figsize=(15, 4.2), layout="constrained"), {}
    for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES):
        for (name, color), marker in zip(colors.items(), cycle("os^Dv")):
            own = [point for point in points if (point[0]["line"], point[1]) == (name, measure)]
            own = [(row[over], mean, half or 0) for row, _, mean, half in own]
            for _, mean, half in [point for point in own if point[0] is None]:
                handles[name] = axes.axhline(mean, color=color, ls="--")
                axes.axhspan(mean - half, mean + half, color=color, alpha=0.1, lw=0)
            own = [point for point in own if point[0] is not None]
            if own:
                style = {"marker": marker, "ls": "-" if numeric else "", "color": color, "alpha": 0.8}
                handles[name] = axes.errorbar(*zip(*own), capsize=3, **style)
        added = "curvature that the penalty adds (lambda: see the legend)"
        setting = added if over == "curvature" else f"--{over.replace('_', '-')}"
        label = f"{measure}:\ndifference from {base}{' (log beyond 1)' if flattened else ''}"
        axes.set(xlabel=setting, ylabel=label if differences else measure)
        if wide:
            axes.set_xscale("log")
        elif numeric:
            axes.set_xticks(sorted(values))
        else:
            axes.tick_params("x", rotation=30)
        axes.axhline(0, color="black", lw=0.8) if differences else None
        if flattened:
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.margins(x=0.15, y=0.12)
    figure.get_layout_engine().set(wspace=0.04)  # a panel's label would touch the next
    what = f"Difference from {base}" if differences else "Mean"
    bars = ", seed by seed, 95% interval" if differences else ", standard error"
    bars = bars if any(half for *_, half in points) else ", one seed: no intervals"
    figure.suptitle(f"{what}{bars} (features: {features})")
    labels = {name: name for name in handles}
    for name in handles if over == "curvature" else ():  # as many lambdas at the points would overprint
        lams = sorted({row["lam"] for row, *_ in points if row["line"] == name and row["lam"] is not None})
        labels[name] += " (sum over all axes)" if name.startswith("diag") else ""
        labels[name] += f": lambda {', '.join(f'{lam:g}' for lam in lams)}" if lams else ""
    figure.legend(handles.values(), labels.values(), loc="outside lower center", ncols=3)
    with r.whole(path) as file:
        figure.savefig(file, dpi=120)


def include(text: Path) -> None:
    """Renew in a text what stands between "<!-- include: FILE -->" and "<!-- end -->", from FILE."""
    parts = re.split(r"(<!-- include: (.+?) -->\n).*?(<!-- end -->)", text.read_text(), flags=re.DOTALL)
    for i in range(1, len(parts), 4):  # before, the opening line, FILE, the closing line, ..
        parts[i + 1] = Path(parts[i + 1]).read_text()
    with r.whole(text) as file:
        file.write("".join(parts).encode())


def main(argv: Sequence[str] | None = None) -> None:
    """Report on all runs below a folder or, with --over, compare runs over a setting."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = r.stop
    parser.add_argument("runs", type=Path, nargs="+", help="a folder that finished runs lie below; or runs")
    over = {"choices": (*PAPER, "curvature"), "help": "the setting, or curvature, to compare runs over"}
    parser.add_argument("--over", **over)
    parser.add_argument("--to", type=Path, help="a comparison goes to TO.md, TO.json and TO.png")
    parser.add_argument(
        "--against", type=Path, nargs="+", default=(), help="the runs to compare with, not GD"
    )
    parser.add_argument("--include", action="store_true", help="RUNS are texts, whose tables are renewed")
    args = parser.parse_args(argv)
    if bool(args.over) != bool(args.to) or (args.include if args.over else args.against):
        r.stop("name folders that finished runs lie below; or runs, with --over SETTING and --to NAME")
    try:
        if args.over:
            compare(args.runs, args.over, args.to, args.against)
        else:
            for path in args.runs:
                include(path) if args.include else report(path)
    except OSError as error:
        r.stop(f"{error.filename or error} cannot be read or written")


if __name__ == "__main__":
    main()

"""What finished runs of rank1_ewc.py say together: the paper's Table 1, Figures 4 and 5, and comparisons.

    python -m results.report RUNS                                        # every finished run below a folder
    python -m results.report RUN RUN .. --over lam --to results/lambda   # these runs, over a setting

The first writes table1.md, table1.csv, paired.csv, figure4.png and figure5-<dataset>.png into RUNS, the second
results/lambda.json and results/lambda.png. A row is a method, named with the flags that set it apart ("gd --ema
0.99"); its runs differ in the seed alone. Only the runs' result.json and samples-task*.png are read.
"""

import argparse
import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import LogLocator, MaxNLocator
from scipy.stats import t as student_t

import rank1_ewc as r

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
OF_PENALTY = {"lam", "form", "fisher_samples", "fisher_timesteps", "fisher_from", "curvature"}  # gd has none
METHODS, DATASETS = list(r.METHODS), list(r.DATASETS)
Rows = dict  # a row's name, or what else tells it from others -> its runs, one a seed

# ----------------------------------------------------------------------------------------------------------
# A run is what its result.json holds, and with it "folder", "settings", "measures" and "curvature".


def text_of(value) -> str:
    """A setting as the command line has it: [16, 32] -> "16,32", 10.0 -> "10"."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)


PAPER = {name: row[0] for name, row in r.SETTINGS.items() if name not in r.FREE_SETTINGS} | {"bf16": False}


def settings_of(run: dict) -> dict[str, str]:
    """The settings that a run's numbers depend on, the paper's where result.json names none."""
    named = {name: value for name, value in run["config"].items() if value is not None}
    settings = PAPER | named | {name: run[name] for name in ("dataset", "method", "lam", "seed", "fid_features")}
    unused = set() if r.METHODS[run["method"]].penalty else OF_PENALTY
    return {name: text_of(value) for name, value in settings.items() if name not in unused}


def read_run(folder: Path) -> dict:
    """The finished run in a folder. Stops if there is none, or if its result.json is damaged or lacks parts."""
    path = folder / "result.json"
    if not path.is_file():
        r.stop(f"{folder} holds no finished run (result.json): train it first, or leave it out")
    run = r.read_result(path)
    try:
        joint, tasks, fid = r.METHODS[run["method"]].joint, len(run["fid_real"]), np.array(run["fid"], float)
        learned = None if joint else float(np.diag(fid).mean())
        measures = dict(zip(MEASURES, (run["afid"][-1], run["forgetting"], learned)))
        measures["pooled FID"] = run.get("fid_pooled")
        curvature = [run["lam"] * fisher["energy"] for fisher in run["fisher"] if "energy" in fisher]
        numbers = [v for v in (run["seed"], *run["afid"], *measures.values(), *curvature) if v is not None]
        complete = fid.shape == (1 if joint else tasks, tasks) and len(fid) == len(run["afid"])
        if not (complete and run["dataset"] in DATASETS and np.isfinite(numbers).all()):
            raise ValueError("its dataset is not known, or its numbers are not all there")
        added = {"folder": folder, "settings": settings_of(run), "measures": measures, "curvature": curvature}
        return run | added
    except r.DAMAGED as error:
        r.stop(f"{path} is damaged or lacks parts ({type(error).__name__}: {error}): leave it out")


def flags(run: dict, names: Iterable[str]) -> str:
    """Those settings of a run among `names` that are not the paper's, as the command line has them."""
    paper = {name: text_of(value) for name, value in PAPER.items()}
    settings = {name: run["settings"].get(name, paper.get(name)) for name in names}
    return "".join(f" --{n.replace('_', '-')} {v}" for n, v in settings.items() if v != paper.get(n))


def row_name(run: dict) -> str:
    """The name of a run's row in Table 1: its method, and --ema and --form where they are not the paper's."""
    return run["method"] + flags(run, ("ema", "form"))


def group_rows(runs: Iterable[dict], row_of: Callable) -> Rows:
    """The runs of each row, row_of(run), method after method. Stops if two have the same seed."""
    rows = {}
    for run in sorted(runs, key=lambda run: (METHODS.index(run["method"]), row_name(run), run["seed"])):
        row = rows.setdefault(row_of(run), [])
        if row and row[-1]["seed"] == run["seed"]:
            r.stop(f"{row[-1]['folder']} and {run['folder']} are the same row and seed: name only one of them")
        row.append(run)
    return rows


def mean_and_error(values: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over the first axis, the seeds; NaN where one is None; of one seed no error."""
    v = np.asarray(values, dtype=float)
    error = v.std(0, ddof=1) / math.sqrt(len(v)) if len(v) > 1 else np.full_like(v[0], np.nan)
    return v.mean(0), error


def number(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if math.isnan(value) else float(value)


def means(runs: Sequence[dict]) -> dict[str, float | None]:
    """The mean and the standard error of each measure over the runs of a row; None for what there is not."""
    row = {}
    for name in (*MEASURES, "pooled FID"):
        mean, error = mean_and_error([run["measures"][name] for run in runs] or [None])
        row |= {name: number(mean), f"{name} s.e.": number(error)}
    return row


def is_baseline(gd: dict, run: dict) -> bool:
    """Whether `gd` shows what `run` adds: the run of GD with the same seed and otherwise equal settings.

    Of a run of GD with --ema it is the one without.
    """
    wanted = run["settings"] | ({"ema": "0"} if run["method"] == "gd" else {})
    shared = (wanted.keys() & gd["settings"].keys()) - {"method"}
    return gd["method"] == "gd" and gd is not run and all(gd["settings"][n] == wanted[n] for n in shared)


def paired(runs: Sequence[dict], against: Sequence[dict]) -> list[dict]:
    """The mean difference of each measure between the runs of a row and GD, seed by seed: a line a measure.

    Each run is paired with its baseline among `against`, if there is one. low and high are the 95% interval
    of the mean, by Student's t with a degree of freedom less than there are pairs; None for a single pair.
    """
    pairs, lines = [(run, gd) for run in runs for gd in against if is_baseline(gd, run)], []
    for measure in MEASURES:
        values = [(run["measures"][measure], gd["measures"][measure]) for run, gd in pairs]
        differences = [ours - theirs for ours, theirs in values if ours is not None and theirs is not None]
        if differences:
            mean, error = mean_and_error(differences)
            half = student_t.ppf(0.975, len(differences) - 1) * error
            line = {"against": row_name(pairs[0][1]), "measure": measure, "seeds": len(differences)}
            lines.append(line | {"mean": float(mean), "low": number(mean - half), "high": number(mean + half)})
    return lines


def cells(row: dict) -> dict[str, str]:
    """A row as text: a mean with its standard error behind it, "-" for what there is not."""
    texts = {}
    for name, value in row.items():
        texts[name] = "-" if value is None else str(value)
        if isinstance(value, float):
            digits, error = ".2f" if abs(value) < 3 else ".1f", row.get(f"{name} s.e.")
            texts[name] = f"{value:{digits}}" + (f" ± {error:{digits}}" if error else "")
    return {name: text for name, text in texts.items() if not name.endswith("s.e.")}


def markdown(rows: list[dict]) -> str:
    """A table, its columns as wide as their widest cell; nothing of no rows."""
    lines = [list(cells(row).values()) for row in rows]
    lines = [list(cells(row)) for row in rows[:1]] + lines
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines if line)


# ----------------------------------------------------------------------------------------------------------
# The first form: Table 1, Figure 4 and Figure 5 of the paper, from every finished run below a folder.


def refuse_mixture(run: dict, other: dict) -> None:
    """Stop if two runs do not belong in one table.

    Rows may differ in the method, --ema and what is the penalty's, the runs of a row in the seed alone.
    """
    free = {"seed", "device"} | (set() if row_name(run) == row_name(other) else {"method", "ema"} | OF_PENALTY)
    a, b = run["settings"], other["settings"]
    for name in sorted((a.keys() & b.keys()) - free):
        if a[name] != b[name]:
            what = f"--{name.replace('_', '-')} {a[name]} and {b[name]}"
            folders = f"{run['folder']} and {other['folder']}"
            r.stop(f"{folders} do not belong in one table ({what}): report their folders apart")


def gather(folder: Path) -> dict[tuple[str, str], Rows]:
    """(dataset, FID features) -> rows of Table 1, of all finished runs below a folder."""
    groups = {}
    for path in sorted(folder.rglob("result.json")):
        run = read_run(path.parent)
        group = groups.setdefault((run["dataset"], run["fid_features"]), [])
        for other in group:
            refuse_mixture(other, run)
        group.append(run)
    if not groups:
        r.stop(f"{folder} holds no finished run (result.json): train some first")
    ordered = sorted(groups, key=lambda key: DATASETS.index(key[0]))
    return {key: group_rows(groups[key], row_name) for key in ordered}


def setting_note(dataset: str, features: str, runs: Sequence[dict]) -> str:
    """What the FID is taken on, and by which settings the runs differ from the paper's."""
    usual, other = PAPER | (r.DATASETS[dataset] if dataset in PUBLISHED else {}), []
    for name in usual.keys() - {"dataset", "method", "seed", "device", "bf16"}:
        paper = text_of(usual[name])
        values = {run["settings"].get(name, paper) for run in runs} - {paper}
        other += [f"{name} {', '.join(sorted(values))} (paper {paper})"] if values else []
    setting = f"not the paper's setting: {'; '.join(sorted(other))}" if other else "the paper's setting"
    return f"- {dataset}: FID on features of {features} (the paper's: inception); {setting}."


def report(folder: Path) -> None:
    """Write and print Table 1 and the paired differences of all runs below a folder; draw Figures 4 and 5."""
    groups, table, differences, notes, scripts, pictures = gather(folder), [], [], [], Counter(), {}
    for (dataset, features), rows in groups.items():
        published = dict(zip(ROWS, PUBLISHED.get(dataset, ())))
        every_run = [run for runs in rows.values() for run in runs]
        for name in sorted({*rows, *ROWS}, key=lambda name: (METHODS.index(name.split()[0]), name)):
            runs = rows.get(name, [])
            curvatures = [curvature for run in runs for curvature in run["curvature"]]
            row = {"dataset": dataset, "method": name, "seeds": len(runs)} | means(runs)
            row["curvature"] = float(np.mean(curvatures)) if curvatures else None
            table.append(row | {"paper: AFID / forgetting": published.get(name), "FID features": features})
            differences += [{"dataset": dataset, "method": name} | line for line in paired(runs, every_run)]
        notes.append(setting_note(dataset, features, every_run))
        scripts.update(run.get("script") or "unknown" for run in every_run)
        pictures.setdefault(dataset, {}).update(rows)
    absent = [dataset for dataset in PUBLISHED if dataset not in pictures]
    notes += [f"- missing, no finished run: {', '.join(absent)}."] if absent else []
    if len(scripts) > 1 or "unknown" in scripts:
        notes.append("- code: " + ", ".join(f"script {name} ({n} runs)" for name, n in scripts.items()) + ".")

    about = "Mean ± standard error over the seeds; lower is better. Curvature: mean lambda c* ||mu||^2. *: from"
    text = "\n".join([markdown(table), "", f"{about} the authors' result files.", *notes, ""])
    with r.whole(folder / "table1.md") as temporary:
        temporary.write_text(text)
    columns = ("dataset", "method", "against", "measure", "seeds", "mean", "low", "high")
    for path, names, lines in (("table1.csv", table[0], table), ("paired.csv", columns, differences)):
        with r.whole(folder / path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(lines)
    plot_afid(groups, folder / "figure4.png")
    for dataset, rows in pictures.items():
        plot_samples(dataset, rows, folder / f"figure5-{dataset}.png")
    print(text, markdown(differences), "", sep="\n")
    print(f"In {folder}: table1.md, table1.csv, paired.csv, figure4.png, figure5-<dataset>.png")


def plot_afid(groups: dict[tuple[str, str], Rows], path: Path) -> None:
    """Figure 4: AFID after each task, a panel a dataset and kind of features, bands of one standard error.

    Where the features are the paper's, its curves stand beside ours, dashed, with bars of a standard error.
    """
    names = list(dict.fromkeys(["gd", "diag", "rank1", *(name for rows in groups.values() for name in rows)]))
    figure = Figure(figsize=(7.5 * len(groups), 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        dataset, features = key
        for name, runs in groups[key].items():
            mean, error = mean_and_error([run["afid"] for run in runs])
            after = np.arange(1, len(runs[0]["fid_real"]) + 1)
            joint = r.METHODS[runs[0]["method"]].joint
            if joint:  # one number, of no task
                mean, error = mean.repeat(len(after)), error.repeat(len(after))
            color = f"C{names.index(name)}"
            axes.plot(after, mean, color=color, ls=":" if joint else "-", label=f"{name} ({len(runs)} seeds)")
            axes.fill_between(after, mean - error, mean + error, color=color, alpha=0.2, lw=0)
        comparable = features.startswith("inception") and "limit" not in features and len(after) == 5
        for name in ("gd", "diag", "rank1"):
            if comparable and (dataset, name) in CURVES:
                style = {"color": f"C{names.index(name)}", "ls": "--", "capsize": 2, "label": f"paper: {name}"}
                axes.errorbar(after, *CURVES[dataset, name], **style)
        axes.set(xlabel="after task", ylabel=f"AFID (features: {features})", title=dataset, yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    r.save_figure(figure, path)


def plot_samples(dataset: str, rows: Rows, path: Path) -> None:
    """Figure 5: five samples of each of the first two classes, a row a row of Table 1, a column a task.

    Cut out of the runs' samples-task*.png, of one seed: all start from the same noises.
    """
    first = next(iter(rows.values()))[0]
    seed = min(run["seed"] for runs in rows.values() for run in runs)
    tasks = len(first["fid_real"])
    columns = sorted({round(k) for k in np.linspace(1, tasks, min(tasks, 5))})
    figure = Figure(figsize=(1.6 + 2.2 * len(columns), 0.5 + 0.95 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, name in zip(panels, rows):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        folders = [run["folder"] for run in rows[name] if run["seed"] == seed]
        for axes, k in zip(line, columns):
            axes.set(xticks=[], yticks=[], title=f"after task {k}" if line is panels[0] else "")
            axes.spines[:].set_visible(False)
            picture = folders[0] / f"samples-task{k}.png" if folders else None
            if picture and picture.exists():
                axes.imshow(read_picture(picture)[: 2 * CELL + 2, : 5 * CELL + 2])
            elif k == tasks or not name.startswith("joint"):
                axes.text(0.5, 0.5, "missing", ha="center", va="center", transform=axes.transAxes)
    figure.suptitle(f"{dataset}, seed {seed}")
    r.save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------
# The second form: runs over a setting.


def distinguishing(runs: Sequence[dict], over: str) -> list[str]:
    """The settings, as few as suffice, that besides `over` tell apart runs of one method."""
    chosen = []
    for name in dict.fromkeys(name for run in runs for name in run["settings"]):
        if name not in ("method", "seed", "device", over):
            values = {}  # of runs that so far look alike
            for run in runs:
                alike = tuple(run["settings"].get(other) for other in ["method", *chosen])
                values.setdefault(alike, set()).add(run["settings"].get(name))
            chosen += [name] if max(map(len, values.values())) > 1 else []
    return chosen


def compare(folders: Sequence[Path], over: str, to: Path) -> None:
    """Print the measures of runs over a setting, and what sets them apart from GD; write to.json and to.png."""
    runs = [read_run(folder) for folder in folders]
    names = distinguishing(runs, over)

    def row_of(run: dict) -> tuple[str, str | None]:
        method = "" if over == "method" else run["method"]
        return (method + flags(run, names)).strip() or "all runs", run["settings"].get(over)

    rows, lines, differences = group_rows(runs, row_of), [], []
    for key, found in rows.items():
        name, value = key
        seeds = [run["seed"] for run in found]
        lines.append({"line": name, over: value, "seeds": seeds} | means(found))
        differences += [{"line": name, over: value} | difference for difference in paired(found, runs)]
    print(markdown([line | {"seeds": len(line["seeds"])} for line in lines]), markdown(differences), sep="\n\n")
    r.write_json(Path(f"{to}.json"), {"over": over, "rows": lines, "paired": differences})
    plot_lines(rows, over, Path(f"{to}.png"))
    print(f"In {to}.json, {to}.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and report on a folder of runs, or compare runs over a setting."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = r.stop
    parser.add_argument("runs", type=Path, nargs="+", help="a folder that finished runs lie below, or runs")
    parser.add_argument("--over", choices=PAPER, help="compare the runs over this setting")
    parser.add_argument("--to", type=Path, help="where the comparison goes: TO.json and TO.png")
    args = parser.parse_args(argv)
    if (args.over is None) != (args.to is None) or (args.over is None and len(args.runs) > 1):
        r.stop("give one folder that runs lie below, or runs and both --over SETTING and --to NAME")
    try:
        compare(args.runs, args.over, args.to) if args.over else report(args.runs[0])
    except OSError as error:
        r.stop(f"{error.filename} cannot be read or written ({error.strerror})")


if __name__ == "__main__":
    main()

"""What finished runs of rank1_ewc.py say together: the paper's Table 1, Figures 4 and 5, and comparisons.

    python -m results.report runs/digits                        # Table 1 of every finished run below a folder
    python -m results.report RUN RUN .. --over lam --to lambda  # runs compared over a setting, or "curvature"
    python -m results.report RUN .. --over lam --to direct --against RUN ..      # with these runs, not with GD
    python -m results.report runs/digits --rows finetune,gd --to picture.png     # Figure 5 alone, of these rows
    python -m results.report --sample RUN --classes 3,7         # ten images of each class, by a run's model
    python -m results.report --include README.md                # renew the tables that a text includes
    python -m results.report --tally results/pages/*/*.csv      # how often a penalty helps or hurts GD

The first writes table1.md, table1.csv, figure4.png and figure5.png into --to, or else into the first folder;
the second lambda.md, lambda.csv and, where there are three points or more, lambda.png. A row is a method, named
with the settings in which it differs from others ("gd --ema 0.99"); its runs differ in the seed alone. In a
text, all between a line "<!-- include: FILE -->" and the next "<!-- end -->" becomes FILE as it now is.
"""

import argparse
import re
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import LogLocator
from scipy import stats
from torch.nn.functional import interpolate
from torchvision.utils import save_image

import rank1_ewc as r
from results import beyond

PAGES = Path(__file__).parent / "pages"
METHODS = r.METHODS | beyond.METHODS
OLDER = {"loss": None, "proximal": "rank1-proximal"}  # form and fisher_timesteps of older runs: methods now
OLDER |= {"0,1000": None, "0,333": "rank1-low", "333,667": "rank1-middle", "667,1000": "rank1-high"}
OF_PENALTY, OF_REPLAY = {"lam", "fisher_samples"}, {"replay_per_class", "replay_steps"}  # settings
MEASURES = ["AFID", "forgetting", "FID just learned", "rise from best", "pooled FID"]
HAVE_SHARES = ("AFID", "FID just learned")  # forgetting may be about 0: a share of it says nothing
DPI = 120  # of pictures
ROW = ["dataset", "fid_features", "line", "at"]  # the columns that tell rows apart
LEGEND = """FID just learned: mean over the tasks of the FID right after each was learned. Rise from best: mean over
the old tasks of the final FID minus the lowest before. Curvature: what the penalty adds, mean lambda c* ||mu||^2
(of the diagonal lambda times its trace)."""
PLAIN_WORDS = {"joint": "all classes at once", "finetune": "no protection", "replay": "replay alone"}
PLAIN_WORDS |= {"gd": "generative distillation", "diag": "gd + diagonal EWC", "rank1": "gd + rank-1 EWC"}
PLAIN_WORDS |= {"diag-only": "diagonal EWC alone", "rank1-only": "rank-1 EWC alone"}


# ---- Runs: a table with a line per run, its columns the parts of result.json and what is computed from them.


def as_text(value) -> str:
    """A setting as one would type it: [16, 32] -> "16,32", 10.0 -> "10"."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@cache
def usual_settings(dataset: str, channels: str = "") -> dict[str, str]:
    """What a dataset's settings are where no flag says otherwise; or with --small, of these channels."""
    small = dataset != "digits" and channels == as_text(r.SMALL["channels"])
    cfg = r.parse_args(["--dataset", dataset, *["--small"] * small])
    settings = r.settings_of(cfg) | {"replay_steps": cfg.sample_steps}
    return {name: as_text(value) for name, value in settings.items()}


def read_run(path: Path) -> dict:
    """A finished run, of its result.json. Stops if this is damaged or lacks parts."""
    run = r.read_result(path)
    try:
        settings = run["config"] | {"lam": run["lam"], "tasks": len(run["fid_real"])}
        settings["replay_steps"] = settings.get("replay_steps") or settings["sample_steps"]
        settings = {name: as_text(value) for name, value in settings.items() if value is not None}
        older = OLDER[settings.get("form", "loss")] or OLDER[settings.get("fisher_timesteps", "0,1000")]
        run["method"] = older or run["method"]
        method, tasks, fid = METHODS[run["method"]], len(run["fid_real"]), np.array(run["fid"], float)
        if fid.shape != (1 if method.joint else tasks, tasks) or run["dataset"] not in r.DATASETS:
            raise ValueError("not all numbers are there, or its dataset is one of yours, unknown here")
        fid = np.full((tasks, tasks), np.nan) if method.joint else fid  # fid[j, k]: of task k after task j
        old, learned = fid[-1, :-1], fid.diagonal()  # of the old tasks at the end; of each right after it
        rise = (old - np.fmin.reduce(fid[:-1, :-1], axis=0, initial=np.inf)).sum() / max(1, tasks - 1)
        measures = run["afid"][-1], run["forgetting"], learned.mean(), rise, run.get("fid_pooled")
        curvature = [run["lam"] * fisher.get("energy", fisher.get("trace")) for fisher in run["fisher"]]
    except r.DAMAGED as error:
        r.stop(f"{path} is damaged or lacks parts ({type(error).__name__}: {error}): leave it out")
    unused = {"form", "fisher_timesteps", "dataset", "method", "seed", "device", "bf16", "fid_features"}
    unused |= (set() if method.penalty else OF_PENALTY) | (set() if method.replay else OF_REPLAY)
    run["settings"] = {name: value for name, value in settings.items() if name not in unused}
    run |= {"curvature": curvature, "change": old - learned[:-1], "folder": path.parent}
    return {"script": "unknown", "data": None} | run | dict(zip(MEASURES, measures))


def name_rows(runs: pd.DataFrame, but: str | None = None) -> pd.Series:
    """Each run's method and the settings, `but` one, that differ and are not as usual: "gd --ema 0.99"."""
    names = runs["method"].astype(object)
    for dataset, group in runs.groupby("dataset"):
        table = pd.DataFrame([*group["settings"]], group.index)
        usual = usual_settings(dataset, table["channels"].iloc[0])
        for setting in [name for name in table if table[name].nunique() > 1 and name != but]:
            unusual = table[setting].where(table[setting] != usual.get(setting))
            names[group.index] += (f" --{setting.replace('_', '-')} " + unusual).fillna("")
    return names


def read_runs(folders: Sequence[Path], only: Sequence[str] = (), over: str | None = None) -> pd.DataFrame:
    """The finished runs below these folders, of all methods or `only` these, in their order.

    "line" is what a row is named with: the method and the settings, but for `over`, in which it differs from
    others. Stops if a folder holds no run, two runs learned different data, or two of a row have the same seed.
    """
    paths = []
    for folder in folders:
        found = sorted(folder.rglob("result.json"))
        paths += found or r.stop(f"{folder} holds no finished run (result.json): train it, or leave it out")
    runs = pd.DataFrame(map(read_run, dict.fromkeys(paths)))
    for method in {*only} - {*runs["method"]}:
        r.stop(f"--rows {method}: no finished run; there are {', '.join(runs['method'].unique())}")
    runs[MEASURES] = runs[MEASURES].astype(float)  # None becomes nan
    for name, order in ("method", only or METHODS), ("dataset", r.DATASETS):
        runs[name] = pd.Categorical(runs[name], list(order))  # sorted as these are
    runs = runs.dropna(subset="method").assign(other=False)  # other: is only there to be paired with
    runs["name"], runs["line"] = name_rows(runs), name_rows(runs, but=over)
    runs["at"] = [settings.get(over) for settings in runs["settings"]]
    runs["size"] = pd.to_numeric(runs["at"], errors="coerce")
    order = ["dataset", "fid_features", "method", "line", "size", "seed"]
    runs = runs.sort_values(order, na_position="first", kind="stable", ignore_index=True)
    known = runs.dropna(subset="data").drop_duplicates(["dataset", "data"])
    twice = runs[runs.duplicated([*ROW, "seed"], keep=False)], known[known.duplicated("dataset", keep=False)]
    for two, what in zip(twice, ("are the same row and seed", "learned different data")):
        if len(two):
            one, other, *_ = two["folder"]
            r.stop(f"{one} and {other} {what}: leave one out")
    return runs


def find_baselines(runs: pd.DataFrame) -> list[int]:
    """For each run the place of the one that shows what it adds: GD of equal settings and seed. -1: none.

    For a run of GD it is the one that differs in the fewest settings, and there is as usual.
    """
    settings, same, found = pd.DataFrame([*runs["settings"]]), ["dataset", "fid_features", "seed"], []
    for i, run in runs.iterrows():
        alike = (runs["method"] == "gd") & (runs[same] == run[same]).all(axis=1) & (runs.index != i)
        own, gds = settings.loc[i], settings[alike]
        differs = (gds != own) & gds.notna() & own.notna()
        usual = pd.Series(usual_settings(run["dataset"], own["channels"])).reindex(settings.columns)
        fits = ~differs | (gds == usual) if run["method"] == "gd" else ~differs
        differences = differs.sum(axis=1)[fits.all(axis=1)]
        alone = (differences == differences.min()).sum() == 1
        found.append(differences.idxmin() if alone else -1)
    return found


# ---- Numbers and tables.


def statistics(values: pd.Series, bases: pd.Series) -> dict[str, float]:
    """Of a measure of a row's runs, and of the runs that these are paired with (nan: none).

    low and high are the 95% interval of the mean difference, by Student's t with a degree of freedom less than
    pairs; the shares are these three in percent of the mean of the runs that they are paired with.
    """
    d = (values - bases).dropna()
    half = stats.t.ppf(0.975, len(d) - 1) * d.sem()
    line = {"mean": values.mean(skipna=False), "standard_error": values.sem(), "pairs": len(d)}
    line |= {"difference": d.mean(), "low": d.mean() - half, "high": d.mean() + half}
    percent = 100 / bases[d.index].mean() if values.name in HAVE_SHARES else np.nan
    shares = {"share": "difference", "share_low": "low", "share_high": "high"}
    return line | {name: percent * line[number] for name, number in shares.items()}


def spans(seeds: Sequence[int]) -> str:
    """[0, 1, 2, 3, 4, 100] -> "0-4, 100"."""
    parts = np.split(np.array(seeds), np.flatnonzero(np.diff(seeds) != 1) + 1)
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts)


def of_penalty(row: pd.DataFrame) -> dict:
    """Of a row's runs the mean curvature, the least and the largest c* and norm of mu, and the drift.

    Drift: how far the weights end from the old theta* along each direction, of length 1; root mean square.
    """
    numbers = {"curvature": row["curvature"].explode().astype(float).mean()}
    of_mu = METHODS[row["method"].iloc[0]].penalty in (r.Rank1Penalty, beyond.ProximalPenalty)
    for column, name in (("c*", "c_star"), ("norm of mu", "mu_norm")):
        values = [float(f"{fisher[name]:.2g}") for fishers in row["fisher"] for fisher in fishers if of_mu]
        numbers[column] = f"{min(values):g} to {max(values):g}" if values else None
    squares = []
    for fishers, drift in zip(row["fisher"], row["drift"]):
        norms = [fisher["mu_norm"] for fisher in fishers if "mu_norm" in fisher]
        last = drift[-1] if norms else []  # of each task's direction or directions, task after task
        squares += [(d / norms[i * len(norms) // len(last)]) ** 2 for i, d in enumerate(last)]
    return numbers | {"drift": np.sqrt(np.mean(squares)) if squares else np.nan}


def summarize(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """-> a line per row and measure, and remarks. "base" is the place of the run that a run is paired with."""
    lines, notes = [], []
    for key, row in runs[~runs["other"]].groupby(ROW, sort=False, dropna=False):
        row, base = row.set_index("seed"), runs.reindex(row["base"]).set_axis(row["seed"])
        of_row = dict(zip(ROW, key)) | {"lam": row["settings"].iloc[0].get("lam")} | of_penalty(row)
        of_row |= {"seeds": spans(row.index), "against": next(iter(base["name"].dropna()), None)}
        lines += [of_row | {"measure": name} | statistics(row[name], base[name]) for name in MEASURES]
        name, d = row["name"].iloc[0], (row["AFID"] - base["AFID"]).dropna()
        if len(row) >= 10 and row["forgetting"].notna().all():
            change = ", ".join(f"{value:+.1f}" for value in np.mean([*row["change"]], axis=0))
            notes.append(f"- {name}, change of each old task's FID since it was learned: {change}.")
        if {*range(10)} <= {*d.index}:  # did the difference on the first five seeds replicate?
            t = stats.ttest_ind(d.loc[0:4], d.loc[5:9], equal_var=False).pvalue
            ranks = stats.mannwhitneyu(d.loc[0:4], d.loc[5:9]).pvalue
            halves = f"{d.loc[0:4].mean():+.2f} on seeds 0-4, {d.loc[5:9].mean():+.2f} on seeds 5-9"
            p = f"p = {t:.1g} by Welch's t, {ranks:.1g} by Mann-Whitney"
            notes.append(f"- {name}, difference of AFID: {halves} (are these alike? {p}).")
    scripts = runs["script"].value_counts(sort=False).items()
    notes.append(f"- code: {', '.join(f'script {name} ({n} runs)' for name, n in scripts)}.")
    return pd.DataFrame(lines).dropna(subset="mean"), notes


def markdown(rows: pd.DataFrame | Sequence[dict]) -> str:
    """A table, "-" for None, its columns as wide as their widest cell; empty columns are left out."""
    rounded = lambda v: f"{v:.{2 if abs(v) < 3 else 1}f}" if isinstance(v, float) and pd.notna(v) else v
    table = pd.DataFrame(rows).astype(object).map(rounded).fillna("-").astype(str)
    table = table.loc[:, (table != "-").any()]
    table = table[sorted(table, key=lambda name: MEASURES.index(name) if name in MEASURES else -1)]
    lines = [[*table.columns], *table.values.tolist()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines if line) + "\n"


def interval(mean: float, low: float, high: float, digits: int, unit: str = "") -> str:
    """ "-0.70 (-1.03 to -0.37)"; of a single pair the mean alone."""
    around = "" if np.isnan(low) else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{mean:+.{digits}f}{unit}{around}"


def in_words(lines: pd.DataFrame, first: list[str], further: list[str]) -> str:
    """Two tables of summarize()'s lines, their `first` columns alike: the means, and the differences."""
    words = lines.assign(means="", gaps="").astype(object)
    for i, line in zip(words.index, lines.itertuples()):
        digits, error = 2 if abs(line.mean) < 3 else 1, line.standard_error
        around = "" if np.isnan(error) else f" ± {error:.{digits}f}"
        words.loc[i, "means"] = f"{line.mean:.{digits}f}{around}"
        words.loc[i, "gaps"] = interval(line.difference, line.low, line.high, 2)
        if line.measure == "AFID":
            words.loc[i, "gaps"] += f", {interval(line.share, line.share_low, line.share_high, 1, '%')}"
    three_digits = partial(np.format_float_positional, precision=3, fractional=False, trim="-")
    words["curvature"] = lines["curvature"].map(three_digits, na_action="ignore")
    words["drift"] = lines["drift"].map("{:.1e}".format, na_action="ignore")
    words, against = words.astype(object).fillna("-"), lines["against"].dropna().unique()
    first = [name for name in ("dataset", "fid_features") if words[name].nunique() > 1] + first
    by = {"columns": "measure", "aggfunc": "first", "sort": False}
    text = markdown(words.pivot_table("means", [*first, *further, "seeds"], **by).reset_index())
    if len(against):
        words, told = words[lines["pairs"] > 0], ["against", "pairs"] if len(against) > 1 else ["pairs"]
        text += f"\nMean difference from {' or '.join(against)}, seed by seed, and its 95% interval:\n\n"
        text += markdown(words.pivot_table("gaps", [*first, *told], **by).reset_index())
    return text


def write(to: Path, lines: pd.DataFrame, *text: str) -> None:
    """Print the text and write it to TO.md, and the lines, with their digits, to TO.csv."""
    print("\n".join(text))
    table = lines.to_csv(index=False, float_format="%.12g", lineterminator="\n")
    for path, content in ((f"{to}.md", "\n".join([*text, ""])), (f"{to}.csv", table)):
        with r.whole(Path(path)) as file:
            file.write(content.encode())
    print(f"In {to}.md, {to}.csv")


def save(figure: Figure, path: Path) -> None:
    with r.whole(path) as file:
        figure.savefig(file, dpi=DPI)


# ---- The first form: Table 1, Figure 4 and Figure 5 of the paper.


def published(dataset: str, features: str) -> pd.DataFrame:
    """The paper's numbers, a line per method; none where FIDs on our features cannot stand beside them."""
    table = pd.read_csv(PAGES / "published.csv", index_col="method")
    return table[(table["dataset"] == dataset) & features.startswith("inception") & ("limit" not in features)]


def setting_note(runs: pd.DataFrame) -> str:
    """What the FID is taken on, that of real images, and by which settings the runs differ from the paper's."""
    dataset, features, other = runs["dataset"].iloc[0], runs["fid_features"].iloc[0], []
    for name, paper in usual_settings("mnist" if dataset == "digits" else dataset).items():
        values = {settings.get(name, paper) for settings in runs["settings"]} - {paper}
        other += [f"{name} {', '.join(sorted(values))} (paper {paper})"] if values else []
    setting = f"not the paper's setting: {'; '.join(other)}" if other else "the paper's setting"
    real = f"in the samples' place real training images have {np.mean([*runs['fid_real']]):.1f}"
    return f"- {dataset}: FID on features of {features} (the paper's: inception); {real}; {setting}."


def table_1(folders: Sequence[Path], to: Path, only: Sequence[str] = ()) -> None:
    """Table 1 of all finished runs below these folders, or of `only` these methods, into the folder TO.

    With Figure 4, and 5 where a run's pictures are kept; or Figure 5 alone to a PNG.
    """
    runs = read_runs(folders, only)
    groups = {names: group for names, group in runs.groupby(["dataset", "fid_features"])}
    for names, group in groups.items():
        picture = to / f"{'-'.join(['figure5', *(names if len(groups) > 1 else [])])}.png"
        if to.suffix == ".png" or any((run / "samples-task1.png").exists() for run in group["folder"]):
            plot_samples(group, to if to.suffix == ".png" else picture)
    if to.suffix == ".png":
        return
    plot_afid(groups, to / "figure4.png")
    lines, notes = summarize(runs.assign(base=find_baselines(runs)))
    lines = lines.rename(columns={"line": "method"}).drop(columns="at")
    papers = {names: published(*names)["AFID / forgetting"] for names in groups}
    rows = zip(lines["dataset"], lines["fid_features"], lines["method"])
    lines["paper"] = [papers[dataset, features].get(method) for dataset, features, method in rows]
    notes = [*map(setting_note, groups.values()), *notes]
    write(to / "table1", lines, in_words(lines, ["method"], ["curvature", "paper"]), LEGEND, *notes)


def plot_afid(groups: dict[tuple, pd.DataFrame], path: Path) -> None:
    """Figure 4: AFID after each task, a panel a dataset and kind of features, bands of one standard error.

    Where the features are the paper's, its curves stand beside ours, dashed, with bars of a standard error.
    """
    figure = Figure(figsize=(7.5 * len(groups), 4), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, ((dataset, features), runs) in zip(panels, groups.items()):
        after, colors = np.arange(1, len(runs["fid_real"].iloc[0]) + 1), {}
        for name, row in runs.groupby("line", sort=False):
            curves = np.array([*row["afid"]]) * np.ones(len(after))  # of joint training one point: of no task
            mean, error = curves.mean(0), stats.sem(curves) if len(row) > 1 else 0
            style = {"ls": ":" if name.startswith("joint") else "-", "label": f"{name} ({len(row)})"}
            colors[name] = axes.plot(after, mean, **style)[0].get_color()
            axes.fill_between(after, mean - error, mean + error, color=colors[name], alpha=0.2, lw=0)
        for method, _, _, *curve in published(dataset, features).dropna().itertuples():
            style = {"color": colors.get(method, "black"), "ls": "--", "label": f"paper: {method}"}
            axes.errorbar(range(1, 6), curve[:5], curve[5:], capsize=2, **style)
        axes.set(xlabel="after task", ylabel=f"AFID (features: {features})", title=dataset)
        axes.set(yscale="log", xticks=after)
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter="")
        axes.grid(alpha=0.3)
        axes.legend(title="row (seeds)", fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def plot_samples(runs: pd.DataFrame, path: Path) -> None:
    """Figure 5: five samples of each of the first two classes, a row a row of Table 1, a column a task.

    Cut out of the samples-task*.png of one seed: all start from the same noises.
    """
    runs, dataset = runs[runs["seed"] == runs["seed"].min()], runs["dataset"].iloc[0]
    tasks, classes = len(runs["fid_real"].iloc[0]), 1000 if dataset == "imagenet32" else 10
    named = dataset in r.PUBLISHED  # of another dataset the number of classes is not known
    word = "digits" if dataset in ("digits", "mnist") else "classes"
    columns = sorted({round(k) for k in np.linspace(1, tasks, min(tasks, 5))})
    width, height = 206 + 178 * len(columns), 96 + 84 * len(runs)  # pixels, of which a panel takes 166 x 66
    where = {"left": 202 / width, "right": 1 - 8 / width, "top": 1 - 90 / height, "bottom": 24 / height}
    figure = Figure(figsize=(width / DPI, height / DPI))
    where |= {"wspace": 12 / 166, "hspace": 18 / 66}
    panels = figure.subplots(len(runs), len(columns), squeeze=False, gridspec_kw=where)
    for axes, k in zip(panels[0], columns):
        learned = spans(range((k - 1) * classes // tasks, k * classes // tasks)).replace(",", "")
        axes.set_title(f"after task {k}" + f":\n{word} {learned}" * named, fontsize=10)
    for axes_of_run, run in zip(panels, runs.itertuples()):
        label = f"{PLAIN_WORDS.get(run.method, run.method)}\n({run.line})"
        axes_of_run[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for axes, k in zip(axes_of_run, columns):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            picture = run.folder / f"samples-task{k}.png"  # cells of 32 pixels, margins of 2
            if picture.exists():
                image = imread(picture)[2:68, 2:168].copy()
                image[32:34], image[:, [i for i in range(166) if i % 34 > 31]] = 1, 1
                axes.imshow(image, interpolation="nearest")
            elif k == tasks or run.method != "joint":
                axes.text(0.5, 0.5, "missing", ha="center", va="center", transform=axes.transAxes)
    figure.suptitle("What is generated for the first two classes, after each task", fontsize=12)
    save(figure, path)


# ---- The second form: runs over a setting.


def compare(folders: Sequence[Path], over: str, to: Path, against: Sequence[Path] = ()) -> None:
    """TO.md and TO.csv: runs over a setting, or over lambda as curvature; TO.png of three points or more.

    Each run is compared with its baseline of GD, or with that of the same seed among `against`, a single row.
    """
    setting = "lam" if over == "curvature" else over
    runs = read_runs([*folders, *against], over=setting)
    if runs["fid_features"].nunique() > 1:
        r.stop("FIDs on features of different networks cannot be compared: compare their runs apart")
    runs["other"] = [any(map(folder.is_relative_to, against)) for folder in runs["folder"]]
    others = runs[runs["other"]]
    if len(others.drop_duplicates(ROW)) > 1:
        r.stop("--against takes the runs of one row, a seed each: name others apart")
    of_seed = dict(zip(others["seed"], others.index))
    runs["base"] = runs["seed"].map(of_seed).fillna(-1) if against else find_baselines(runs)
    lines, notes = summarize(runs)
    lines[setting] = lines.pop("at")
    words = in_words(lines, ["line", setting], ["curvature", "c*", "norm of mu", "drift"])
    write(to, lines, words, f"- FID on features of {runs['fid_features'].iloc[0]}.", *notes)
    numbers = pd.to_numeric(lines[over], errors="coerce")
    lines["x"] = numbers if numbers.notna().any() else lines[over]
    lines = lines.dropna(subset=["x", "difference" if lines["pairs"].any() else "x"])
    if lines.groupby("line")["x"].nunique().max() > 2:  # two points are read in the table
        plot_lines(lines, over, Path(f"{to}.png"))


def plot_lines(lines: pd.DataFrame, over: str, path: Path) -> None:
    """Draw over a setting how far runs lie from others, with 95% intervals; or else means, with standard errors."""
    paired, numeric = lines["pairs"].any(), pd.api.types.is_numeric_dtype(lines["x"])
    half = lines["high"] - lines["difference"] if paired else lines["standard_error"]
    lines = lines.assign(y=lines["difference" if paired else "mean"], half=half.fillna(0))
    size, low, high = lines["y"].abs() + lines["half"], lines["x"].min(), lines["x"].max()
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    for axes, measure in zip(figure.subplots(2, 2).flat, MEASURES):
        for name, marker in zip(lines["line"].unique(), 4 * "os^Dv"):
            own = lines[(lines["line"] == name) & (lines["measure"] == measure)]
            label = name + (" (sum over all axes)" if over == "curvature" and name.startswith("diag") else "")
            label += f": lambda {', '.join(own['lam'])}" if over == "curvature" else ""
            style = {"marker": marker, "ls": "-" if numeric else "", "capsize": 3, "alpha": 0.8}
            axes.errorbar(own["x"], own["y"], own["half"], label=label, **style)
        setting = f"--{over.replace('_', '-')}"
        axes.set(xlabel="curvature that the penalty adds" if over == "curvature" else setting, title=measure)
        if numeric and 0 < 10 * low < high:
            axes.set_xscale("log")
        if paired:
            axes.axhline(0, color="black", lw=0.8)
        if paired and size.max() > 20 * size.median():  # a far point would flatten all others
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    what = f"Difference from {' or '.join(lines['against'].unique())}" if paired else "Mean"
    bars = ("95% interval" if paired else "standard error") if lines["half"].any() else "of one seed"
    figure.suptitle(f"{what}, {bars}")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, path)


# ---- The other forms.


def sample(run: Path, classes: Sequence[int], to: Path) -> None:
    """Let the model of a finished run generate ten images of each class, a row a class, into a PNG."""
    config = r.read_result(run / "result.json")["config"]
    with r.or_stop(f"{run / 'model.pt'} is missing or damaged", "train it with --fresh"):
        weights = r.load_whole(run / "model.pt", torch.device("cpu"))
        num_classes, in_channels = len(weights["class_embedding.weight"]), weights["conv_in.weight"].shape[1]
        model = r.UNet(in_channels, num_classes, config["channels"], config["layers_per_block"]).eval()
        model.load_state_dict(weights)
    for c in {*classes} - {*range(num_classes)}:
        r.stop(f"--classes {c}: {run} has learned the classes 0 to {num_classes - 1}")
    size, y = 8 if config["dataset"] == "digits" else 32, torch.tensor(classes).repeat_interleave(10)
    noise = torch.randn(len(y), in_channels, size, size, generator=torch.Generator().manual_seed(0))
    images = (r.ddim_sample(model, noise, y, config["sample_steps"]) + 1) / 2
    with r.whole(to) as file:
        save_image(interpolate(images, 64), file, "png", nrow=10)
    print(f"In {to}")


def tally(tables: Sequence[Path], to: Path) -> None:
    """Count in how many rows of these CSVs a penalty that is added to GD changes AFID; write a table of these.

    A row is its line, lambda, seeds and baseline; one that stands in several tables counts once.
    """
    with r.or_stop("these are not the tables of a report", "name CSV files that it wrote"):
        parts = [pd.read_csv(path, dtype={"lam": str}).assign(table=path.stem) for path in tables]
        lines = pd.concat(parts)
        if "method" in lines:
            lines["line"] = lines.get("line", lines["method"]).fillna(lines["method"])
        lines[["line", "against", "measure", "difference"]]
    added = [name for name, method in METHODS.items() if method.penalty and method.distill]
    lines = lines[
        lines["line"].str.split().str[0].isin(added) & lines["against"].str.match("gd( |$)", na=False)
    ]
    rows = lines[(lines["measure"] == "AFID") & (lines["pairs"] > 1)]
    rows = rows.drop_duplicates(["seeds", "difference", "low", "high"])
    helps, hurts = rows[rows["high"] < 0], rows[rows["low"] > 0]
    shown = pd.concat([helps, hurts])
    shown["AFID"] = [interval(*numbers, 2) for numbers in shown[["difference", "low", "high"]].values]
    shown = shown[["table", "line", "lam", "seeds", "AFID"]]
    text = f"""A penalty was added to GD in {len(rows)} rows of the tables here (each counted once, where it stands in
several). The 95% interval of the AFID's difference lies below 0 in {len(helps)} of them and above 0 in {len(hurts)};
chance alone would put {len(rows) / 40:.1f} on either side. Rows share runs, so they are not independent. The {len(shown)} rows:

{markdown(shown)}"""
    print(text)
    with r.whole(to) as file:
        file.write(text.encode())


def include(text: Path) -> None:
    """Renew in a text what stands between "<!-- include: FILE -->" and "<!-- end -->", from FILE."""
    pattern = r"(<!-- include: (.+?) -->\n).*?(<!-- end -->)"
    parts = re.split(pattern, text.read_text(encoding="utf-8"), flags=re.DOTALL)
    for i in range(1, len(parts), 4):  # before, the opening line, FILE, the closing line, ..
        parts[i + 1] = Path(parts[i + 1]).read_text(encoding="utf-8")
    with r.whole(text) as file:
        file.write("".join(parts).encode())


def main(argv: Sequence[str] | None = None) -> None:
    """Report on all runs below folders or, as the flags say, do another of the things that stand above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.error, form = r.stop, parser.add_mutually_exclusive_group()
    parser.add_argument("paths", metavar="PATH", type=Path, nargs="+", help="folders of runs; texts; tables")
    settings = [*{*usual_settings("digits")} - {"dataset", "method", "seed"}, "curvature"]
    form.add_argument("--over", choices=settings, help="compare runs over this setting, or over curvature")
    form.add_argument("--sample", action="store_true", help="let the model of a run generate images")
    form.add_argument("--include", action="store_true", help="renew the tables that these texts include")
    form.add_argument("--tally", action="store_true", help="count in these CSVs how often a penalty helps")
    parser.add_argument("--to", type=r.folder, help="folder or name of what is written")
    parser.add_argument("--against", type=Path, nargs="+", default=[], help="runs to compare with, not GD")
    parser.add_argument("--rows", type=lambda text: text.split(","), default=[], help="show these methods")
    parser.add_argument("--classes", type=r.numbers, help="of which --sample generates images: 3,7")
    args = parser.parse_args(argv)
    if (args.over and not args.to) or (args.against and not args.over) or args.sample != bool(args.classes):
        r.stop("name folders of runs; or runs, --over SETTING and --to NAME; or --sample RUN --classes 3,7")
    first = args.paths[0]
    try:
        if args.over:
            compare(args.paths, args.over, args.to, args.against)
        elif args.sample:
            sample(first, args.classes, args.to or first / "samples.png")
        elif args.tally:
            tally(args.paths, args.to or PAGES / "tally.md")
        elif args.include:
            [include(path) for path in args.paths]
        else:
            table_1(args.paths, args.to or first, args.rows)
    except OSError as error:
        r.stop(f"{error.filename or error} cannot be read or written")


if __name__ == "__main__":
    main()

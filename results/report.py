"""Report on finished runs of rank1_ewc.py: Table 1, Figures 4 and 5, and comparisons.

    python -m results.report runs/digits               # Table 1 of all finished runs in a folder
    python -m results.report RUN .. --over lam --to lambda   # compare over lam (or: curvature)
    python -m results.report RUN .. --over lam --to direct --against RUN ..   # not against GD
    python -m results.report RUN .. --over lam --to lambda --together 3       # Bonferroni's, too
    python -m results.report runs/digits --rows finetune,gd --to picture.png  # Figure 5 alone
    python -m results.report --sample RUN --classes 3,7      # ten images of each class
    python -m results.report --include README.md       # update the tables that a text includes
    python -m results.report --tally results/pages/*/*.csv   # how often a penalty helps GD
    python -m results.report RUN .. --summary --to summary.md  # the README's table
    python -m results.report TEST.csv PILOT.csv .. --tradeoff --to NAME.png  # new against old tasks

The first command writes table1.md, table1.csv, figure4.png and figure5.png into the folder --to
(default: the first folder). The second writes lambda.md, lambda.csv and, for three points or more,
lambda.png. A row is a method, named with the settings in which it differs from other rows
("gd --ema 0.99"); its runs differ only in the seed. In a text, everything between a line
"<!-- include: FILE -->" and the next "<!-- end -->" is replaced by FILE.
"""

import argparse
import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import LogLocator
from scipy import stats
from torch.nn.functional import interpolate

import rank1_ewc as r
from results import beyond

PAGES = Path(__file__).parent / "pages"
METHODS = r.METHODS | beyond.METHODS
DATASETS = r.DATASETS | beyond.DATASETS
OLDER = {  # older runs' form or fisher_timesteps -> the method it is today
    "proximal": "rank1-proximal",
    "0,333": "rank1-low",
    "333,667": "rank1-middle",
    "667,1000": "rank1-high",
}
NOT_COMPARED = {"dataset", "method", "seed", "device", "bf16"}  # settings outside a row's flags
EIGENVECTORS = {"rank1-eig", "rank2", "rank4"}  # their c* and mu are eigenvalues and eigenvectors
OF_PENALTY = {"lam", "fisher_samples"}
OF_REPLAY = {"replay_per_class", "replay_steps"}
MEASURES = ["AFID", "forgetting", "FID just learned", "rise from best", "pooled FID"]
HAVE_SHARES = ("AFID", "FID just learned")  # forgetting may be near 0: a share says nothing
ROW = ["dataset", "fid_features", "line", "at"]  # the columns that tell rows apart
LEGEND = (
    "FID just learned: mean over the tasks of the FID right after each was learned. "
    "Rise from best: mean over\nthe old tasks of the final FID minus the lowest before. "
    "Curvature: what the penalty adds, mean lambda c* ||mu||^2\n"
    "(of the diagonal lambda times its trace)."
)
PLAIN_WORDS = {
    "joint": "all classes at once",
    "finetune": "no protection",
    "replay": "replay alone",
    "gd": "generative distillation",
    "diag": "gd + diagonal EWC",
    "rank1": "gd + rank-1 EWC",
    "diag-only": "diagonal EWC alone",
    "rank1-only": "rank-1 EWC alone",
    "lr": "learning rate",
    "lam": "lambda",
    "ema": "decay of the weights' average",
    "replay per class": "replay images per class",
    "replay steps": "DDIM steps of replay images",
    "curvature": "curvature that the penalty adds",
}


# ---- Runs: a table with one line per run. Its columns are the parts of result.json and what is
# computed from them. `runs` and `group` are such tables; `row` holds a row's runs, one per seed.


def as_text(config: dict) -> dict[str, str]:
    """Settings as typed, with replay_steps filled in: [16, 32] -> "16,32", 10.0 -> "10"."""
    settings = {}
    for name, value in config.items():
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if isinstance(value, float):
            value = f"{value:g}"
        settings[name] = str(value)
    if config.get("replay_steps") is None:
        settings["replay_steps"] = settings["sample_steps"]
    return settings


def usual_settings(dataset: str, channels: str = "") -> dict[str, str]:
    """A dataset's default settings for a network with these channels."""
    row = DATASETS.get(dataset, {})
    if channels == "16,32,32,32":  # this small network has the digits' settings
        row = r.DIGITS
    cfg = r.parse_args(["--dataset", "mnist"])  # the paper's settings
    return as_text(r.settings_of(cfg) | row)


def read_run(path: Path) -> dict:
    """Read a finished run's result.json. Stops if it is damaged or lacks parts."""
    run = {"data": None, "class_order": None} | r.read_result(path)  # older runs lack these
    try:
        settings = as_text(run["config"] | {"lam": run["lam"]})
        for name in ("form", "fisher_timesteps"):
            run["method"] = OLDER.get(settings.get(name), run["method"])
        own = r.Method(replay=True, penalty=bool(run["fisher"]))
        method = METHODS.get(run["method"], own)  # own: assumed of a method of your own
        usual = usual_settings(run["dataset"], settings["channels"])
        settings = usual | settings  # older runs lack some
        used = usual.keys() - NOT_COMPARED
        if not method.penalty:
            used -= OF_PENALTY
        if not method.replay:
            used -= OF_REPLAY
        run["usual"] = usual
        run["settings"] = {name: settings[name] for name in usual if name in used}
        run["made"] = f"{settings['device']}, bf16 {settings['bf16']}"
        run["folder"] = path.parent
        run["tasks"] = len(run["fid_real"])
        return run | measure(run, method)
    except (KeyError, TypeError, ValueError) as error:
        r.stop(f"{path} is damaged or lacks parts ({error!r}): leave it out")


def measure(run: dict, method: r.Method) -> dict:
    """MEASURES, AFID after each task, and each old task's change of FID since it was learned."""
    afid, forgetting = r.afid_and_forgetting(run["fid"])
    fid = pd.DataFrame(run["fid"], dtype=float)  # fid.loc[j, k]: FID of task k after task j
    if method.joint:
        fid = pd.DataFrame(np.nan, fid.columns, fid.columns)
        afid *= len(fid)  # a horizontal line in Figure 4
    learned = np.diagonal(fid)
    final = fid.iloc[-1, :-1]  # of the old tasks
    rise = final - fid.iloc[:-1, :-1].min()
    numbers = (afid[-1], forgetting, learned.mean(), rise.mean(), run["fid_pooled"])
    return dict(zip(MEASURES, numbers)) | {"afid": afid, "change": final - learned[:-1]}


def find_flags(runs) -> pd.DataFrame:
    """The settings in which runs of a dataset differ, one per column; nan: default, or unused."""
    settings = pd.DataFrame([*runs.settings], runs.index)
    usual = pd.DataFrame([*runs.usual], runs.index)[settings.columns]
    differ = settings.groupby(runs.dataset).transform("nunique") > 1
    return settings.where(differ & (settings != usual))


def name_rows(runs, but: str | None = None) -> pd.Series:
    """Each run's method and flags, except the setting `but`: "gd --ema 0.99"."""
    names = runs.method.astype(str)
    flags = find_flags(runs)
    for setting in flags.columns.drop(but, errors="ignore"):
        names += (f" --{setting.replace('_', '-')} " + flags[setting]).fillna("")
    return names


def read_runs(folders: list[Path], methods=(), over=None, against=()) -> pd.DataFrame:
    """The finished runs in these folders, of all methods or only of `methods`, in that order.

    The column "line" names a run's row: its method, and the settings except `over` in which it
    differs from other rows. Runs in `against` serve only as a baseline.
    """
    found = []
    for folder in [*folders, *against]:
        paths = sorted(folder.rglob("result.json"))
        if not paths:
            r.stop(f"{folder} holds no finished run (result.json): train it, or leave it out")
        found += [read_run(path) | {"other": folder in against} for path in paths]
    runs = pd.DataFrame(found)
    methods = dict.fromkeys(methods or [*METHODS, *runs.method])  # your own come last
    runs["method"] = pd.Categorical(runs.method, [*methods])
    runs = runs.dropna(subset="method")
    runs[MEASURES] = runs[MEASURES].astype(float)  # None becomes nan
    runs["name"] = name_rows(runs)
    runs["line"] = name_rows(runs, but=over)
    runs["at"] = runs.settings.str.get(over)
    runs["size"] = pd.to_numeric(runs["at"], errors="coerce")
    order = ["dataset", "fid_features", "method", "line", "size", "seed"]
    runs = runs.sort_values(order, na_position="first", kind="stable", ignore_index=True)
    refuse_unlike(runs)
    return runs


def refuse_unlike(runs) -> None:
    """Stop if two runs have the same row and seed, or cannot be compared."""
    refuse(runs[runs.duplicated([*ROW, "seed"], keep=False)], "are the same row and seed")
    data = runs.dropna(subset="data").drop_duplicates(["dataset", "data"])
    refuse(data[data.duplicated("dataset", keep=False)], "learned different data")
    # A seed always draws the same real images: if their FIDs differ, so do the feature networks.
    order = runs.settings.str["class_order"]
    for _, group in runs.groupby(["dataset", "fid_features", "seed", "tasks", order]):
        first = group.fid_real.iloc[0]
        other = [not np.allclose(fid, first, rtol=1e-4, atol=0) for fid in group.fid_real]
        refuse(pd.concat([group[:1], group[other]]), "have FIDs by different networks")


def refuse(unlike, what: str) -> None:
    if len(unlike) > 1:
        one, other, *_ = unlike.folder
        r.stop(f"{one} and {other} {what}: leave one out")


def find_baselines(runs) -> list[int]:
    """For each run the index of its baseline: the run of GD with the same flags and seed.

    The baseline of a run of GD is the run of GD that lacks the fewest of its flags. -1 if no run
    qualifies, or several do.
    """
    found = []
    same = runs[["dataset", "fid_features", "seed"]]
    flags = find_flags(runs).drop(columns=OF_PENALTY, errors="ignore").fillna("")
    for i, method in runs.method.items():
        alike = (same == same.loc[i]).all(axis=1) & (runs.method == "gd") & (runs.index != i)
        gds = flags[alike]
        differs = gds != flags.loc[i]
        fits = ~differs
        if method == "gd":
            fits |= gds == ""
        lacks = differs.sum(axis=1)[fits.all(axis=1)]
        fewest = lacks.index[lacks == lacks.min()]
        found.append(fewest[0] if len(fewest) == 1 else -1)
    return found


# ---- Numbers and tables.


def statistics(values: pd.Series, bases: pd.Series, together=None) -> dict:
    """Statistics of a measure: a row's values, and their paired differences from `bases`.

    bases: the baselines' values, nan where there is none. low and high: the 95% confidence interval
    of the mean difference (Student's t, pairs - 1 degrees of freedom). The shares are difference,
    low and high in percent of the baselines' mean. low_together and high_together: the interval
    that holds for `together` comparisons at once (Bonferroni).
    """
    d = (values - bases).dropna()
    mean = d.mean()
    half = stats.t.ppf(0.975, len(d) - 1) * d.sem()
    low = mean - half
    high = mean + half
    line = {"mean": values.mean(skipna=False), "standard_error": values.sem(), "pairs": len(d)}
    line |= {"difference": mean, "low": low, "high": high}
    if values.name in HAVE_SHARES:
        share = 100 / bases[d.index].mean()
        line |= {"share": share * mean, "share_low": share * low, "share_high": share * high}
    if together:
        half = stats.t.ppf(1 - 0.025 / together, len(d) - 1) * d.sem()
        line |= {"low_together": mean - half, "high_together": mean + half}
    return line


def spans(seeds: list[int]) -> str:
    """[0, 1, 2, 3, 4, 100] -> "0-4, 100"."""
    parts = []
    for part in np.split(seeds, np.flatnonzero(np.diff(seeds) != 1) + 1):
        if len(part) > 2:
            part = [f"{part[0]}-{part[-1]}"]
        parts += map(str, part)
    return ", ".join(parts)


def rounded(value: float, digits: int = 3) -> str:
    """Round to significant digits: 602.4 -> "602", 0.0612 -> "0.0612"."""
    return np.format_float_positional(value, precision=digits, fractional=False, trim="-")


def of_penalty(row) -> dict:
    """A row's mean curvature, its smallest and largest c* and norm of mu, and its drift.

    Drift: how far the final weights are from each old theta* along each direction that is kept,
    scaled to length 1; root mean square.
    """
    fishers = pd.DataFrame([*row.fisher.explode().dropna()])
    energy = fishers.filter(["energy", "trace"]).stack()
    numbers = {"curvature": row.lam.iloc[0] * energy.mean()}
    numbers |= {"c*": None, "norm of mu": None, "drift": None}
    if "c_star" in fishers and row.method.iloc[0] not in EIGENVECTORS:
        for column, name in (("c*", "c_star"), ("norm of mu", "mu_norm")):
            least, most = fishers[name].agg(["min", "max"])
            numbers[column] = f"{rounded(least, 2)} to {rounded(most, 2)}"
    if "mu_norm" in fishers:
        norms = np.reshape(fishers["mu_norm"], (len(row), -1, 1))  # a task may keep several
        last = np.reshape([drift[-1] for drift in row.drift], (*norms.shape[:2], -1))
        numbers["drift"] = np.sqrt(np.mean((last / norms) ** 2))
    return numbers


def notes_of_ten(row, base) -> list[str]:
    """Remarks on ten seeds: how old tasks changed, and whether seeds 5-9 replicate seeds 0-4."""
    notes = []
    name = row.name.iloc[0]
    d = (row.AFID - base.AFID).dropna()
    if len(row) >= 10 and row.forgetting.notna().all():
        change = [f"{value:+.1f}" for value in np.mean([*row.change], axis=0)]
        told = f"change of each old task's FID since it was learned: {', '.join(change)}"
        notes.append(f"- {name}, {told}.")
    if d.index.isin(range(10)).sum() == 10:
        old, new = d.loc[0:4], d.loc[5:9]
        t = stats.ttest_ind(old, new, equal_var=False).pvalue
        ranks = stats.mannwhitneyu(old, new).pvalue
        halves = f"{old.mean():+.2f} on seeds 0-4, {new.mean():+.2f} on seeds 5-9"
        p = f"p = {t:.1g} by Welch's t, {ranks:.1g} by Mann-Whitney"
        notes.append(f"- {name}, difference of AFID: {halves} (are these alike? {p}).")
    return notes


def summarize(runs, together=None) -> tuple[pd.DataFrame, list[str]]:
    """-> one line per row and measure, and remarks. runs.base: index of each run's baseline."""
    lines = []
    notes = []
    for key, row in runs[~runs.other].groupby(ROW, sort=False, dropna=False):
        row = row.set_index("seed")
        base = runs.reindex(row.base).set_axis(row.index)
        of_row = dict(zip(ROW, key)) | {"lam": row.settings.iloc[0].get("lam")}
        of_row |= of_penalty(row) | {"seeds": spans(row.index)}
        of_row["against"] = next(iter(base.name.dropna()), None)
        for name in MEASURES:
            numbers = statistics(row[name], base[name], together)
            lines.append(of_row | {"measure": name} | numbers)
        notes += notes_of_ten(row, base)
    scripts = runs.script.value_counts(sort=False).items()
    scripts = [f"script {name} ({n} runs)" for name, n in scripts]
    notes.append(f"- code: {', '.join(scripts)}.")
    if runs.made.nunique() > 1:
        notes.append(f"- made in different ways: {'; '.join(runs.made.unique())}.")
    return pd.DataFrame(lines).dropna(subset="mean"), notes


def markdown(rows) -> str:
    """A Markdown table, "-" for None, columns as wide as their widest cell, none of them empty."""
    table = pd.DataFrame(rows).astype(object).fillna("-").astype(str)
    columns = []
    for name in table.columns[(table != "-").any()]:
        width = max(len(name), table[name].str.len().max())
        column = [name.ljust(width), "-" * width, *table[name].str.ljust(width)]
        columns.append(column)
    return "".join([f"| {' | '.join(line)} |\n" for line in zip(*columns)])


def by_measure(words, content: str, columns: list[str]) -> str:
    """A table of these columns and then, for each measure, a column of its `content`."""
    words = words.astype(object).fillna("-")
    rows = words[columns].drop_duplicates()
    for measure in MEASURES:
        cells = words.loc[words["measure"] == measure, [*columns, content]]
        rows = rows.merge(cells.rename(columns={content: measure}), how="left")
    return markdown(rows)


def interval(mean: float, low: float, high: float, digits: int, unit: str = "") -> str:
    """ "-0.70 (-1.03 to -0.37)"; for a single pair only the mean."""
    text = f"{mean:+.{digits}f}{unit}"
    if not np.isnan(low):
        text += f" ({low:.{digits}f} to {high:.{digits}f})"
    return text


def in_words(lines, first: list[str], further: list[str]) -> str:
    """summarize()'s lines as two tables, of means and of differences, after columns `first`."""
    means = []
    gaps = []
    for line in lines.itertuples():
        digits = 2 if abs(line.mean) < 3 else 1
        mean = f"{line.mean:.{digits}f} ± {line.standard_error:.{digits}f}"
        means.append(mean.removesuffix(" ± nan"))  # a single run has no error
        gap = interval(line.difference, line.low, line.high, 2)
        if line.measure == "AFID":
            gap += f", {interval(line.share, line.share_low, line.share_high, 1, '%')}"
            if "low_together" in lines and line.pairs > 1:
                gap += f", together ({line.low_together:.2f} to {line.high_together:.2f})"
        gaps.append(gap)
    words = lines.assign(means=means, gaps=gaps)
    words["curvature"] = lines.curvature.map(rounded, na_action="ignore")
    words["drift"] = lines.drift.map("{:.1e}".format, na_action="ignore")
    several = [name for name in ("dataset", "fid_features") if lines[name].nunique() > 1]
    first = several + first
    text = by_measure(words, "means", [*first, *further, "seeds"])
    against = lines.against.dropna().unique()
    if len(against):
        further = ["against", "pairs"] if len(against) > 1 else ["pairs"]
        what = f"Mean difference from {' or '.join(against)}, seed by seed, and its 95% interval"
        table = by_measure(words[lines.pairs > 0], "gaps", [*first, *further])
        text += f"\n{what}:\n\n{table}"
    return text


def write_text(path: Path, text: str) -> None:
    with r.atomic_write(path) as file:
        file.write(text.encode())
    print(f"In {path}")


def write(to: Path, lines, *text: str) -> None:
    """Print the text, write it to TO.md, and write the lines, unrounded, to TO.csv."""
    text = "\n".join([*text, ""])
    print(text)
    write_text(Path(f"{to}.md"), text)
    write_text(Path(f"{to}.csv"), lines.to_csv(index=False, float_format="%.12g"))


# ---- Pictures.


def save(figure: Figure, path: Path) -> None:
    with r.atomic_write(path) as file:
        figure.savefig(file, dpi=120)


def setting_label(name: str) -> str:
    name = re.sub("[_-]", " ", name)
    return PLAIN_WORDS.get(name, name)


def label(line: str) -> str:
    """A row's name in words: "gd --lr 0.002" -> "gd, learning rate 0.002"."""
    return re.sub(r" --(\S+) ", lambda flag: f", {setting_label(flag[1])} ", line)


def number_axis(axis) -> None:
    """Logarithmic if all values are positive and span more than a factor of five, else linear."""
    low, high = axis.get_data_interval()
    if 0 < 5 * low < high:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.set_minor_formatter("")
    axis.set_major_formatter("{x:g}")


def plot_afid(runs, dataset: str, features: str, path: Path) -> None:
    """Figure 4: AFID after each task, with bands of one standard error.

    The paper's curves are added, dashed, where its FIDs use the same features.
    """
    classes = len(runs.class_order.iloc[0] or range(10))  # older runs have no order
    per_task = ", ".join([str(classes // tasks) for tasks in runs.tasks.unique()])
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    colors = {}
    for name, row in runs.groupby("line", sort=False):
        afid = pd.DataFrame([*row.afid])
        after = afid.columns + 1
        mean, error = afid.mean(), afid.sem()
        (curve,) = axes.plot(after, mean, label=f"{label(name)} ({len(row)})")
        axes.fill_between(after, mean - error, mean + error, alpha=0.2)
        colors[name] = curve.get_color()
    for method, _, _, *numbers in published(dataset, features).dropna().itertuples():
        style = {"color": colors.get(method), "fmt": "--", "label": f"paper: {method}"}
        axes.errorbar(range(1, 6), numbers[:5], numbers[5:], capsize=2, **style)
    axes.set(xlabel="after task", ylabel=f"AFID (features: {features})", xticks=after)
    axes.set_title(f"AFID on {dataset}, classes per task: {per_task} (the lower, the better)")
    number_axis(axes.yaxis)
    axes.grid(alpha=0.3)
    figure.legend(title="row (seeds)", loc="outside lower center", ncols=2)
    save(figure, path)


def plot_samples(runs, path: Path) -> None:
    """Figure 5: five samples of each of the first two classes, for each row of Table 1.

    They are cut out of the samples-task*.png of one seed, and all start from the same noise.
    """
    runs = runs[runs.seed == runs.seed.min()]
    dataset, order, count = runs[["dataset", "class_order", "tasks"]].iloc[0]
    order = order or [*range(10)]  # older runs have no order
    size = len(order) // count
    tasks = np.linspace(1, count, min(count, 5)).round().astype(int)
    figure = Figure(figsize=(2 + 1.5 * len(tasks), 1 + 0.7 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), len(tasks), squeeze=False)
    for axes, task in zip(panels[0], tasks):
        learned = spans(order[(task - 1) * size : task * size])
        axes.set_title(f"after task {task}:\nclasses {learned}", fontsize=10)
    for axes_of_run, run in zip(panels, runs.itertuples()):
        name = f"{PLAIN_WORDS.get(run.method, run.method)}\n({label(run.line)})"
        axes_of_run[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for axes, task in zip(axes_of_run, tasks):
            axes.set(xticks=[], yticks=[], frame_on=False, box_aspect=0.4)
            picture = run.folder / f"samples-task{task}.png"
            if picture.exists():
                image = imread(picture)
                cell = image.shape[1] // 10  # ten samples to a row, with a margin of 2
                axes.imshow(image[2 : 2 * cell, 2 : 5 * cell], interpolation="nearest")
    figure.suptitle(f"{dataset}: what is generated for the first two classes, after each task")
    save(figure, path)


def plot_lines(lines, over: str, path: Path) -> None:
    """Plot differences with 95% intervals or, without baselines, means with standard errors."""
    what = "mean and standard error"
    lines = lines.assign(y=lines["mean"], half=lines.standard_error)
    paired = lines.pairs.any()
    if paired:
        lines = lines.assign(y=lines.difference, half=lines.high - lines.difference)
        lines = lines.dropna(subset="y")
        against = " or ".join(lines.against.unique())
        what = f"difference from {label(against)} and its 95% interval"
    if not lines.groupby("line").x.nunique().max() > 2:
        return  # two points can be read in the table
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    for axes, measure in zip(figure.subplots(2, 2).flat, MEASURES):
        points = lines[lines.measure == measure]
        for name in lines.line.unique():  # even if empty: colors must agree between panels
            own = points[points.line == name]
            text = label(name)
            if over == "curvature":
                text += f": lambda {', '.join(own.lam)}"
            axes.errorbar(own.x, own.y, own.half, fmt="o-", label=text, capsize=3)
        if paired:
            axes.axhline(0, color="black", lw=0.8)
        size = points.y.abs()
        number_axis(axes.xaxis)
        if size.max() > 20 * max(1, size.median()):  # one far point would flatten the rest
            axes.set_yscale("symlog", linthresh=1)
            axes.yaxis.set_major_formatter("{x:g}")
        elif not paired:  # differences include 0
            number_axis(axes.yaxis)
        axes.set(xlabel=setting_label(over), title=measure)
        axes.grid(alpha=0.3)
    dataset = " and ".join(lines.dataset.unique())
    figure.suptitle(f"{dataset}, {what} over {setting_label(over)}: the lower, the better")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, path)


def plot_tradeoff(tables: list[Path], path: Path) -> None:
    """Plot how each row differs from GD in FID just learned and in forgetting.

    tables: CSVs written by --over, first the test's, then its pilots'. A cross shows a row's two
    95% intervals in the test; a thin line joins its strengths in the pilots, of which those far
    outside all crosses are cut off. Along a dotted line AFID is the same.
    """
    test, *pilots = [pd.read_csv(table).dropna(subset="difference") for table in tables]
    axis = ["FID just learned", "forgetting"]  # x and y; their sum is AFID
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(0, 0, "k+", ms=12, label="gd", ls="")
    colors = {"gd": "grey"}
    for name, row in test.groupby("line", sort=False):
        row = row.set_index("measure").loc[axis]
        x, y = row.difference
        half_x, half_y = row.high - row.difference
        cross = axes.errorbar(x, y, half_y, half_x, fmt="o", capsize=3, label=label(name))
        colors[name.split()[0]] = cross[0].get_color()

    pilot = pd.concat(pilots)
    pilot["strength"] = pilot.lam.fillna(pilot.lr)
    for name, row in pilot.groupby("line"):
        points = row.pivot(index="strength", columns="measure", values="difference")[axis]
        axes.plot(*points.T.to_numpy(), ".-", lw=0.8, color=colors.get(name, "grey"))
        for strength, point in points.iterrows():
            axes.annotate(f"{strength:g}", point, fontsize=7, clip_on=True)
    for afid in range(-40, 41, 2):
        axes.axline((afid, 0), slope=-1, color="grey", ls=":", lw=0.5)
    ends = test.assign(end=test[["low", "high"]].abs().max(axis=1))
    width, height = 1.3 * ends.groupby("measure").end.max()[axis]
    axes.set(xlim=(-width, width), ylim=(-height, height))
    axes.set(xlabel="FID of tasks just learned, difference from GD's")
    axes.set(ylabel="forgetting, difference from GD's")
    axes.set_title("Down: less is forgotten; left: new tasks are learned better")
    axes.legend()
    save(figure, path)


# ---- The first form: Table 1, Figure 4 and Figure 5 of the paper.


def published(dataset: str, features: str) -> pd.DataFrame:
    """The paper's numbers, one line per method; empty if our FIDs cannot be compared with them."""
    table = pd.read_csv(PAGES / "published.csv", index_col="method")
    comparable = features.startswith("inception") and "limit" not in features
    return table[(table["dataset"] == dataset) & comparable]


def setting_note(runs, dataset: str, features: str) -> str:
    """A remark: the FID's features, the FID of real images, and settings unlike the paper's."""
    paper = usual_settings("imagenet32" if dataset == "imagenet32" else "mnist")
    other = []
    for name, value in paper.items():
        values = {settings.get(name, value) for settings in runs.settings} - {value}
        if values:
            other.append(f"{name} {', '.join(sorted(values))} (paper {value})")
    setting = f"not the paper's setting: {'; '.join(other)}" if other else "the paper's setting"
    fid = f"FID on features of {features} (the paper's: inception)"
    real = f"in the samples' place real training images have {runs.fid_real.explode().mean():.1f}"
    return f"- {dataset}: {fid}; {real}; {setting}."


def table_1(folders: list[Path], to: Path) -> None:
    """Write Table 1 and Figure 4 of all finished runs in these folders into the folder `to`.

    Also Figure 5, if any run's pictures are kept.
    """
    runs = read_runs(folders)
    lines, notes = summarize(runs.assign(base=find_baselines(runs)))
    lines = lines.rename(columns={"line": "method"}).drop(columns="at").assign(paper=None)
    settings = []
    groups = runs.groupby(["dataset", "fid_features"])
    for (dataset, features), group in groups:
        settings.append(setting_note(group, dataset, features))
        ours = (lines.dataset == dataset) & (lines.fid_features == features)
        papers = published(dataset, features)["AFID / forgetting"]
        lines.loc[ours, "paper"] = lines.method.map(papers)
        name = f"-{dataset}-{features}.png" if len(groups) > 1 else ".png"
        plot_afid(group, dataset, features, to / f"figure4{name}")
        if any((folder / "samples-task1.png").exists() for folder in group.folder):
            plot_samples(group, to / f"figure5{name}")
    words = in_words(lines, ["method"], ["curvature", "paper"])
    write(to / "table1", lines, words, LEGEND, *settings, *notes)


# ---- The second form: runs over a setting.


def compare(folders: list[Path], over: str, to: Path, against=(), together=None) -> None:
    """Compare runs over a setting or curvature: TO.md, TO.csv; for three points or more TO.png.

    The baseline of a run is its run of GD, or the run of the same seed in `against`, which must
    hold a single row.
    """
    setting = "lam" if over == "curvature" else over
    if setting not in usual_settings("digits"):
        r.stop(f"--over {over}: there is no such setting")
    runs = read_runs(folders, over=setting, against=against)
    if runs.fid_features.nunique() > 1:
        r.stop("FIDs on features of different networks cannot be compared: report them separately")
    others = runs[runs.other]
    if len(others.drop_duplicates(ROW)) > 1:
        r.stop("--against takes the runs of one row, one per seed")
    runs["base"] = find_baselines(runs)
    if against:
        runs["base"] = runs.seed.map(dict(zip(others.seed, others.index))).fillna(-1)
    lines, notes = summarize(runs, together)
    if together:
        told = f"the interval that holds for {together} comparisons at once (Bonferroni)"
        notes.append(f"- together: {told}.")
    lines[setting] = lines.pop("at")
    words = in_words(lines, ["line", setting], ["curvature", "c*", "norm of mu", "drift"])
    write(to, lines, words, f"- FID on features of {runs.fid_features.iloc[0]}.", *notes)
    lines["x"] = pd.to_numeric(lines[over], errors="coerce")
    plot_lines(lines.dropna(subset="x"), over, Path(f"{to}.png"))


# ---- The other forms.


def sample(run: Path, classes: str, to: Path) -> None:
    """Generate ten images of each of these classes with a finished run's model, a row per class.

    They start from the same noise as the run's own pictures.
    """
    result = r.read_result(run / "result.json")
    cpu = torch.device("cpu")
    weights = r.load_tensors(run / "model.pt", cpu, "train it with --fresh")
    config = result["config"]
    order = result["class_order"]
    shape = result["shape"]
    model = r.UNet(shape[0], len(order), config["channels"], config["layers_per_block"])
    model.load_state_dict(weights)
    try:
        labels = [order.index(int(c)) for c in classes.split(",")]
    except ValueError:
        r.stop(f"--classes {classes}: {run} has learned the classes 0 to {len(order) - 1}")
    y = torch.tensor(labels).repeat_interleave(10)
    noise = torch.randn(10, *shape, generator=r.rng(cpu, config["seed"], "picture"))
    noise = noise.repeat(len(labels), 1, 1, 1)
    images = r.ddim_sample(model.eval(), noise, y, config["sample_steps"])
    images = interpolate(images, scale_factor=max(1, 64 // shape[-1]))
    r.save_grid(to, r.to_uint8(images), columns=10)
    print(f"In {to}")


def summary(folders: list[Path], to: Path) -> None:
    """The README's table: AFID and forgetting of each method, by the number of tasks.

    A method has several rows if its runs with the same number of tasks differ in more than lambda.
    """
    runs = read_runs(folders)
    rows = [{"": "real images"}]
    for tasks, of_tasks in runs.groupby("tasks"):
        rows[0][f"{tasks} tasks, AFID"] = f"{np.mean([*of_tasks.fid_real]):.1f}"
        runs.loc[of_tasks.index, "line"] = name_rows(of_tasks.astype({"method": str}), but="lam")
    for name, group in runs.groupby("line", sort=False):
        method, *flags = label(name).split(", ")
        row = {"": ", ".join([PLAIN_WORDS.get(method, method), *flags])}
        for tasks, measure in itertools.product(runs.tasks.unique(), ("AFID", "forgetting")):
            values = group[group.tasks == tasks][measure].dropna()
            if len(values):
                error = f"{values.mean():.1f} ± {values.sem():.1f} ({len(values)})"
                row[f"{tasks} tasks, {measure}"] = error
        rows.append(row)
    write_text(to, markdown(rows))


def tally(tables: list[Path], to: Path) -> None:
    """Count in how many rows of these CSVs a penalty that is added to GD changes AFID.

    Rows with the same seeds, difference and interval are one row that stands in several tables.
    """
    parts = []
    for path in tables:
        part = pd.read_csv(path, dtype={"lam": str}).assign(table=path.stem)
        parts.append(part.rename(columns={"method": "line"}))
    lines = pd.concat(parts).dropna(subset=["line", "lam", "against"])
    on_gd = lines.against.str.match("gd( |$)") & ~lines.line.str.match("(diag|rank1)-only")
    rows = lines[on_gd].query("measure == 'AFID' and pairs > 1")
    rows = rows.drop_duplicates(["seeds", "difference", "low", "high"])
    helps = rows.query("high < 0")
    hurts = rows.query("low > 0")
    shown = pd.concat([helps, hurts])
    numbers = zip(shown.difference, shown.low, shown.high)
    shown["AFID"] = [interval(*three, 2) for three in numbers]
    text = (
        f"A penalty was added to GD in {len(rows)} rows of the tables here (each counted once, "
        "where it stands in\nseveral). The 95% interval of the AFID's difference lies below 0 in "
        f"{len(helps)} of them and above 0 in {len(hurts)};\nchance alone would put "
        f"{len(rows) / 40:.1f} on either side. Rows share runs, so they are not independent. "
        f"The {len(shown)} rows:\n\n"
    )
    text += markdown(shown[["table", "line", "lam", "seeds", "AFID"]])
    write_text(to, text)


def include(text: Path) -> None:
    """Replace all text between "<!-- include: FILE -->" and "<!-- end -->" by FILE."""

    def renewed(match: re.Match) -> str:
        return match[1] + Path(match[2]).read_text(encoding="utf-8") + match[3]

    pattern = r"(<!-- include: (.+?) -->\n).*?(<!-- end -->)"
    old = text.read_text(encoding="utf-8")
    write_text(text, re.sub(pattern, renewed, old, flags=re.DOTALL))


def main(argv: list[str] | None = None) -> None:
    """Report Table 1 of the runs in these folders, or do what a flag asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = r.stop
    add = parser.add_argument
    add("paths", metavar="PATH", type=Path, nargs="+", help="folders of runs, texts or tables")
    add("--over", metavar="SETTING", help="compare runs over this setting, or over curvature")
    add("--sample", action="store_true", help="generate images with a run's model")
    add("--include", action="store_true", help="update the tables that these texts include")
    add("--tally", action="store_true", help="count in these CSVs how often a penalty helps")
    add("--summary", action="store_true", help="the README's table: methods by number of tasks")
    add("--tradeoff", action="store_true", help="plot new tasks against old ones, from these CSVs")
    add("--to", type=r.folder, help="folder to write into, or name of the files")
    add("--against", type=Path, nargs="+", default=[], help="baseline runs in the place of GD")
    add("--together", type=r.positive, help="add intervals for this many comparisons at once")
    add("--rows", help="Figure 5 alone, of these methods: finetune,gd")
    add("--classes", default="", help="the classes for --sample, e.g. 3,7")
    args = parser.parse_args(argv)
    if (args.over or args.rows or args.summary or args.tradeoff) and not args.to:
        r.stop("--to must name what is written")
    first = args.paths[0]
    to = args.to or first
    if args.over:
        compare(args.paths, args.over, to, args.against, args.together)
    elif args.sample:
        sample(first, args.classes, args.to or first / "samples.png")
    elif args.tally:
        tally(args.paths, args.to or PAGES / "tally.md")
    elif args.summary:
        summary(args.paths, to)
    elif args.tradeoff:
        plot_tradeoff(args.paths, to)
    elif args.include:
        for path in args.paths:
            include(path)
    elif args.rows:
        plot_samples(read_runs(args.paths, args.rows.split(",")), to)
    else:
        table_1(args.paths, to)


if __name__ == "__main__":
    main()

# `make` lists the targets. An experiment is METHODS x SEEDS of a dataset, then the report on its runs:
#   make cifar10 METHODS="gd rank1" SEEDS=0      part of an experiment; make -n shows its commands
#   make mnist EXTRA="--epochs 5" RUNS=short     more flags for its runs, and another folder for them
#   make fashion DATA=folder                     where the datasets are
# A run's folder is its flags: studies/rank1+lam=100+seed=0. A stopped run goes on, a finished one is not
# repeated. OMP_NUM_THREADS=1 make -j2 .. makes the most of two cores, where networks are small.

PY := .venv/bin/python
comma := ,
METHODS ?= joint finetune replay gd diag-only rank1-only diag rank1
SEEDS ?= 0 1 2
RUNS ?= runs
STUDIES ?= studies
DATA ?= data
DATASET ?= digits
EXTRA ?=
LAMS ?= 100 1000 10000

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9 -]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

demo: .venv/installed  ## rank-1 EWC on 8x8 digits, minutes on a laptop: FID table and pictures in runs/
	$(PY) rank1_ewc.py $(EXTRA)

# Two at once, as each test is content with one core.
PYTEST = $(PY) -m pytest -q -n 2 -W ignore::DeprecationWarning -W ignore::pytest.PytestUnknownMarkWarning test_rank1_ewc.py
test: .venv/installed  ## the tests; test-fast: the formulas alone, without whole runs
	$(PYTEST)
test-fast: .venv/installed
	$(PYTEST) -m "not slow"

bench: .venv/installed  ## the plain way against ours, line by line, to results/bench-<device>.json
	$(PY) -m results.bench $(EXTRA)

growth: .venv/installed  ## what runs of 2, 5 and 10 tasks cost, to results/growth.json
	$(PY) -m results.bench --growth

lint: .venv/installed  ## ruff's checks and format
	.venv/bin/pip install --quiet ruff==0.17.6
	.venv/bin/ruff check --line-length 110 .
	.venv/bin/ruff format --check --line-length 110 .

# The paper's experiments. $(call runs,cifar10,gd) is the folders runs/cifar10/gd+seed=0, .., and the rule below
# makes each: python rank1_ewc.py --dataset cifar10 --method gd --seed 0 --out runs/cifar10/gd+seed=0
runs = $(foreach s,$(SEEDS),$(foreach flags,$(2),$(RUNS)/$(1)/$(flags)+seed=$(s)))

one_run = $(PY) rank1_ewc.py --dataset $(1) --method $(subst =, ,$(subst +, --,$(*F))) --data-dir $(DATA) --out $@ $(EXTRA)
$(RUNS)/%: FORCE | .venv/installed
	$(call one_run,$(*D))
$(STUDIES)/%: FORCE | .venv/installed
	$(call one_run,digits)
FORCE:

digits: $(call runs,digits,$(METHODS))  ## Table 1 on 8x8 digits, small: an hour on two CPU cores
mnist: $(call runs,mnist,$(METHODS))  ## Table 1 on MNIST, as in the paper: a GPU
fashion: $(call runs,fashion,$(METHODS))  ## Table 1 on FashionMNIST, as in the paper: a GPU
cifar10: $(call runs,cifar10,$(METHODS))  ## Table 1 on CIFAR-10, as in the paper: a GPU
imagenet: $(call runs,imagenet32,$(METHODS))  ## Table 1 on ImageNet at 32x32, as in the paper: a GPU
digits mnist fashion cifar10 imagenet:
	$(PY) -m results.report $(RUNS)/$(subst imagenet,imagenet32,$@)

table1 fig4 fig5: .venv/installed  ## Table 1, Figure 4 and Figure 5 of all runs in RUNS
	$(PY) -m results.report $(RUNS)

fashion-small:  ## FashionMNIST (DATA=its folder), small network, one epoch a task: two hours on a CPU
	$(MAKE) fashion METHODS="gd diag rank1" SEEDS=0 RUNS=runs-small EXTRA="--small $(EXTRA)"

MODEL ?= $(RUNS)/$(DATASET)/joint+seed=0
fig1 fig2 fig3: $(MODEL)  ## Figures 1 to 3, to results/, of the run MODEL (joint, of DATASET), trained first
	$(PY) -m results.geometry $(subst fig,,$@) $(MODEL) --data-dir $(DATA)
vae: $(MODEL)  ## the control: is the Fisher of a VAE on the same data of rank 1?
	$(PY) -m results.geometry vae $(MODEL) --data-dir $(DATA)

LEARNED = $(addprefix $(STUDIES)/joint+,epochs=3+seed=0 epochs=27+seed=0 lr=2e-4+lr-decay=none+seed=0)
fig3-training: $(LEARNED)  ## Figure 3 of models that have learned less: does convergence decide what it shows?
	$(foreach run,$^,$(PY) -m results.geometry 3 $(run) --to results/figure3-$(notdir $(run)) &&) true

# Digits in two regimes, five seeds each; and the second's rate and lambda, searched on a seed of its own.
falling:  ## rank-1 EWC against GD at the demo's learning rate, falling to 0: an hour on two CPU cores
	$(MAKE) digits SEEDS="0 1 2 3 4" RUNS=results/falling METHODS="joint gd rank1"
constant:  ## the same at a constant rate, and with an average of the weights: two hours
	$(MAKE) digits SEEDS="0 1 2 3 4" RUNS=results/constant EXTRA="--lr 1e-3 --lr-decay none" \
	METHODS="gd rank1+lam=10 gd+ema=0.99 rank1+lam=10+ema=0.99"
results/search/%: FORCE | .venv/installed
	$(call one_run,digits)
RATES = $(patsubst %,results/search/gd+lr=%+lr-decay=none+seed=100,3e-4 6e-4 1e-3)
LAMBDAS = $(patsubst %,results/search/rank1+lam=%+lr=1e-3+lr-decay=none+seed=100,10 100 1000)
search: $(RATES) $(LAMBDAS)  ## which rate and which lambda at a constant rate, on seed 100
	$(PY) -m results.report $(RATES) --over lr --to results/search/rate
	$(PY) -m results.report $(lastword $(RATES)) $(LAMBDAS) --over lam --to results/search/lambda

movement: $(lastword $(LAMBDAS))  ## how the weights move along mu while the second task is learned
	$(PY) -m results.geometry movement $< --to results/movement-constant

# What the paper leaves open, on digits: runs that differ in one setting, compared over it.
study = $(foreach s,$(SEEDS),$(foreach flags,$(1),$(STUDIES)/$(flags)+seed=$(s)))
known = $(call runs,digits,$(1))

lambda: OVER = lam
lambda: $(call known,gd diag rank1) $(call study,$(foreach l,$(LAMS),rank1+lam=$(l) diag+lam=$(l) rank4+lam=$(l)))
lambda:  ## AFID and forgetting over lambda, from 0 to far too much
rank-k: OVER = method
rank-k: $(call known,gd) $(call study,rank1+lam=1000 rank1-eig+lam=1000 rank2+lam=1000 rank4+lam=1000)
rank-k:  ## mu or F's top eigenvectors, 1, 2, 4 of them
decoupled: OVER = lam
decoupled: $(call known,gd) $(call study,$(foreach l,1000 10000,rank1+lam=$(l) rank1+lam=$(l)+form=proximal))
decoupled:  ## the penalty in the loss against a proximal step after each of Adam's
regime: OVER = lam
regime: $(call study,$(addsuffix +lr=2e-4+lr-decay=none,gd rank1+lam=10 rank1+lam=100))
regime:  ## the method where the gradients have a mean: at the paper's constant learning rate
mu-samples: OVER = fisher_samples
mu-samples: $(call known,gd) $(call study,$(addprefix rank1+lam=1000+fisher-samples=,64 200 1600 4000))
mu-samples:  ## how mu is estimated: from how many samples
mu-timesteps: OVER = fisher_timesteps
mu-timesteps: $(call known,gd) $(call study,rank1+lam=1000 rank1+lam=1000+fisher-timesteps=500$(comma)1000)
mu-timesteps:  ## how mu is estimated: at which timesteps
teacher: OVER = ema
teacher: $(call known,gd) $(call study,gd+ema=0.99 gd+ema=0.999)
teacher:  ## what a task ends with: its last weights, or their average
pool: OVER = replay_per_class
pool: $(call known,gd) $(call study,gd+replay-per-class=10 gd+replay-per-class=50)
pool:  ## how many images the teacher paints of each class
bf16: OVER = bf16
bf16: $(call known,rank1) $(call study,rank1+bf16)
bf16:  ## does training and sampling in bfloat16 change the result?
converged: OVER = epochs
converged: $(call known,gd) $(call study,gd+epochs=540)
converged:  ## twice the epochs for GD: is that baseline trained long enough?
mu: mu-samples mu-timesteps
COMPARED = lambda rank-k decoupled regime mu-samples mu-timesteps teacher pool bf16 converged
$(COMPARED):
	$(PY) -m results.report $^ --over $(OVER) --to results/$@

check-numbers: search  ## the tables of the runs in results/ anew, and those that the READMEs include
	$(PY) -m results.report results/falling/digits results/constant/digits
	$(PY) -m results.report --include README.md results/README.md
	git diff --stat --exit-code -- '*.md' '*.csv'

.PHONY: help demo test test-fast bench lint digits mnist fashion cifar10 imagenet table1 fig1 fig2 fig3 fig4 fig5
.PHONY: fashion-small vae fig3-training movement growth falling constant search mu check-numbers FORCE $(COMPARED)

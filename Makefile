# `make` lists the targets. An experiment runs METHODS x SEEDS on a dataset, then reports on these runs:
#   make cifar10 METHODS="gd rank1" SEEDS=0      part of an experiment; make -n shows its commands
#   make mnist EXTRA="--epochs 5" RUNS=short     more flags for its runs, and another folder for them
#   make fashion DATA=folder                     where the datasets are
# A run's folder is named by its flags: runs/digits/rank1+lam=100+seed=0. A stopped run goes on; one that has a
# result.json is not repeated. For small networks, OMP_NUM_THREADS=1 make -j2 .. makes the most of two cores.

PY := .venv/bin/python
METHODS ?= joint finetune replay gd diag-only rank1-only diag rank1
SEEDS ?= 0 1 2
RUNS ?= runs
DATA ?= data
EXTRA ?=

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9 -]+:.*## / {printf "  make %-28s %s\n", $$1, $$2}' Makefile

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

demo: .venv/installed  ## rank-1 EWC on 8x8 digits, minutes on a laptop: a table of FIDs, pictures in runs/demo
	$(PY) rank1_ewc.py --epochs 90 --out runs/demo $(EXTRA)

# A network for 32x32 images that a CPU can train.
SMALL := --channels 16,32,32,32 --layers-per-block 1 --batch-size 16 --lr 4e-3 --lr-decay linear --lam 10
SMALL += --fisher-samples 4000 --replay-per-class 200 --sample-steps 10 --fid classifier
look: .venv/installed  ## a quick look at FashionMNIST: a small network, 50 images per class, minutes on a CPU
	$(PY) rank1_ewc.py --dataset fashion $(SMALL) --epochs 1 --limit 50 --fisher-samples 100 \
	  --replay-per-class 50 --out runs/look --data-dir $(DATA) $(EXTRA)

# Two processes, as each test uses only one core.
PYTEST = $(PY) -m pytest -q -n 2 -W ignore::DeprecationWarning -W ignore::pytest.PytestUnknownMarkWarning test_rank1_ewc.py
test: .venv/installed  ## the tests; test-fast: the formulas alone, without whole runs
	$(PYTEST)
test-fast: .venv/installed
	$(PYTEST) -m "not slow"

bench: .venv/installed  ## time this code against a plain implementation; growth: what more tasks cost
	$(PY) -m results.bench $(EXTRA)
growth: .venv/installed
	$(PY) -m results.bench --growth

lint: .venv/installed  ## ruff's checks and format
	.venv/bin/pip install --quiet ruff==0.17.6
	.venv/bin/ruff check --line-length 100 .
	.venv/bin/ruff format --check --line-length 100 .

# The paper's experiments: $(call runs,cifar10) is runs/cifar10/gd+seed=0/result.json, .., which the rule below makes:
# python rank1_ewc.py --dataset cifar10 --method gd --seed 0 --out runs/cifar10/gd+seed=0
runs = $(foreach seed,$(SEEDS),$(foreach method,$(METHODS),$(RUNS)/$(1)/$(method)+seed=$(seed)/result.json))
digits: $(call runs,digits)  ## Table 1 on 8x8 digits, small: an hour on two CPU cores
mnist: $(call runs,mnist)  ## Table 1 on MNIST, as in the paper, on a GPU; likewise fashion, cifar10
fashion: $(call runs,fashion)
cifar10: $(call runs,cifar10)
imagenet: $(call runs,imagenet32)  ## Table 1 on ImageNet at 32x32, as in the paper, on a GPU
digits mnist fashion cifar10:
	$(PY) -m results.report $(RUNS)/$@
imagenet:
	$(PY) -m results.report $(RUNS)/imagenet32

flags = $(subst =, ,$(subst +, --,$(1)))# gd+lam=10 becomes gd --lam 10
BEYOND = rank1-eig% rank2% rank4% rank1-low% rank1-middle% rank1-high% rank1-proximal% rank1-shuffled% isotropic%
program = $(PY) $(if $(filter $(BEYOND),$(1))$(filter fashion16,$(2)),-m results.beyond,rank1_ewc.py)
$(RUNS)/%/result.json: | .venv/installed
	$(call program,$(*F),$(*D)) --dataset $(*D) --method $(call flags,$(*F)) --out $(@D) --data-dir $(DATA) $(EXTRA)

table1 fig4 fig5: .venv/installed  ## Table 1, Figure 4 and Figure 5 of all runs in RUNS
	$(PY) -m results.report $(RUNS)

MODEL ?= $(RUNS)/digits/joint+seed=0
fig1 fig2 fig3 vae: $(MODEL)/result.json  ## Figures 1 to 3 of the run MODEL, and the VAE control
	$(PY) -m results.geometry $(subst fig,,$@) $(MODEL) --data-dir $(DATA) --to $(RUNS)/$@

studies:  ## lists the studies of results/; `make NAME` makes a study's missing runs and its table
	@awk '/^# [a-z0-9-]+: / {sub(":", "", $$2); name = $$2; $$1 = $$2 = ""; printf "  make %-20s%s\n", name, $$0}' results/studies.mk
include results/studies.mk

.PHONY: help demo look test test-fast bench growth lint digits mnist fashion cifar10 imagenet
.PHONY: table1 fig1 fig2 fig3 fig4 fig5 vae studies

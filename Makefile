# `make` lists the targets. METHODS="gd rank1" and SEEDS="0 1" narrow an experiment, EXTRA="--epochs 5" adds to its
# runs, RUNS=folder puts them elsewhere, DATA=folder says where the datasets are. A run that was stopped goes on, a
# finished one is not repeated. OMP_NUM_THREADS=1 make -j2 .. makes the most of two cores, where networks are small.

PY := .venv/bin/python
RUN = $(PY) rank1_ewc.py
METHODS ?= joint finetune replay gd diag-only rank1-only diag rank1
SEEDS ?= 0 1 2
RUNS ?= runs
DATA ?= data
EXTRA ?=
LAMS ?= 0 10 100 1000 3000 15000
SWEPT ?= rank1

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

demo: .venv/installed  ## rank-1 EWC on 8x8 digits, minutes on a laptop: FID table and pictures in runs/
	$(RUN) $(EXTRA)

test: .venv/installed  ## the tests
	$(PY) -m pytest -q -W ignore::DeprecationWarning test_rank1_ewc.py

lint: .venv/installed  ## ruff's checks and format
	.venv/bin/pip install --quiet ruff==0.17.6
	.venv/bin/ruff check --line-length 110 .
	.venv/bin/ruff format --check --line-length 110 .

# The paper's experiments: METHODS x SEEDS, a run and a folder each, then the report on them.
runs_of = $(foreach s,$(SEEDS),$(foreach m,$(METHODS),$(RUNS)/$(1)/$(m)-seed$(s)))
EVERY_RUN := $(foreach d,digits mnist fashion cifar10 imagenet32,$(call runs_of,$(d)))

digits: $(call runs_of,digits)  ## Table 1 on 8x8 digits, small: two hours on two CPU cores
mnist: $(call runs_of,mnist)  ## Table 1 on MNIST, as in the paper: a GPU
fashion: $(call runs_of,fashion)  ## Table 1 on FashionMNIST, as in the paper: a GPU
cifar10: $(call runs_of,cifar10)  ## Table 1 on CIFAR-10, as in the paper: a GPU
imagenet: $(call runs_of,imagenet32)  ## Table 1 on ImageNet at 32x32, as in the paper: a GPU
digits mnist fashion cifar10 imagenet:
	$(RUN) --report $(RUNS)/$(subst imagenet,imagenet32,$@)

$(EVERY_RUN): | .venv/installed
	$(RUN) --dataset $(notdir $(@D)) --method $(subst -seed, --seed ,$(@F)) --data-dir $(DATA) --out $@ $(EXTRA)

table1: report  ## Table 1 of all runs in RUNS, as table1.md and table1.csv
fig4: report  ## Figure 4 of all runs in RUNS, as figure4.png
fig5: report  ## Figure 5 of all runs in RUNS, as figure5-<dataset>.png
report: .venv/installed
	$(RUN) --report $(RUNS)

FEW := --channels 16,32,32,32 --layers-per-block 1 --epochs 1 --batch-size 16 --lr 2e-3 --lr-decay linear --dropout 0 \
  --lam 10 --replay-per-class 200 --sample-steps 10 --fisher-samples 4000 --fid classifier
fashion-small:  ## FashionMNIST (DATA=its folder), small network, one epoch, to results/table1: two hours on a CPU
	$(MAKE) fashion METHODS="gd diag rank1" SEEDS=0 RUNS=results/table1 EXTRA="$(FEW) $(EXTRA)"

# What the paper leaves open.
SWEEP := $(foreach m,$(SWEPT),$(foreach l,$(LAMS),sweep/$(m)/$(l)))
sweep: $(SWEEP)  ## lambda from 0 up on digits, on a seed that is not reported, to results/sweep-digits
	$(RUN) --plot-sweep sweep --out results/sweep-digits

$(SWEEP): | .venv/installed
	$(RUN) --method $(notdir $(@D)) --lam $(@F) --seed 100 --out $@ $(EXTRA)

converged: .venv/installed  ## twice the epochs for GD on the sweep's seed: is that baseline trained long enough?
	$(RUN) --method gd --seed 100 --epochs 540 --out results/converged $(EXTRA)

needs: .venv/installed  ## hours and disk of every run on this machine, computed from its speed
	$(RUN) --needs results/needs.json

.PHONY: help demo test lint digits mnist fashion cifar10 imagenet table1 fig4 fig5 report fashion-small sweep
.PHONY: converged needs $(EVERY_RUN) $(SWEEP)

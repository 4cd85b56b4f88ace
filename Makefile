# `make` lists the targets. A run whose result.json is there is not run again: remove its folder to repeat it.
# EXTRA="--epochs 5" adds to any run. OMP_NUM_THREADS=1 make -j2 .. makes the most of two cores.

PY := .venv/bin/python
RUN = $(PY) rank1_ewc.py
SEEDS ?= 0 1 2
METHODS ?= gd diag rank1
LAMS ?= 0 10 100 1000 3000 15000
SWEPT ?= rank1
EXTRA ?=
DATA ?= data

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

digits: $(foreach s,$(SEEDS),$(foreach m,$(METHODS),results/digits/$(m)-seed$(s)/result.json))
digits:  ## METHODS x SEEDS on 8x8 digits, to results/digits

results/digits/%/result.json: | .venv/installed
	$(RUN) --method $(word 1,$(subst -seed, ,$*)) --seed $(word 2,$(subst -seed, ,$*)) --out $(@D) $(EXTRA)

sweep: $(foreach m,$(SWEPT),$(foreach l,$(LAMS),runs/sweep/$(m)-$(l)/result.json))
sweep:  ## lambda from 0 up on digits, on a seed that is not reported, to results/sweep-digits
	$(RUN) --plot-sweep runs/sweep --out results/sweep-digits

runs/sweep/%/result.json: | .venv/installed
	$(RUN) --method $(word 1,$(subst -, ,$*)) --lam $(word 2,$(subst -, ,$*)) --seed 100 --out $(@D) $(EXTRA)

converged: results/converged/result.json
converged:  ## twice the epochs for GD on the sweep's seed: is that baseline trained long enough?

results/converged/result.json: | .venv/installed
	$(RUN) --method gd --seed 100 --epochs 540 --out $(@D) $(EXTRA)

fashion-quick: .venv/installed  ## a quick look at the real FashionMNIST (DATA=its folder): one to two hours
	$(RUN) --dataset fashion --method rank1 --data-dir $(DATA) --channels 32,64 --epochs 1 --limit 200 \
	  --fid classifier --out results/fashion-quick $(EXTRA)

.PHONY: help demo test lint digits sweep converged fashion-quick

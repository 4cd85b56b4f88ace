# `make` lists the targets. Each experiment is resumable: a run whose result.json is there is not run again.
# EXTRA="--epochs 5" adds to any run; `make -j2 ...` runs two at once (OMP_NUM_THREADS=1 shares two cores well).

PY := .venv/bin/python
RUN = $(PY) rank1_ewc.py
SEEDS ?= 0 1 2
METHODS ?= gd diag rank1
LAMS ?= 0 10 100 300 1000 3000 15000 100000
SWEPT ?= rank1
EXTRA ?=

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

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

digits: $(foreach s,$(SEEDS),$(foreach m,$(METHODS),results/digits/$(m)-seed$(s)/result.json))  ## METHODS x SEEDS on digits, to results/digits

results/digits/%/result.json: | .venv/installed
	$(RUN) --method $(word 1,$(subst -seed, ,$*)) --seed $(word 2,$(subst -seed, ,$*)) --out $(@D) $(EXTRA)

sweep: $(foreach m,$(SWEPT),$(foreach l,$(LAMS),runs/sweep/$(m)-$(l)/result.json))  ## lambda from 0 up on digits, on a seed not reported, to results/sweep
	$(RUN) --plot-sweep runs/sweep --out results/sweep-digits

runs/sweep/%/result.json: | .venv/installed
	$(RUN) --method $(word 1,$(subst -, ,$*)) --lam $(word 2,$(subst -, ,$*)) --seed 100 --out $(@D) $(EXTRA)

fashion-quick: .venv/installed  ## a small look at the real FashionMNIST (DATA=folder): about an hour on two cores
	$(RUN) --dataset fashion --method rank1 --data-dir $(DATA) --channels 32,64 --epochs 1 --limit 200 \
	  --fid classifier --out results/fashion-quick $(EXTRA)
DATA ?= data

.PHONY: help demo test lint digits sweep fashion-quick

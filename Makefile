# `make` lists the targets. An experiment is METHODS x SEEDS of a dataset, then the report on its runs:
#   make cifar10 METHODS="gd rank1" SEEDS=0      part of an experiment; make -n shows its commands
#   make mnist EXTRA="--epochs 5" RUNS=short     more flags for its runs, and another folder for them
#   make fashion DATA=folder                     where the datasets are
# A run's folder is its flags: runs/digits/rank1+lam=100+seed=0. A stopped run goes on, a finished one is not
# repeated. OMP_NUM_THREADS=1 make -j2 .. makes the most of two cores, where networks are small.
#   make lambda              what the notebook shows, results/README.md: make runs only what is missing there

PY := .venv/bin/python
METHODS ?= joint finetune replay gd diag-only rank1-only diag rank1
SEEDS ?= 0 1 2
RUNS ?= runs
DATA ?= data
DATASET ?= digits
EXTRA ?=
comma := ,

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9 -]+:.*## / {printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

demo: .venv/installed  ## rank-1 EWC on 8x8 digits, a few minutes on a laptop: a table of FIDs, pictures in runs/demo
	$(PY) rank1_ewc.py --epochs 90 --out runs/demo $(EXTRA)

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

# (Older runs have --form and --fisher-timesteps in their names, which are methods of results/beyond.py now.)
BEYOND = rank1-eig+% rank2+% rank4+% rank1-low+% rank1-middle+% rank1-high+% rank1-proximal+%
program = $(if $(filter $(BEYOND),$(*F)),-m results.beyond,rank1_ewc.py)
one_run = $(PY) $(program) --dataset $(1) $(REGIME) --method $(subst =, ,$(subst +, --,$(*F))) --out
$(RUNS)/%: FORCE | .venv/installed
	$(call one_run,$(*D)) $@ --data-dir $(DATA) $(EXTRA)
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

MODEL ?= $(RUNS)/$(DATASET)/joint+seed=0
fig1 fig2 fig3: $(MODEL)  ## Figures 1 to 3, to results/, of the run MODEL (joint, of DATASET), trained first
	$(PY) -m results.geometry $(subst fig,,$@) $(MODEL) --data-dir $(DATA)
vae: $(MODEL)  ## the control: is the Fisher of a VAE on the same data of rank 1?
	$(PY) -m results.geometry vae $(MODEL) --data-dir $(DATA)

# What the notebook shows: of digits in two regimes, the demo's learning rate, falling to 0, and a constant one; and
# of FashionMNIST with a small network.
results/constant/%: REGIME = --lr 1e-3 --lr-decay none
results/fashion/%: REGIME = --small --epochs 2 --data-dir $(DATA)
results/long/%: REGIME = --tasks 10 --epochs 810
results/%: OF = digits
results/fashion/%: OF = fashion
results/%/result.json: | .venv/installed
	$(call one_run,$(OF)) $(@D)
.PRECIOUS: results/%/model.pt
results/%/model.pt: | .venv/installed
	$(call one_run,$(OF)) $(@D) --fresh
some = $(foreach s,$(1),$(foreach flags,$(3),results/$(2)/$(flags)+seed=$(s)/result.json))
five = $(call some,0 1 2 3 4,$(1),$(2))

TABLE1 = joint finetune replay gd diag-only+lam=10000 rank1-only+lam=10000 diag rank1
falling: $(call five,falling/digits,$(TABLE1))  ## Table 1 on digits at a learning rate that falls to 0
constant: $(call five,constant/digits,gd rank1+lam=10 gd+ema=0.99 rank1+lam=10+ema=0.99)
constant:  ## rank-1 EWC against GD at a constant learning rate, with and without an average of the weights
falling constant:
	$(PY) -m results.report results/$@/digits

SEARCH = $(call some,100 101,constant/search,$(1))
search-rate: OVER = lr
search-rate: $(call SEARCH,gd+lr=3e-4 gd+lr=6e-4 gd)  ## which constant learning rate, on seeds 100 and 101
search-lambda: OVER = curvature
search-lambda: $(call SEARCH,gd $(addprefix rank1+lam=,10 100 1000) $(addprefix diag+lam=,1 10 100 1000))
search-lambda:  ## which lambda at a constant rate, rank-1 and diagonal, on seeds 100 and 101
SEARCHED = gd $(addprefix rank1+lam=,1 10 100 1000 10000) $(addprefix diag+lam=,1 10 100)
SEARCHED += $(addprefix rank1+form=proximal+lam=,10 1000 100000)
search-falling: OVER = curvature
search-falling: $(call some,100 101,falling/search,$(SEARCHED))
search-falling:  ## which lambda at the falling rate, in both forms, on seeds 100 and 101
search-alone: OVER = lam
ALONE = $(foreach lam,10 1000 10000 100000,rank1-only+lam=$(lam) diag-only+lam=$(lam))
search-alone: $(call some,100,falling/search,$(ALONE))  ## which lambda for EWC without GD, on seed 100
FRESH = $(call some,5 6 7 8 9,$(1),$(2))
confirm confirm-constant ten-seeds ten-seeds-constant nine-seeds-constant: OVER = lam
confirm: $(call FRESH,falling/confirm,gd rank1)
confirm:  ## rank-1 EWC against GD at the falling rate again, on five seeds that chose nothing
ten-seeds: $(call FRESH,falling/confirm,gd rank1) $(call five,falling/digits,gd rank1)
ten-seeds:  ## the same on those five seeds and the first five together
CONFIRMED = $(call FRESH,constant/confirm,gd rank1+lam=10 rank1+lam=100)
confirm-constant: $(CONFIRMED)
ten-seeds-constant: $(CONFIRMED) $(call five,constant/digits,gd rank1+lam=10) $(call five,constant/studies,rank1+lam=100)
nine-seeds-constant: $(call five,constant/digits,gd rank1+lam=10)
nine-seeds-constant: $(call some,5 7 8 9,constant/confirm,gd rank1+lam=10)
confirm-constant:  ## rank-1 EWC against GD at the constant rate again, on five seeds that chose nothing
ten-seeds-constant:  ## the same on those five seeds and the first five together
nine-seeds-constant:  ## the same without seed 6, which ended far from the others: how much hangs on it
lambda-falling: OVER = curvature
lambda-falling: $(call five,falling/digits,gd rank1 diag)
lambda-falling: $(call five,falling/studies,rank1+lam=1 rank1+lam=100 diag+lam=1)
lambda-falling: $(call five,falling/studies,rank1+form=proximal $(addprefix rank1+form=proximal+lam=,1000 100000))
lambda-falling:  ## both EWCs against GD over lambda, and rank-1 as a proximal step, at the falling rate
replay-steps: OVER = replay_steps
replay-steps: $(call five,falling/digits,gd) $(call five,falling/studies,$(addprefix gd+replay-steps=,2 5 10))
replay-steps:  ## GD with a replay pool generated in fewer DDIM steps than 20
replay-pool: OVER = replay_per_class
replay-pool: $(call five,falling/digits,gd) $(call five,falling/studies,$(addprefix gd+replay-per-class=,10 50))
replay-pool:  ## GD with a replay pool of fewer images than 200 a class
small-pool: OVER = curvature
small-pool: $(call five,falling/studies,$(addsuffix +replay-per-class=10,gd $(addprefix rank1+lam=,10 100 1000)))
small-pool: $(call five,falling/studies,rank4+lam=25+replay-per-class=10)
small-pool:  ## rank-1 EWC against GD over lambda where GD forgets: with a replay pool of 10 images a class
lambda: OVER = curvature
lambda: $(call five,constant/digits,gd rank1+lam=10) $(call five,constant/studies,rank1+lam=100 rank1+lam=1000)
lambda:  ## rank-1 EWC against GD over lambda at the constant rate
AVERAGED = $(call five,constant/digits,gd+ema=0.99 rank1+lam=10+ema=0.99)
AVERAGED += $(call five,constant/studies,rank1+lam=100+ema=0.99 rank1+lam=1000+ema=0.99)
lambda-ema: OVER = curvature
lambda-ema: $(AVERAGED)  ## rank-1 EWC against GD over lambda at the constant rate, with an average of the weights
average confirm-ema ten-seeds-ema: OVER = ema
confirm-ema: $(call FRESH,constant/confirm,gd gd+ema=0.99)
confirm-ema:  ## GD with an average of the weights against GD without, on five seeds that chose nothing
ten-seeds-ema: $(call FRESH,constant/confirm,gd gd+ema=0.99) $(call five,constant/digits,gd gd+ema=0.99)
ten-seeds-ema:  ## the same on those five seeds and the first five together
average: $(call FRESH,falling/confirm,gd) $(call FRESH,constant/confirm,gd+ema=0.99)
average: $(call five,falling/digits,gd) $(call five,constant/digits,gd+ema=0.99)
average:  ## GD with the average at a constant rate, against GD at the falling one, on all ten seeds
PARTS = $(patsubst %,lam=%+fisher-timesteps=0$(comma)333,25 250)
PARTS += $(patsubst %,lam=%+fisher-timesteps=333$(comma)667,300 3000)
PARTS += $(patsubst %,lam=%+fisher-timesteps=667$(comma)1000,800 8000)
timesteps: OVER = curvature
timesteps: $(AVERAGED) $(call five,constant/studies,$(patsubst %,rank1+%+ema=0.99,$(PARTS)))
timesteps:  ## mu of the low, the middle and the high timesteps alone, at equal curvatures
OTHERS = $(addsuffix +ema=0.99,rank1-eig+lam=25 rank1-eig+lam=250 rank2+lam=250 rank4+lam=25 rank4+lam=250)
OTHERS += $(addsuffix +ema=0.99,diag+lam=1 diag+lam=10)
directions: OVER = curvature
directions: $(AVERAGED) $(call five,constant/studies,$(OTHERS))  ## F's top eigenvectors and its diagonal, against mu
confirm-rank4 ten-seeds-rank4: OVER = lam
CONFIRMED_4 = $(call FRESH,constant/confirm,gd+ema=0.99 rank4+lam=25+ema=0.99)
confirm-rank4: $(CONFIRMED_4)
ten-seeds-rank4: $(CONFIRMED_4) $(call five,constant/digits,gd+ema=0.99) $(call five,constant/studies,rank4+lam=25+ema=0.99)
confirm-rank4:  ## F's four top eigenvectors against GD again, on five seeds that chose nothing
ten-seeds-rank4:  ## the same on those five seeds and the first five together
rank4-falling: OVER = lam
rank4-falling: $(call five,falling/digits,gd) $(call five,falling/studies,rank4+lam=25)
rank4-falling:  ## F's four top eigenvectors against GD at the falling rate
against-mu against-mu-tenth: OVER = lam
AT = $(call five,constant/studies,$(addsuffix +ema=0.99,$(1)))
against-mu: $(call AT,rank1-eig+lam=250 rank2+lam=250 rank4+lam=250) | $(call AT,rank1+lam=1000)
against-mu:  ## F's top eigenvectors compared with mu itself, seed by seed, at the larger curvature
against-mu-tenth: $(call AT,rank1-eig+lam=25 rank4+lam=25) | $(call AT,rank1+lam=100)
against-mu-tenth:  ## the same at a tenth of it
binds: OVER = lam
BOUND = $(addsuffix +ema=0.99,rank1+lam=0 rank1+lam=1000 rank1-eig+lam=0 rank1-eig+lam=250)
binds: $(call some,0 1,constant/studies,$(BOUND))
binds:  ## how far the weights move along mu and the top eigenvector, without the penalty and with it
long-pilot: OVER = replay_per_class
long-pilot: $(call some,200 201,long/pilot,$(addprefix gd+replay-per-class=,200 50 20))
long-lambda: OVER = lam
LONG = $(addsuffix +replay-per-class=50,gd $(addprefix rank1+lam=,10 100 300))
long-lambda: $(call some,200 201,long/pilot,$(LONG))  ## which lambda there, of the pool that passed the gate
long-pilot:  ## ten tasks of one class: where does GD forget? seeds 200 and 201
search-fashion: OVER = curvature
search-fashion: $(call some,100,fashion/search,$(addsuffix +epochs=1,gd $(addprefix rank1+lam=,10 100 1000 10000)))
search-fashion:  ## which lambda on FashionMNIST (DATA=its folder), a small network, at half the length
FASHION = $(call some,0 1 2,fashion/$(1),$(2))
fashion-small: $(call FASHION,small,gd rank1+lam=1000)
fashion-small:  ## rank-1 EWC (lambda 1000) against GD on FashionMNIST: an hour of one core a run
	$(PY) -m results.report results/fashion/small
	$(PY) -m results.report $(^D) --over lam --to results/$@
average-fashion: OVER = ema
average-fashion: $(call FASHION,small,gd) $(call FASHION,average,gd+lr=2e-3+lr-decay=none+ema=0.99)
average-fashion:  ## GD with the average at a constant rate on FashionMNIST, against GD at the falling one
COMPARED = search-rate search-lambda search-falling search-alone confirm ten-seeds confirm-constant
COMPARED += ten-seeds-constant nine-seeds-constant lambda-falling replay-steps replay-pool small-pool lambda
COMPARED += lambda-ema confirm-ema ten-seeds-ema average timesteps directions against-mu against-mu-tenth
COMPARED += confirm-rank4 ten-seeds-rank4 rank4-falling binds search-fashion average-fashion long-pilot
TO_RUN = long-lambda
$(COMPARED) $(TO_RUN):
	$(PY) -m results.report $(^D) --over $(OVER) $(if $|,--against $(dir $|)) --to results/$@

JOINT = joint+seed=0/model.pt
fisher: $(addprefix results/falling/figure,1.json 2.json 3.json)
fisher: $(addprefix results/constant/figure,1.json 2.json 3.json vae.json)
fisher:  ## Figures 1 to 3 and the VAE, of a model of all digits at each rate
results/falling/figure%.json: results/falling/joint/$(JOINT)
	$(PY) -m results.geometry $* $(<D) --to $(@:.json=)
results/constant/figure%.json: results/constant/joint/$(JOINT)
	$(PY) -m results.geometry $* $(<D) --to $(@:.json=)

fisher-fashion: .venv/installed  ## Figure 3 of the authors' small network, on FashionMNIST's first task: a GPU
	$(PY) -m results.geometry 3 --first-task "$(AUTHORS_SMALL)" --data-dir $(DATA)
AUTHORS_SMALL = --dataset fashion --channels 16 --layers-per-block 1 --epochs 100 --method gd

movement: .venv/installed  ## how the weights move along mu while the second task is learned
	$(PY) -m results.geometry $@ --first-task "--lr 1e-3 --lr-decay none --lam 1000 --seed 100" --to results/$@

check-numbers: falling constant fashion-small $(COMPARED)
check-numbers:  ## the tables of the runs in results/ anew, and in the READMEs
	$(PY) -m results.report --include README.md results/README.md
	git diff --stat --exit-code -- '*.md' '*.csv'

.PHONY: help demo test test-fast bench growth lint digits mnist fashion cifar10 imagenet fashion-small table1
.PHONY: fig1 fig2 fig3 fig4 fig5 vae movement fisher fisher-fashion falling constant check-numbers FORCE
.PHONY: $(COMPARED) $(TO_RUN)

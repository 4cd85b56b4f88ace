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
LAMS ?= 100 1000 10000
DATASET ?= digits
STUDIES ?= studies

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9 -]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@

demo: .venv/installed  ## rank-1 EWC on 8x8 digits, minutes on a laptop: FID table and pictures in runs/
	$(RUN) $(EXTRA)

test: .venv/installed  ## the tests
	$(PY) -m pytest -q -W ignore::DeprecationWarning test_rank1_ewc.py

bench: .venv/installed  ## the plain way against ours, line by line, to results/bench-<device>.json: 20 minutes on a CPU
	$(PY) test_rank1_ewc.py

lint: .venv/installed  ## ruff's checks and format
	.venv/bin/pip install --quiet ruff==0.17.6
	.venv/bin/ruff check --line-length 110 .
	.venv/bin/ruff format --check --line-length 110 .

# The paper's experiments: METHODS x SEEDS, a run and a folder each, then the report on them.
runs_of = $(foreach s,$(SEEDS),$(foreach m,$(METHODS),$(RUNS)/$(1)/$(m)-seed$(s)))
EVERY_RUN := $(foreach d,digits mnist fashion cifar10 imagenet32,$(call runs_of,$(d)))
EVERY_RUN += $(filter-out $(EVERY_RUN),$(foreach m,gd diag rank1,$(foreach s,$(SEEDS),$(RUNS)/digits/$(m)-seed$(s))))

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

fashion-small:  ## FashionMNIST (DATA=its folder), small network, one epoch, to results/table1: two hours on a CPU
	$(MAKE) fashion METHODS="gd diag rank1" SEEDS=0 RUNS=results/table1 EXTRA="--small $(EXTRA)"

fig1 fig2 fig3: .venv/installed  ## Figures 1 to 3, to results/, of a small model of DATASET (digits), trained first
	$(RUN) --figure $(subst fig,,$@) --dataset $(DATASET) --data-dir $(DATA) $(EXTRA)

vae: .venv/installed  ## the control: is the Fisher of a VAE on the same data of rank 1?
	$(RUN) --figure vae --dataset $(DATASET) --data-dir $(DATA) $(EXTRA)

# What the paper leaves open, on digits. A run's folder is its flags: rank1+lam=10+seed=0.
study = $(foreach flags,$(1),$(foreach s,$(SEEDS),$(STUDIES)/$(flags)+seed=$(s)))
known = $(foreach m,$(1),$(foreach s,$(SEEDS),$(RUNS)/digits/$(m)-seed$(s)))

# Folders of one seed, of the same model trained for less long, and as the paper trains.
LEARNED = $(foreach f,+epochs=3 +epochs=27 +lr=2e-4+lr-decay=none,$(STUDIES)/joint$(f)+seed=0)
fig3-training: $(LEARNED)  ## Figure 3 of models that have learned less: does convergence decide what it shows?
	$(foreach d,$^,$(RUN) --figure 3 --out $(d) --to results/figure3-$(notdir $(d)) &&) true

lambda: $(call known,gd diag rank1) $(call study,$(foreach l,$(LAMS),$(foreach m,rank1 diag rank4,$(m)+lam=$(l))))
lambda:  ## AFID and forgetting over lambda, from 0 to far too much
	$(RUN) --compare $^ --over lam --to results/lambda

rank-k: $(call known,gd) $(call study,$(addsuffix +lam=1000,rank1 rank1-eig rank2 rank4 rank8))
rank-k:  ## mu or F's top eigenvectors, 1, 2, 4, 8 of them
	$(RUN) --compare $^ --over method --to results/rank-k

decoupled: $(call known,gd) $(call study,$(foreach l,1000 10000,rank1+lam=$(l) rank1+lam=$(l)+form=proximal))
decoupled:  ## the penalty in the loss against a proximal step after each of Adam's
	$(RUN) --compare $^ --over lam --to results/decoupled

regime: $(call study,$(addsuffix +lr=2e-4+lr-decay=none,gd rank1+lam=10 rank1+lam=100))
regime:  ## the method where the gradients have a mean: at the paper's constant learning rate
	$(RUN) --compare $^ --over lam --to results/regime

mu: mu-samples mu-timesteps  ## how mu is estimated: from how many samples, and of which timesteps
mu-samples: $(call known,gd) $(call study,$(addprefix rank1+lam=1000+fisher-samples=,64 200 1600) rank1+lam=1000)
	$(RUN) --compare $^ --over fisher_samples --to results/mu-samples
mu-timesteps: $(call known,gd) $(call study,rank1+lam=1000 rank1+lam=1000+fisher-from=500)
	$(RUN) --compare $^ --over fisher_from --to results/mu-timesteps

teacher: $(call known,gd) $(call study,gd+ema=0.99 gd+ema=0.999)
teacher:  ## the teacher: the last weights, or their average
	$(RUN) --compare $^ --over ema --to results/teacher

pool: $(call known,gd) $(call study,gd+replay-per-class=10 gd+replay-per-class=50 rank1+lam=100+replay-per-class=10 rank1+lam=100)
pool:  ## how many images the teacher paints of each class
	$(RUN) --compare $^ --over replay_per_class --to results/pool

bf16: $(call known,rank1) $(call study,rank1+bf16)
bf16:  ## does training and sampling in bfloat16 change the result?
	$(RUN) --compare $^ --over bf16 --to results/bf16

OTHER = gd$(1) rank1$(1)+lam=1000 rank1$(1)+curvature=300
FASHION = $(foreach flags,$(call OTHER,+dataset=fashion+small),$(STUDIES)/$(flags)+seed=$(firstword $(SEEDS)))
SIZES = $(call known,gd) $(call study,$(foreach l,$(LAMS),rank1+lam=$(l)) rank1+curvature=300 $(call OTHER,+channels=8$(comma)16))
comma := ,
curvature: $(SIZES) $(FASHION)
	$(RUN) --compare $^ --over lam --to results/transfer-lambda
	$(RUN) --compare $^ --over curvature --to results/transfer-curvature
curvature:  ## does lambda, or the curvature it adds, carry over to another size and to FashionMNIST (DATA=folder)?

$(STUDIES)/%: FORCE | .venv/installed
	$(RUN) --method $(subst =, ,$(subst +, --,$*)) --data-dir $(DATA) --out $@ $(EXTRA)
FORCE:

converged: .venv/installed  ## twice the epochs for GD, on a seed of its own: is that baseline trained long enough?
	$(RUN) --method gd --seed 100 --epochs 540 --out results/converged $(EXTRA)

needs: .venv/installed  ## hours and disk of every run on this machine, computed from its speed
	$(RUN) --needs results/needs.json

.PHONY: help demo test bench lint digits mnist fashion cifar10 imagenet table1 fig4 fig5 report fashion-small fig1 fig2 fig3 vae
.PHONY: fig3-training lambda rank-k decoupled regime mu mu-samples mu-timesteps teacher pool bf16 curvature converged needs $(EVERY_RUN)

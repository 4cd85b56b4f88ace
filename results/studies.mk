# The studies of results/. `make studies` lists them; `make lambda` makes the missing runs of the study lambda, and
# its table. A run's folder is named by its setting and its flags: results/runs/constant/rank1+lam=10+seed=0.
# (Runs with form or fisher-timesteps in their names are older: these methods are now rank1-proximal, rank1-low,
# rank1-middle and rank1-high in results/beyond.py, and the runs cannot be repeated under the old names.)

falling = --dataset digits
constant = --dataset digits --lr 1e-3 --lr-decay none
fashion = --dataset fashion $(SMALL) --epochs 2 --data-dir $(DATA)
stiff = $(constant)
long = --dataset digits --tasks 10 --epochs 810
orders = $(long) --replay-per-class 50 --class-order random
fashion16 = --dataset fashion16 --data-dir $(DATA)
exercises = --epochs 90
results/runs/%/result.json: | .venv/installed
	$(call program,$(*F),$(firstword $(subst /, ,$*))) $($(firstword $(subst /, ,$*))) --method $(call flags,$(*F)) --out $(@D)
.PRECIOUS: results/runs/%/model.pt
results/runs/%/model.pt: | .venv/installed
	$(call program,$(*F),$(firstword $(subst /, ,$*))) $($(firstword $(subst /, ,$*))) --method $(call flags,$(*F)) --out $(@D) --fresh

# $(call study,name,page,over,seeds,runs,against,together): a run is taken with all seeds unless its name has a seed;
# without `over` the report is a Table 1; `together`: the number of comparisons (Bonferroni). CHECK=1: no run is made.
results = $(foreach run,$(2),$(if $(findstring +seed=,$(run)),$(run),$(1:%=$(run)+seed=%)))
define rule
runs-$(1) := $(addprefix results/runs/,$(call results,$(4),$(5)))
against-$(1) := $(addprefix results/runs/,$(call results,$(4),$(6)))
$(1): $(if $(CHECK),,$$(addsuffix /result.json,$$(runs-$(1)) $$(against-$(1)))) | .venv/installed
	$$(PY) -m results.report $$(runs-$(1)) $(if $(6),--against $$(against-$(1))) $(7:%=--together %) \
	  $(if $(3),--over $(3) --to results/pages/$(2)/$(1),--to results/pages/$(2))
endef
study = $(eval $(rule))
FIVE := 0 1 2 3 4
NEW := 5 6 7 8 9
TEN := $(FIVE) $(NEW)

# falling: Table 1 on digits at a learning rate that falls to 0
$(call study,falling,falling,,$(FIVE),$(addprefix falling/,joint finetune replay gd) \
  $(addprefix falling/,diag-only+lam=10000 rank1-only+lam=10000 diag rank1))
# forgetting: the README's first picture, of samples after each task
forgetting: .venv/installed
	$(PY) -m results.report $(patsubst %,results/runs/falling/%+seed=0,finetune gd rank1 joint) \
	  --rows finetune,gd,rank1,joint --to results/pages/falling/$@.png
# search-falling: which lambda at the falling rate, rank-1 (two forms) and diagonal, on seeds 100 and 101
$(call study,search-falling,falling,curvature,100 101,falling/gd $(addprefix falling/diag+lam=,1 10 100) \
  $(addprefix falling/rank1+lam=,1 10 100 1000 10000) $(addprefix falling/rank1+form=proximal+lam=,10 1000 100000))
# search-alone: which lambda for EWC without GD, on seed 100
$(call study,search-alone,falling,lam,100,$(addprefix falling/rank1-only+lam=,10 1000 10000 100000) \
  $(addprefix falling/diag-only+lam=,10 1000 10000 100000))
# confirm: rank-1 EWC against GD at the falling rate again, on five new seeds
$(call study,confirm,falling,lam,$(NEW),falling/gd falling/rank1)
# ten-seeds: the same on those five seeds and the first five together
$(call study,ten-seeds,falling,lam,$(TEN),falling/gd falling/rank1)
# seven-seeds: the same on all seeds except the first five, on which lambda was varied
$(call study,seven-seeds,falling,lam,$(NEW),falling/gd falling/rank1 \
  $(addprefix falling/gd+seed=,100 101) $(addprefix falling/rank1+lam=10+seed=,100 101))
# lambda-falling: both EWCs against GD over lambda, and rank-1 as a proximal step, at the falling rate
$(call study,lambda-falling,falling,curvature,$(FIVE),$(addprefix falling/,gd rank1+lam=1 rank1 rank1+lam=100) \
  $(addprefix falling/,diag+lam=1 diag rank1+form=proximal rank1+form=proximal+lam=1000 rank1+form=proximal+lam=100000))

# constant: Table 1 on digits at a constant learning rate, with and without an average of the weights
$(call study,constant,constant,,$(FIVE),$(addprefix constant/,gd rank1+lam=10 gd+ema=0.99 rank1+lam=10+ema=0.99))
# search-rate: which constant learning rate, on seeds 100 and 101
$(call study,search-rate,constant,lr,100 101,constant/gd+lr=3e-4 constant/gd+lr=6e-4 constant/gd)
# search-lambda: which lambda at a constant rate, rank-1 and diagonal, on seeds 100 and 101
$(call study,search-lambda,constant,curvature,100 101,constant/gd \
  $(addprefix constant/rank1+lam=,10 100 1000) $(addprefix constant/diag+lam=,1 10 100 1000))
# confirm-constant: rank-1 EWC against GD at the constant rate again, on five new seeds
$(call study,confirm-constant,constant,lam,$(NEW),$(addprefix constant/,gd rank1+lam=10 rank1+lam=100))
# ten-seeds-constant: the same on those five seeds and the first five together
$(call study,ten-seeds-constant,constant,lam,$(TEN),$(addprefix constant/,gd rank1+lam=10 rank1+lam=100))
# nine-seeds-constant: the same without seed 6, which ended far from the others: how much depends on it
$(call study,nine-seeds-constant,constant,lam,0 1 2 3 4 5 7 8 9,constant/gd constant/rank1+lam=10)
# lambda: rank-1 EWC against GD over lambda at the constant rate
$(call study,lambda,constant,curvature,$(FIVE),$(addprefix constant/,gd rank1+lam=10 rank1+lam=100 rank1+lam=1000))
# stiff: rank-1 EWC at lambda 1000 against GD at the constant rate, on ten new seeds
$(call study,stiff,constant,lam,5 6 7 8 9 10 11 12 13 14,stiff/gd stiff/rank1+lam=1000)
# stiff-fifteen: the same on these and the first five seeds together
$(call study,stiff-fifteen,constant,lam,$(FIVE),constant/gd constant/rank1+lam=1000 \
  $(foreach s,5 6 7 8 9 10 11 12 13 14,stiff/gd+seed=$(s) stiff/rank1+lam=1000+seed=$(s)))

# lambda-ema: rank-1 EWC against GD over lambda at the constant rate, with an average of the weights
AVERAGED := $(patsubst %,constant/%+ema=0.99,gd rank1+lam=10 rank1+lam=100 rank1+lam=1000)
$(call study,lambda-ema,average,curvature,$(FIVE),$(AVERAGED))
# confirm-ema: GD with an average of the weights against GD without, on five new seeds
$(call study,confirm-ema,average,ema,$(NEW),constant/gd constant/gd+ema=0.99)
# ten-seeds-ema: the same on those five seeds and the first five together
$(call study,ten-seeds-ema,average,ema,$(TEN),constant/gd constant/gd+ema=0.99)
# average: GD with the average at a constant rate, against GD at the falling one, on all ten seeds
$(call study,average,average,ema,$(TEN),falling/gd constant/gd+ema=0.99)

# directions: F's top eigenvectors and its diagonal in mu's place, against GD, with an average of the weights
$(call study,directions,directions,curvature,$(FIVE),$(AVERAGED) $(patsubst %,constant/%+ema=0.99,diag+lam=1 diag+lam=10 \
  rank1-eig+lam=25 rank1-eig+lam=250 rank2+lam=250 rank4+lam=25 rank4+lam=250))
# against-mu: F's top eigenvectors compared with mu itself, seed by seed, at the larger curvature
$(call study,against-mu,directions,lam,$(FIVE),\
  $(patsubst %,constant/%+lam=250+ema=0.99,rank1-eig rank2 rank4),constant/rank1+lam=1000+ema=0.99)
# against-mu-tenth: the same at a tenth of that curvature
$(call study,against-mu-tenth,directions,lam,$(FIVE),\
  $(patsubst %,constant/%+lam=25+ema=0.99,rank1-eig rank4),constant/rank1+lam=100+ema=0.99)
# confirm-rank4: F's four top eigenvectors against GD again, on five new seeds
$(call study,confirm-rank4,directions,lam,$(NEW),constant/gd+ema=0.99 constant/rank4+lam=25+ema=0.99)
# ten-seeds-rank4: the same on those five seeds and the first five together
$(call study,ten-seeds-rank4,directions,lam,$(TEN),constant/gd+ema=0.99 constant/rank4+lam=25+ema=0.99)
# rank4-falling: F's four top eigenvectors against GD at the falling rate
$(call study,rank4-falling,directions,lam,$(FIVE),falling/gd falling/rank4+lam=25)
# binds: how far the weights move along mu and the top eigenvector, without the penalty and with it
$(call study,binds,directions,lam,0 1,\
  $(patsubst %,constant/%+ema=0.99,rank1+lam=0 rank1+lam=1000 rank1-eig+lam=0 rank1-eig+lam=250))
# timesteps: mu of the low, the middle and the high timesteps alone, at equal curvatures
comma := ,
PARTS := lam=25+fisher-timesteps=0$(comma)333 lam=250+fisher-timesteps=0$(comma)333
PARTS += lam=300+fisher-timesteps=333$(comma)667 lam=3000+fisher-timesteps=333$(comma)667
PARTS += lam=800+fisher-timesteps=667$(comma)1000 lam=8000+fisher-timesteps=667$(comma)1000
$(call study,timesteps,timesteps,curvature,$(FIVE),$(AVERAGED) $(PARTS:%=constant/rank1+%+ema=0.99))

# replay-steps: GD with a replay pool generated in fewer DDIM steps than 20
$(call study,replay-steps,replay,replay_steps,$(FIVE),falling/gd $(addprefix falling/gd+replay-steps=,2 5 10))
# replay-pool: GD with a replay pool of fewer images than 200 per class
$(call study,replay-pool,replay,replay_per_class,$(FIVE),falling/gd $(addprefix falling/gd+replay-per-class=,10 50))
# small-pool: rank-1 EWC against GD over lambda where GD forgets: with a replay pool of 10 images per class
$(call study,small-pool,replay,curvature,$(FIVE),\
  $(patsubst %,falling/%+replay-per-class=10,gd rank1+lam=10 rank1+lam=100 rank1+lam=1000 rank4+lam=25))

# long-pilot: ten tasks of one class: with how many replay images GD forgets, on seeds 200 and 201
$(call study,long-pilot,long-chain,replay_per_class,200 201,$(addprefix long/gd+replay-per-class=,200 50 20))
# long-lambda: which lambda there, with 50 replay images per class, on the same seeds
$(call study,long-lambda,long-chain,lam,200 201,\
  $(patsubst %,long/%+replay-per-class=50,gd rank1+lam=10 rank1+lam=100 rank1+lam=300))
# long-diagonal: which lambda of the diagonal there, on the same seeds
$(call study,long-diagonal,long-chain,lam,200 201,\
  $(patsubst %,long/%+replay-per-class=50,gd diag+lam=1 diag+lam=10))
LONG := 210 211 212 213 214 215 216 217 218 219
# long-test: rank-1 EWC and the diagonal against GD there, each at the chosen lambda, on ten new seeds
$(call study,long-test,long-chain,lam,$(LONG),$(patsubst %,long/%+replay-per-class=50,gd rank1+lam=300 diag+lam=10))
# long-rank1: the same with rank-1 EWC against the diagonal, seed by seed
$(call study,long-rank1,long-chain,lam,$(LONG),long/rank1+lam=300+replay-per-class=50,long/diag+lam=10+replay-per-class=50)
# long-chain: Table 1 of these runs, and their AFID along the chain
$(call study,long-chain,long-chain,,$(LONG),$(patsubst %,long/%+replay-per-class=50,gd rank1+lam=300 diag+lam=10))
# All runs of orders and fashion16 are made with commit 448216d: make them in a worktree of it, then copy them here.
# orders-pilot: the long chain with the classes in random orders: which strength of each brake, on seeds 200 and 201
$(call study,orders-pilot,long-chain,lam,200 201,$(addprefix orders/,gd rank1+lam=0 rank1+lam=100 rank1+lam=300 \
  rank1+lam=1000 isotropic+lam=1 isotropic+lam=10 isotropic+lam=100 rank1-shuffled+lam=0 rank1-shuffled+lam=300))
# orders-rate: whether smaller steps alone help there: GD over the learning rate, on the same seeds
$(call study,orders-rate,long-chain,lr,200 201,$(addprefix orders/,gd gd+lr=1e-3 gd+lr=2e-3 gd+lr=8e-3))
# orders-proximal: at which strength the proximal step's drift is nearest to rank-1's there, on the same seeds
$(call study,orders-proximal,long-chain,lam,200 201,$(addprefix orders/,gd rank1-proximal+lam=1e4 \
  rank1-proximal+lam=1e5 rank1-proximal+lam=1e6 rank1-proximal+lam=1e7))
# orders-test: each brake against GD there, on sixteen new seeds
ORDERS := $(shell seq 220 235)
$(call study,orders-test,long-chain,lam,$(ORDERS),$(addprefix orders/,gd rank1+lam=300 gd+lr=1e-3 isotropic+lam=10 \
  rank1-shuffled+lam=300),,4)
# orders-rate-test: rank-1 EWC against GD at GD's best learning rate, seed by seed; one of four comparisons
$(call study,orders-rate-test,long-chain,lam,$(ORDERS),orders/rank1+lam=300,orders/gd+lr=1e-3,4)
# orders-isotropic: the same against the isotropic penalty, which prefers no direction
$(call study,orders-isotropic,long-chain,lam,$(ORDERS),orders/rank1+lam=300,orders/isotropic+lam=10,4)
# orders-shuffled: the same against the direction of shuffled images
$(call study,orders-shuffled,long-chain,lam,$(ORDERS),orders/rank1+lam=300,orders/rank1-shuffled+lam=300,4)
# tradeoff: by how much each row of orders-test differs from GD in tasks just learned and in forgetting, with its pilots
tradeoff: .venv/installed
	$(PY) -m results.report $(patsubst %,results/pages/long-chain/orders-%.csv,test pilot rate) \
	  --tradeoff --to results/pages/long-chain/$@.png

# summary: the README's table, of five tasks and of ten
SUMMARY := $(foreach m,joint finetune diag,$(foreach s,$(FIVE),falling/$(m)+seed=$(s)))
SUMMARY += $(foreach m,gd rank1,$(foreach s,$(TEN),falling/$(m)+seed=$(s)))
SUMMARY += $(foreach m,gd rank1+lam=300 diag+lam=10,$(foreach s,$(LONG),long/$(m)+replay-per-class=50+seed=$(s)))
summary: .venv/installed
	$(PY) -m results.report $(SUMMARY:%=results/runs/%) --summary --to results/pages/summary.md

# relearning: how fast the models of long-test relearn the first of their ten tasks, on seeds 210 to 214
relearning: $(foreach s,210 211 212 213 214,results/runs/long/gd+replay-per-class=50+seed=$(s)/model.pt)
relearning: $(foreach s,210 211 212 213 214,results/runs/long/rank1+lam=300+replay-per-class=50+seed=$(s)/model.pt)
	$(PY) -m results.geometry $@ $(filter %/rank1%,$(^D)) --against $(filter %/gd%,$(^D)) --to results/pages/long-chain/$@

# search-fashion: which lambda on FashionMNIST (DATA=its folder), a small network, half the epochs
$(call study,search-fashion,fashion,curvature,100,\
  $(patsubst %,fashion/%+epochs=1,gd rank1+lam=10 rank1+lam=100 rank1+lam=1000 rank1+lam=10000))
# fashion-small: rank-1 EWC (lambda 1000) against GD on FashionMNIST: an hour of one core per run
$(call study,fashion-small,fashion,lam,0 1 2,fashion/gd fashion/rank1+lam=1000)
# fashion-table1: the same as Table 1, with samples
$(call study,fashion-table1,fashion,,0 1 2,fashion/gd fashion/rank1+lam=1000)
# average-fashion: GD with the average at a constant rate on FashionMNIST, against GD at the falling one
$(call study,average-fashion,fashion,ema,0 1 2,fashion/gd fashion/gd+lr=2e-3+lr-decay=none+ema=0.99)

# exercises: the short runs of pages/exercises.md, three of them with a changed copy of the script
no-distillation = s/return denoise, distill, ewc/return denoise, 0 * distill, ewc/
same-draws = s|u = mu / mu_norm|u = mu / mu_norm; generator.manual_seed(generator.initial_seed())|
random-direction = s|mu = all_sum(total) / n|mu = torch.randn(total.shape, generator=generator) * (total / n).norm() / len(total) ** 0.5|
CHANGED := $(patsubst %,results/runs/exercises/%+seed=0/result.json,no-distillation same-draws random-direction)
UNCHANGED := finetune gd rank1+lam=1000 isotropic rank1-high rank1+replay-per-class=5 gd+replay-per-class=5
UNCHANGED += gd+lr=1e-3+lr-decay=none gd+lr=1e-3+lr-decay=none+ema=0.99 rank1+replay-steps=2
exercises-made := $(CHANGED) $(UNCHANGED:%=results/runs/exercises/%+seed=0/result.json)
$(CHANGED): | .venv/installed
	mkdir -p runs/exercises
	sed '$($(patsubst %+seed=0,%,$(notdir $(@D))))' rank1_ewc.py > runs/exercises/$(notdir $(@D)).py
	$(PY) runs/exercises/$(notdir $(@D)).py $(exercises) --out $(@D)
.PHONY: exercises
exercises: $(exercises-made)

# fisher: Figures 1 to 3 of a model of all digits at each rate, and a VAE at the constant one
fisher: $(addprefix results/pages/fisher/falling-figure,1.json 2.json 3.json)
fisher: $(addprefix results/pages/fisher/constant-figure,1.json 2.json 3.json vae.json)
results/pages/fisher/falling-figure%.json: runs/figures/falling/model.pt
	$(PY) -m results.geometry $* $(<D) --to $(@:.json=)
results/pages/fisher/constant-figure%.json: runs/figures/constant/model.pt
	$(PY) -m results.geometry $* $(<D) --to $(@:.json=)
.PRECIOUS: runs/figures/%/model.pt
runs/figures/%/model.pt: | .venv/installed
	$(PY) rank1_ewc.py $($*) --method joint --out $(@D)
# fisher-fashion: Figure 3 of the authors' small network, on FashionMNIST's first task, on a GPU
fisher-fashion: .venv/installed
	$(PY) -m results.geometry 3 --data-dir $(DATA) --to results/pages/fisher/authors-figure3 \
	  --first-task "--dataset fashion --channels 16 --layers-per-block 1 --epochs 100 --method gd"
# movement: how the weights move along mu while the second task is learned
movement: .venv/installed
	$(PY) -m results.geometry $@ --to results/pages/directions/$@ \
	  --first-task "--lr 1e-3 --lr-decay none --lam 1000 --seed 100"

LISTED := $(shell sed -n 's/^\# \([a-z0-9-]*\): .*/\1/p' results/studies.mk)
# Rebuilds every table from the runs that are there, then updates the pages that include them. It trains nothing.
NOT_CHECKED := forgetting exercises fisher fisher-fashion movement relearning
NOT_CHECKED += orders-proximal orders-test orders-rate-test orders-isotropic orders-shuffled tradeoff# runs are missing
CHECKED := $(filter-out $(NOT_CHECKED),$(LISTED))
check-numbers: .venv/installed  # for the maintainer
	$(MAKE) --no-print-directory CHECK=1 $(CHECKED)
	$(PY) -m results.report --tally results/pages/*/*.csv
	$(PY) -m results.report --include README.md results/README.md results/pages/*.md
	git diff --stat --exit-code -- '*.md' '*.csv'


.PHONY: check-numbers $(LISTED)

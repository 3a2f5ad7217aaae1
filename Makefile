# The commands of the README. Each sets up what it needs, says what it installs before it does, and may be run again at any time.
#
#   LEVEL=lv1            one level instead of all
#   STRATEGY=…           one strategy of that level
#   ARGS="--buyers 50"   more words for the command itself
#   PAYMENTS=approve=90,decline=8,hang=2   a load of LV.4 with a payment service, which treats that many of a hundred buyers so
#   PROFILE=dev          a bench of the debug build, which measures nothing and is built already

LEVEL ?=
STRATEGY ?=
ARGS ?=
NAME ?=
PAYMENTS ?=
PROFILE ?= release
N ?= 20
ORDERS ?= 20000

package_lv1 := lv1-race-condition
package_lv2 := lv2-db-lock
package_lv3 := lv3-redis-lock
package_lv4 := lv4-kafka
levels := lv1 lv2 lv3 lv4
package := $(package_$(LEVEL))
# What each level needs besides Postgres.
services_lv3 := redis
services_lv4 := redis kafka
services := postgres $(if $(LEVEL),$(services_$(LEVEL)),$(sort $(foreach level,$(levels),$(services_$(level)))))
# One strategy, or the level, or nothing: the whole trail.
chosen := $(LEVEL)$(if $(STRATEGY),/$(STRATEGY))
# A single level is built without the others.
features := $(if $(LEVEL),--no-default-features --features $(LEVEL))

# A test waits, for leases, time-outs and processes, about as much as it works: two for each core find room. With four for each, a slow
# machine with two cores spent its time on eight brokers that started at once, and LV.4 took no less time.
ifndef RUST_TEST_THREADS
export RUST_TEST_THREADS := $(shell cores=$$(getconf _NPROCESSORS_ONLN); [ "$$cores" -gt 8 ] && echo "$$cores" || echo $$((cores > 4 ? 8 : 2 * cores)))
endif

# The tests that record what an improvement is for.
ablations := a_flood_of_one_buyer_is_accepted an_order_past_its_ttl_takes_no_ticket vips_are_decided_first while_postgres_is_away_a_consumer_pauses without_the_relay_nothing_is_published a_ticket_is_sold_to_whoever_pays

tools := target/tools
mdbook := $(tools)/bin/mdbook
mdbook_version := 0.5.4
k6 := $(tools)/bin/k6
k6_version := v1.8.1

ifneq ($(LEVEL),)
ifeq ($(package),)
$(error There is no level $(LEVEL); there is $(levels))
endif
else ifneq ($(STRATEGY),)
$(error STRATEGY=$(STRATEGY) takes the level that it is of: LEVEL=lv2)
endif

.PHONY: help rush test red trace book book-check ablations generated exercise exercises load bench benchmarks up down clean dashboards stand kubernetes check results soak

help: ## What there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# Said before the first build: cargo shows its own progress, and not how long it takes.
define announce_build
@[ -e "$${CARGO_TARGET_DIR:-target}/$(1)" ] || echo "building for the first time: $(2) on two cores, seconds from then on"
endef

rush: ## Sell 100 tickets to 1,000 buyers at once, and judge what came of it
	@infra/setup.sh $(services)
	$(call announce_build,debug/oversold,about $(if $(LEVEL),four,six) minutes)
	cargo run --package oversold $(features) -- rush $(chosen) $(ARGS)

test: ## Run the suite, of all levels or of one
	@infra/setup.sh $(services)
	$(call announce_build,debug/deps,four to ten minutes)
	cargo test $(if $(LEVEL),--package $(package)) $(ARGS)

red: ## Show the contract test as it fails: make red LEVEL=lv1 [STRATEGY=read-then-write]
	@test -n "$(LEVEL)" || { echo "make red takes a level: make red LEVEL=lv1"; exit 2; }
	@infra/setup.sh $(services)
	@cargo run --package oversold $(features) -- red $(chosen) $(ARGS)

trace: ## Show one exact interleaving: make trace LEVEL=lv1 [STRATEGY=check-then-decrement]
	@test -n "$(LEVEL)" || { echo "make trace takes a level: make trace LEVEL=lv1"; exit 2; }
	@infra/setup.sh $(services)
	cargo run --package oversold $(features) -- trace $(chosen) $(ARGS)

book: $(mdbook) ## Read the book at http://localhost:3000
	$(mdbook) serve book $(ARGS)

book-check: ## Build the book, and hold what it says against the code
	@infra/setup.sh $(services)
	cargo test --quiet --package oversold --test docs

ablations: ## Measure again what each improvement of LV.4 is for: the same fault without it and with it
	@infra/setup.sh postgres redis kafka
	OVERSOLD_ABLATIONS=$(CURDIR)/book/ablations cargo test --quiet --package lv4-kafka --test lv4 -- $(ablations)
	$(MAKE) generated

generated: ## Write the book's generated snippets anew
	@infra/setup.sh $(services)
	OVERSOLD_BLESS=1 cargo test --quiet --package oversold --test docs the_generated_snippets

exercise: ## Begin an exercise of the book: make exercise NAME=lv2-read-again [ARGS=--solution|--reset]
	@infra/target-folder.sh
	@cargo run --quiet --package oversold -- exercise $(NAME) $(ARGS)

exercises: ## Prove the book's exercises: red with the mistake and with wrong fixes, green with the solution
	@infra/setup.sh $(services)
	cargo run --package oversold -- exercise --prove $(ARGS)

$(mdbook):
	@echo "installing mdbook $(mdbook_version) with cargo into $(tools); this takes a few minutes, once"
	cargo install mdbook --locked --version $(mdbook_version) --debug --quiet --root $(tools)

load: $(k6) ## Run the Goose and k6 loads against a server of this level: make load LEVEL=lv1 [STRATEGY=…]
	@infra/setup.sh $(services)
	load/run.sh $(or $(chosen),lv1) $(if $(PAYMENTS),--payments $(PAYMENTS)) $(ARGS)

$(k6):
	@command -v go >/dev/null || { \
		echo "k6 is built with go, and there is none. Install it: apt-get install golang-go (as root), brew install go, or https://go.dev/dl"; \
		exit 1; }
	@echo "building k6 $(k6_version) with go into $(tools); this takes two minutes, once"
	GOBIN="$(CURDIR)/$(tools)/bin" go install go.k6.io/k6@$(k6_version)

bench: ## Measure one strategy beside the database's own ceiling: make bench LEVEL=lv2 STRATEGY=pessimistic
	@test -n "$(LEVEL)" || { echo "make bench takes a level: make bench LEVEL=lv2 STRATEGY=pessimistic"; exit 2; }
	@infra/setup.sh $(services)
	@infra/bench-tools.sh
	cargo run --profile $(PROFILE) --package oversold $(if $(filter release,$(PROFILE)),$(features)) -- bench $(chosen) $(ARGS)

benchmarks: ## Hold the suite's own costs to their bounds: a rush against a server that does nothing, and the judge
	@infra/setup.sh postgres
	cargo run --quiet --release --package harness --example rush_overhead -- --bound
	cargo run --quiet --release --package harness --example judge_benchmark -- --bound

up: ## Start the stand of a level in containers: make up LEVEL=lv4 [STRATEGY=…]; without LEVEL its services alone
	@STRATEGY=$(STRATEGY) infra/stand/compose.sh up $(LEVEL)

down: ## Stop it; its volumes stay
	@infra/stand/compose.sh down

clean: ## Stop it, and remove its volumes
	@infra/stand/compose.sh clean

dashboards: ## Generate Grafana's dashboards from their Go source, and check them against Grafana's types
	cd infra/stand/grafana/generate && go run . ../dashboards

stand: ## Serve a level from three instances behind nginx, watched by Prometheus, without containers: make stand LEVEL=lv4 [ARGS=--rush]
	@infra/setup.sh $(services)
	@infra/test-tools.sh nginx prometheus
	cargo run --package oversold $(features) -- stand $(chosen) $(ARGS)

kubernetes: ## Validate the Kubernetes manifests against their schemas
	infra/kubernetes/check.sh

check: ## Everything that must be clean besides the tests
	@infra/target-folder.sh
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	@# As `make rush LEVEL=lv1` builds it: what only the other levels use may be left over.
	for level in $(levels); do cargo clippy --package oversold --no-default-features --features $$level -- -D warnings || exit 1; done
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items

results: ## Measure again what the book says in figures: about 12 minutes, and nothing else may run beside it
	@infra/setup.sh $(services)
	@infra/bench-tools.sh
	infra/results.sh
	$(MAKE) generated

soak: ## Run the suite N times, every fourth time with one core kept busy: make soak N=20 [LEVEL=lv4 ORDERS=20000]
	@infra/setup.sh $(services)
	OVERSOLD_SOAK_ORDERS=$(ORDERS) infra/soak.sh $(N) $(if $(LEVEL),--package $(package)) $(ARGS)

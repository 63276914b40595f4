# Every target works on a fresh machine with python3 (3.11 or newer) and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
UV_VERSION := 0.13.8
ONLY ?=
SEED ?= $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')

.DEFAULT_GOAL := help
ENGINE ?= docker
TAG ?= dev
CHART_REPOSITORY ?= https://charts.datasync.io
CHARTS ?= dist/charts
# Certificate authorities that this machine's network needs, for the build only.
CERTIFICATES := $(wildcard /usr/local/share/ca-certificates/*.crt)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

.PHONY: help setup run demo test test-faults test-deploy check fmt bench docs proto lock image helm-repo clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1mmake %-11s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.dev ## Make the virtual environment with everything that development needs

run: $(VENV)/.embedded ## Start the whole suite on this machine and stay; the gateway is on port 8080
	@exec $(BIN)/datasync up

demo: $(VENV)/.embedded ## Replicate 336,776 real flights through the REST gateway and compare both ends
	@exec $(BIN)/python -m deploy.demo

test: $(VENV)/.dev ## Run every test, against real servers
	$(BIN)/pytest -n 2 --dist loadfile --max-worker-restart 0

test-faults: $(VENV)/.dev ## Walk far where make test takes a sample of random choices; SEED=… repeats a walk
	$(BIN)/pytest -m randomised --walk=long --seed=$(SEED) --hypothesis-seed=$(SEED) -o timeout=3600

test-deploy: $(VENV)/.dev ## Test images, Compose file and chart on a Docker engine and the cluster of KUBECONFIG
	$(BIN)/pytest -n 0 -rs tests/deploy

check: $(VENV)/.dev ## Lint, type-check and hold the import contracts
	@failed=; for command in "ruff check ." "ruff format --check ." "mypy" "lint-imports" \
		"hadolint deploy/Dockerfile" "check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml"; do \
		echo "$$command"; $(BIN)/$$command || failed="$$failed [$$command]"; \
	done; \
	if command -v helm > /dev/null; then \
		$(BIN)/pytest -q -n 0 tests/deploy/test_chart_rendering.py || failed="$$failed [chart]"; \
	else echo "helm is not on the PATH: the chart is not rendered"; fi; \
	if command -v promtool > /dev/null; then \
		$(BIN)/pytest -q -n 0 tests/deploy/test_alerts.py || failed="$$failed [alerts]"; \
	else echo "promtool is not on the PATH: the alerts are not checked"; fi; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

fmt: $(VENV)/.dev ## Format the code and mend what can be mended by itself
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## Measure against named baselines; ONLY=write_path picks one
	@exec $(BIN)/python -m tests.benchmarks $(ONLY)

docs: $(VENV)/.dev ## Write the pages that are made from the code
	$(BIN)/datasync settings > docs/settings.md
	$(BIN)/datasync settings --sample > docs/datasync.yaml
	$(BIN)/python -m deploy.chart

proto: $(VENV)/.dev ## Write the schemas of the events from their models
	$(BIN)/python -m proto.generate

lock: $(UV) ## Pin every dependency of pyproject.toml, with hashes, under requirements/
	set -e; compile() { $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
		--no-emit-find-links --custom-compile-command "make lock" "$$@"; }; \
	compile pyproject.toml -o requirements/runtime.txt; \
	compile pyproject.toml --extra embedded -c requirements/runtime.txt -o requirements/suite.txt; \
	compile pyproject.toml --extra embedded --extra demo -c requirements/suite.txt -o requirements/embedded.txt; \
	compile pyproject.toml --extra embedded --extra demo --group dev -c requirements/embedded.txt \
		-o requirements/dev.txt; \
	compile --group build -c requirements/dev.txt -o requirements/build.txt

image: ## Build the images datasync and datasync-service; ENGINE=podman builds with podman
	$(if $(CERTIFICATES),cp $(CERTIFICATES) deploy/image/certificates/)
	for target in datasync datasync-service; do \
		$(ENGINE) build $(BUILD_OPTIONS) --file deploy/Dockerfile --target $$target --tag $$target:$(TAG) \
			--build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) . || exit 1; \
	done

helm-repo: ## Package the chart into CHARTS, a static repository for helm repo add; KEY=… KEYRING=… signs it
	mkdir -p $(CHARTS)
	helm package helm/datasync --destination $(CHARTS) \
		$(if $(KEY),--sign --key '$(KEY)' --keyring '$(KEYRING)')
	helm repo index $(CHARTS) --url $(CHART_REPOSITORY)

clean: ## Remove the virtual environment and caches; the data in .datasync stay
	rm -rf $(VENV) .cache .bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "DataSync needs Python 3.11 or newer; set PYTHON=<path>")'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.embedded: requirements/embedded.txt pyproject.toml | $(UV)
	@echo "Installing what DataSync needs into $(VENV)…"
	@$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r requirements/embedded.txt
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt pyproject.toml | $(UV)
	@echo "Installing what development needs into $(VENV)…"
	@$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r requirements/dev.txt
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@ $(VENV)/.embedded

# make tune   creates the environment, then tunes VAR on the bundled model
# make test   the same for lint, types and all tests
# make wheel  builds the wheel, and tries it alone in a fresh environment
# make docs   builds the documentation into build/docs
# make TORCH=gpu tune   with pip's ordinary build of torch (see README, "Install")

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
RESULTS ?= results/phase3
# The CPU build unless a GPU answers: the default build brings gigabytes of CUDA libraries.
TORCH ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
CONSTRAINT = $(if $(filter cpu,$(TORCH)),--constraint constraints-cpu.txt,)
PIP = "$(VENV)/bin/python" -m pip install --quiet --quiet --disable-pip-version-check
# Not every pip finds the CPU build (README, "Install"); then the ordinary one serves as well.
INSTALL = $(if $(CONSTRAINT),$(PIP) $(CONSTRAINT) --editable $(1) || { \
	echo "pip finds no CPU build of torch: installing the ordinary one (may be gigabytes; README, Install)"; \
	$(PIP) --editable $(1); },$(PIP) --editable $(1))

.PHONY: tune test test-fast lint docs wheel clean
tune: $(VENV)/.installed
	@"$(VENV)/bin/var-moe" tune --max-samples 200 --final-samples 400 --output "$(RESULTS)" $(ARGS)

test: lint
	"$(VENV)/bin/python" -m pytest -n 2 --dist worksteal $(ARGS)

test-fast: $(VENV)/.installed-dev
	"$(VENV)/bin/python" -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

lint: $(VENV)/.installed-dev
	"$(VENV)/bin/ruff" check .
	"$(VENV)/bin/ruff" format --check .
	"$(VENV)/bin/mypy"

docs: $(VENV)/.installed-dev
	"$(VENV)/bin/mkdocs" build --strict
	@echo "the documentation: build/docs/index.html (with search: python -m http.server -d build/docs)"

# The core as users install it: no checkout beside it, no extra, no test tool.
WHEEL = build/wheel
wheel: $(VENV)/.installed-dev
	rm -rf "$(WHEEL)"
	"$(VENV)/bin/python" -m build --quiet --wheel --outdir "$(WHEEL)" .
	"$(PYTHON)" -m venv "$(WHEEL)/venv"
	"$(WHEEL)/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
		$(CONSTRAINT) "$(WHEEL)"/*.whl
	cd "$(WHEEL)" && venv/bin/var-moe demo --output demo
	cd "$(WHEEL)" && venv/bin/python -c "import var_moe; var_moe.load_exported('demo/export')"
	cd "$(WHEEL)" && venv/bin/var-moe tune --profile demo/profile --method random --n_calls 1 \
		--max_degradation 1 --max_samples 10 --final_samples 10 --output tuned

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; install one, or: make PYTHON=/path/to/python"; exit 2; }
	@echo "creating the environment in $(VENV) (about two minutes, once) ..."
	@"$(PYTHON)" -m venv "$(VENV)"
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints-cpu.txt
	@echo "installing var-moe and what it needs ($(TORCH) build of torch) ..."
	@$(call INSTALL,".[report]")
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the test tools ..."
	@$(call INSTALL,".[dev]")
	@touch $@

clean:
	rm -rf "$(VENV)" results

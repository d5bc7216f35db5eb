# Everything here needs Python 3.11 or newer and nothing else; `make` sets up .venv by itself.
#
#   make demo                                    on a server of its own
#   make demo URL=redis://localhost:6379/0       on yours
#   make demo ARGS="--seconds 30 --workers 8"
#   make test   make lint                        (ARGS goes to pytest)
#   make test-wheel coverage                     the suite on the built wheel, and what it reaches
#   make docs                                    the site, into site/
#   make bench   make bench FULL=1               against other stores
#   make chaos SECONDS=600
#   make simulate SECONDS=600
#   make machines RUNS=2000                      many machines, folders and crashes at random
#   make steady   make steady TIMES=3 PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
WHEEL_VENV ?= .venv-wheel
WHEEL ?=
URL ?=
ARGS ?=

.PHONY: demo test test-wheel coverage lint docs chaos simulate machines steady bench clean
.DEFAULT_GOAL := demo

demo: $(STAMP)
	@$(BIN)/orcs-redis demo $(if $(URL),--url '$(URL)') $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/python tools/unasync.py --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In a fresh environment, from a copy of the tree that lacks the sources: what is imported can only be the wheel. It is
# built here, or given: make test-wheel WHEEL=dist/orcs_redis-0.1.0-py3-none-any.whl
test-wheel:
	rm -rf $(WHEEL_VENV) .coverage .coverage.*
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	mkdir $(WHEEL_VENV)/dist $(WHEEL_VENV)/tree
	$(if $(WHEEL),cp $(WHEEL),$(WHEEL_VENV)/bin/python -m pip wheel --quiet --no-deps . --wheel-dir) $(WHEEL_VENV)/dist
	$(WHEEL_VENV)/bin/python -m pip install --quiet "$$(ls $(WHEEL_VENV)/dist/*.whl)[cli,embedded,memory]" --group dev
	tar -cf - --exclude=./.git --exclude=./orcs_redis --exclude='./.venv*' --exclude='./$(WHEEL_VENV)' --exclude='.*_cache' --exclude=./site . | tar -xf - -C $(WHEEL_VENV)/tree
	cd $(WHEEL_VENV)/tree && ../bin/python -c 'import orcs_redis as o; assert "site-packages" in o.__file__, o; print("tested:", o.__file__)'
	cd $(WHEEL_VENV)/tree && COVERAGE_FILE='$(CURDIR)/.coverage' ../bin/python -m coverage run -m pytest $(ARGS)

# Of lines and branches, over all processes of all runs whose data is here; below the floor in pyproject.toml it fails.
coverage: $(STAMP)
	$(BIN)/python -m coverage combine --quiet --keep
	$(BIN)/python -m coverage report --skip-covered --show-missing $(if $(FLOOR),--fail-under=$(FLOOR))

# A warning is an error, and no page may load anything from another host.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@! grep -rlE '<(script|img|link|iframe)[^>]* (src|href)="?(https?:)?//' site --include='*.html'

# Long runs of the fault tier: make chaos SECONDS=600 SEED=7
SECONDS ?= 60
chaos: $(STAMP)
	$(BIN)/python -m tests.faults --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)

# The suite again and again while the machine has other work, until it fails.
TIMES ?= 5
LOAD ?= 2
steady: $(STAMP)
	$(BIN)/python -m tests.steady --times $(TIMES) --load $(LOAD) $(ARGS)

# A deterministic simulation of the exactly-once protocol: make simulate SECONDS=600 SEED=7
simulate: $(STAMP)
	$(BIN)/python -m tests.simulation --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)

machines: $(STAMP)
	$(BIN)/python -m tests.hybrid --runs $(or $(RUNS),2000) --acts 80 --machines 3 $(ARGS)

# Against the peers, into benchmarks/results: make bench, make bench FULL=1. The store's own: python -m benchmarks store
bench: $(STAMP)
	$(BIN)/python -m benchmarks.peers --out benchmarks/results $(if $(FULL),--full) $(ARGS)

clean:
	rm -rf $(VENV) $(WHEEL_VENV)

# Made anew when the dependencies change. --group came with pip 25.1.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.13 ..." % v[:2])'
	@echo "setting up $(VENV) (once)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --editable '.[cli,embedded,memory]' --group dev
	@touch $@

$(VENV)/.docs: $(STAMP)
	@$(BIN)/python -m pip install --quiet --group docs
	@touch $@

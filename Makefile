# A .venv in the repository does everything; `make setup` fills it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.panterra-setup
DEMO_OUT ?= demo

.PHONY: setup demo test lint bench docs parity clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	UV_FIND_LINKS="$$(pip config get global.find-links 2>/dev/null || true)" \
		$(BIN)/uv pip install --quiet -p $(BIN)/python -c constraints.txt -e ".[dev,docs]"
	touch $@

# make demo [SCENE=folder LABELS=file] [MODEL=name]
demo: setup
	$(BIN)/panterra demo --out "$(DEMO_OUT)" $(if $(SCENE),--scene "$(SCENE)") $(if $(LABELS),--labels "$(LABELS)") \
		$(if $(MODEL),--model "$(MODEL)")

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict

bench: setup
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/mapping.py
	$(BIN)/python benchmarks/search.py --millions 1

docs: setup
	$(BIN)/zensical build --clean

# make parity GOLDEN=folder: every recorded case in it against this implementation; one family's folder, or the parent
parity: setup
	@test -n "$(GOLDEN)" || { echo "say which cases: make parity GOLDEN=folder" >&2; exit 2; }
	PANTERRA_GOLDEN="$(abspath $(GOLDEN))" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 \
		tests/test_parity.py tests/test_parity_anysat.py

clean:
	rm -rf .venv site demo .mypy_cache .ruff_cache .pytest_cache

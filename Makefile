# One word each. `make test` is what CI runs; `make check` is for every few minutes.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1

.venv/demo: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) torch -c constraints.txt
	$(PIP) -c constraints.txt -e ".[demo]"
	touch .venv/demo

.venv/ok: .venv/demo
	$(PIP) -c constraints.txt -e ".[demo,test]"
	touch .venv/ok

.PHONY: check test docs bench demo
check: .venv/ok
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto -m "not slow" -x

test: .venv/ok
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto --durations=15

docs: .venv/ok
	.venv/bin/python -m pytest -q tests/test_readme.py tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict -q
	@echo "open site/index.html"

demo: .venv/demo
	.venv/bin/veneer demo

bench: .venv/ok
	.venv/bin/python benchmarks/overhead.py

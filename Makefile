# make demo [SIZE=smoke] [SEEDS=3] [FRESH=1]    the whole method on real data
# make test                                     the tests
# make check                                    formatting, lint, types, floors

PYTHON ?= python3
SIZE ?= full
SEEDS ?= 1
FRESH ?=

.PHONY: demo test check clean

demo: .venv/ready
	.venv/bin/dist-fusion demo --size $(SIZE) --seeds $(SEEDS) $(if $(FRESH),--fresh)

test: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/pytest

check: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# The exact versions of requirements.lock, and this folder as it is. Made anew when the lock changes.
.venv/ready: requirements.lock
	@echo "Setting up .venv (once; about half a minute and 7 GB) …"
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv/bin/uv pip install --quiet --python .venv/bin/python --requirement requirements.lock
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --editable .
	touch $@

clean:
	rm -rf .venv

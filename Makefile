# make demo [SIZE=smoke] [SEEDS=3] [FRESH=1]    the whole method on real data
# make test                                     the tests
# make test-slurm                               those on a real SLURM of two nodes, which they start themselves
# make faults                                   kills a run in every way that is known, and continues it; half an hour
# make check                                    formatting, lint, types, floors
# make gpu-check [PYTHON=python3]               on a machine with a GPU: its tests and all benches, in nine minutes

PYTHON ?= python3
SIZE ?= full
SEEDS ?= 1
FRESH ?=

.PHONY: demo test test-slurm faults check gpu-check clean

demo: .venv/ready
	.venv/bin/dist-fusion demo --size $(SIZE) --seeds $(SEEDS) $(if $(FRESH),--fresh)

test: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/pytest

test-slurm: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/pytest tests/slurm -m slurm

faults: .venv/ready
	.venv/bin/python -m tests.faults

check: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# With an interpreter that is named, or else the .venv's: GPU machines often have their own torch.
NAMED := $(if $(filter file,$(origin PYTHON)),,$(PYTHON))
gpu-check: $(if $(NAMED),,.venv/ready)
	$(or $(NAMED),.venv/bin/python) -m tests.gpu.check

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

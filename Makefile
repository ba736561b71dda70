# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
VLLM := .venv-vllm
RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
# pip compiles one file after the other; COMPILE takes all cores for it.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
COMPILE := $(PY) -m compileall -qq -j 0 $(VENV)/lib

# The demo's model is so small that a second thread costs more than it computes.
export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-turns test test-core test-fast models lightning curves screenshots docs kills gpu-check lint format clean \
	vllm vllm-test

demo: $(VENV)/demo.stamp  ## train the embedded default to a rising reward
	$(PY) train.py fit --config configs/arithmetic.yaml --trainer.default_root_dir $(RUN)

demo-turns: $(VENV)/demo.stamp  ## train on conversations with a scripted user
	$(PY) train.py fit --config configs/turns.yaml --trainer.default_root_dir $(RUN)

test: $(VENV)/dev.stamp  ## every test but those of the three targets below; gpu ones are skipped without one
	$(PY) -m pytest -q -n 2 --dist worksteal --durations 5 -m "not models and not kills and not recipes"

test-core: $(VENV)/dev.stamp  ## the maths and the loop, in less than a minute
	$(PY) -m pytest -q -n 2 --dist worksteal -m "not slow" tests/test_*.py gspo_lightning/*.py

test-fast: $(VENV)/dev.stamp  ## without the tests marked slow
	$(PY) -m pytest -q -n 2 --dist worksteal -m "not slow and not models and not kills and not recipes"

models: $(VENV)/dev.stamp  ## try every type of model anew and write docs/models.md
	cd tests && PYTHONPATH=.. $(abspath $(PY)) -m support.model_types --write

lightning: $(VENV)/dev.stamp  ## write docs/lightning.md anew from its table
	cd tests && PYTHONPATH=.. $(abspath $(PY)) -m support.lightning_table --write

curves: $(VENV)/dev.stamp  ## write the table of docs/curves.md anew from the package's
	cd tests && PYTHONPATH=.. $(abspath $(PY)) -m support.curves_page --write

screenshots: $(VENV)/demo.stamp  ## make the pictures of docs/images anew; needs chromium
	$(PY) benchmarks/screenshots.py

docs: $(VENV)/docs.stamp  ## build the pages as a site, build/site/index.html; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

kills: $(VENV)/dev.stamp  ## kill runs of thirteen configurations again and again, and continue them
	$(PY) -m pytest -q -n 2 --dist worksteal -m kills

recipes: $(VENV)/dev.stamp  ## train the shipped models and the other demos anew
	$(PY) -m pytest -q -n 2 --dist worksteal -m recipes

gpu-check: $(VENV)/dev.stamp  ## measure what only a GPU can tell; ARGS=--dry tries the parts without one
	PY=$(PY) benchmarks/gpu_check.sh $(ARGS)

vllm: $(VLLM)/stamp  ## an environment with vLLM for CPUs, in .venv-vllm

vllm-test: $(VLLM)/stamp  ## what the real engine is put through: about 20 minutes on two cores
	$(VLLM)/bin/python -m pytest -q -n 0 -s -m vllm tests/vllm_room/test_real_engine.py

lint: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/dev.stamp
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:  ## remove the environment and all runs
	rm -rf $(VENV) $(VLLM) runs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (a minute or two)"
	$(PIP) -e .
	@$(COMPILE) || true  # some packages ship files for other Pythons
	@touch $@

$(VLLM)/stamp: pyproject.toml constraints-vllm.txt
	@echo "installing into $(VLLM): 3 GB, 2 to 5 minutes"
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/docs.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (a minute or two)"
	$(PIP) -e ".[docs]"
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (a minute or two)"
	$(PIP) -e ".[dev,peers]"
	@$(COMPILE) || true
	@touch $@

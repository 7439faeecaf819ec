# Every target works on a fresh machine: the first call makes .venv, later calls reuse it. PYTHON names the interpreter to start from.
PYTHON ?= python3
BIN := .venv/bin
CPP = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test sweep docs real-parts real bench check check-cuda check-sources format wheel release sanitize clean

demo:  ## a small language model learns by GRPO (make demo ARGS="--temperature 0.6")
	@PYTHON="$(PYTHON)" tools/bootstrap.sh demo
	@$(BIN)/grpo-fast demo $(ARGS)

test: check  ## checks of the sources, then the tests (make test ARGS="-k advantages")
	@tools/ci/tests.sh $(ARGS)

sweep:  ## the tests that take many minutes: all random cases in the interpreter, long runs, processes killed at random
	@PYTHON="$(PYTHON)" tools/bootstrap.sh test
	@PYTHON="$(PYTHON)" tools/bootstrap.sh docs || echo "grpo_fast: the tests of the site are skipped"
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 -m sweep $(ARGS)

docs:  ## the documentation site, into site/: built strictly, every link checked; neither torch nor a network is needed to build it
	@PYTHON="$(PYTHON)" tools/bootstrap.sh docs
	@NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet --strict
	@$(BIN)/python tools/docs/check_site.py site
	@echo "To read it: $(BIN)/python -m http.server -d site"

real-parts:  ## a real vLLM server and model for tests/test_vllm_real.py (make sweep), 4 GB in ~/.cache/grpo_fast
	@$(PYTHON) tools/real_parts.py

real:  ## a chat model of 135M parameters learns by GRPO, evaluated before and after; into runs/real. Half an hour; started again, it goes on
	@PYTHON="$(PYTHON)" tools/bootstrap.sh test
	@tools/real.sh $(ARGS)

bench:  ## regressions with pytest-benchmark, then the comparison with other implementations, into runs/bench
	@PYTHON="$(PYTHON)" tools/bootstrap.sh test
	@$(BIN)/python -m pytest bench
	@$(BIN)/grpo-fast bench $(ARGS)

check:  ## ruff, clang-format, mypy, the direction of imports, and nvcc over every .cu file
	@PYTHON="$(PYTHON)" tools/bootstrap.sh test
	@$(MAKE) --no-print-directory --output-sync=target -j2 check-cuda check-sources

check-cuda:
	@$(BIN)/python tools/nvcc_check.py

check-sources:
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CPP)
	@$(BIN)/mypy
	@$(BIN)/mypy --config-file tests/mypy.ini
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python tools/generate_loss_settings.py --check
	@$(BIN)/python tools/generate_peer_digests.py --check
	@$(BIN)/python tools/ci/check_workflows.py

format:  ## rewrite the sources as `make check` wants them
	@PYTHON="$(PYTHON)" tools/bootstrap.sh test
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP)

wheel:  ## dist/*.whl and dist/*.tar.gz; GRPO_FAST_BUILD=none|cpu|cuda chooses what they hold
	@PYTHON="$(PYTHON)" tools/bootstrap.sh test
	@$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .
	@$(BIN)/python tools/ci/wheels.py --output dist sdist

release:  ## build all, check, and tag the version in grpo_fast/version.py (make release ARGS=--dry-run)
	@PYTHON="$(PYTHON)" tools/bootstrap.sh test
	@$(BIN)/python -m pip install -qq --group release
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/release.py $(ARGS)

sanitize:  ## the C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer
	@PYTHON="$(PYTHON)" tools/bootstrap.sh test
	@tools/sanitize.sh

clean:  ## remove what was built, .venv included; the next call makes it again
	@rm -rf .venv build dist site *.egg-info grpo_fast/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks

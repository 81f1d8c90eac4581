# Everything runs inside .venv, made from constraints.txt; needs only git, make and Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := fast,atari,video,language,dev
export PYTHONWARNINGS ?= ignore::DeprecationWarning

.PHONY: demo demo-language test test-contract lint bench browser clean

demo: .venv/ready
	$(BIN)/rgpo compare --env Hopper-v5 --recipes rgpo ppo rgpo-gate ppo-kl --seeds 6 \
	  --steps 120000 --eval-episodes 0 --checkpoint-every 20 --keep 1

# The whole of RLHF with a model from scratch; `--model smollm2` has 135 million parameters.
demo-language: .venv/ready
	$(BIN)/rgpo rlhf --model tiny

test: .venv/ready browser
	$(BIN)/pytest -n 2 --dist loadfile --hypothesis-profile=ci

# Contract tests run the adapters against the real host trainers, whose pins conflict. So each host
# has a virtual environment of its own, .contract/<host>, that sees all of .venv and adds, before it
# on the path, exactly the packages of tests/contract/<host>.txt (exact versions, dependencies told
# in full: pip resolves nothing). A new host is that file and tests/contract/test_<host>.py.
# `make -j2 test-contract HOSTS="sb3 rllib"` runs some, two at a time.
HOSTS ?= $(patsubst tests/contract/%.txt,%,$(wildcard tests/contract/*.txt))
CONTRACTS := $(HOSTS:%=contract-%)

test-contract: $(CONTRACTS)

.PHONY: $(CONTRACTS)
$(CONTRACTS): contract-%: .contract/%/ready
	.contract/$*/bin/python -m pytest --durations=5 tests/contract/test_$*.py

.contract/%/ready: tests/contract/%.txt | .venv/ready
	rm -rf .contract/$*
	$(BIN)/python -m venv --without-pip .contract/$*
	@echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
	  > "$$(.contract/$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/rgpo.pth"
	$(BIN)/pip --python .contract/$*/bin/python install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src/rgpo/core

bench: .venv/ready .contract/torchrl/ready
	$(BIN)/pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/logprob.py
	$(BIN)/python benchmarks/update.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/language.py
	$(BIN)/python benchmarks/differentiable.py

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("rgpo needs Python >= 3.11: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

# The report is tested in headless Chromium; without it (and without root to install it) those
# tests are skipped and say so.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null; }; } || \
	  echo "chromium is not installed: the browser tests will be skipped"

clean:
	rm -rf .venv .contract build

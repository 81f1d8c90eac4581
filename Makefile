# Everything runs inside .venv, made from constraints.txt; needs only git, make and Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := fast,atari,video,language,dev
export PYTHONWARNINGS ?= ignore::DeprecationWarning

.PHONY: demo test lint bench browser clean

demo: .venv/ready
	$(BIN)/rgpo compare --env Hopper-v5 --recipes rgpo ppo rgpo-gate ppo-kl --seeds 6 \
	  --steps 120000 --eval-episodes 0 --checkpoint-every 20 --keep 1

test: .venv/ready browser
	$(BIN)/pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src/rgpo/core

bench: .venv/ready
	$(BIN)/pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/logprob.py
	$(BIN)/python benchmarks/update.py
	$(BIN)/python benchmarks/throughput.py

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
	rm -rf .venv build

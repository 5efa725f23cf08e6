# testcloud: targets for its developers. `make test` needs only Python and pyzmq; the Makefile
# installs what is missing into .venv. SPDX-License-Identifier: MIT

PYTHON ?= python3
VENV = .venv
# the interpreter that has pyzmq: the system's, else the one of .venv
RUN = $$($(PYTHON) -c 'import zmq, sys; print(sys.executable)' 2>/dev/null || echo $(VENV)/bin/python)
LINT = ruff==0.14.6 mypy==1.18.2 coverage==7.11.3 lxml==6.0.2
SCHEMA = pytest==9.0.1
RULES = E,F,W,I,B,UP,C4,SIM,RET,PIE,PLE

.PHONY: test check cover demo soak chaos fuzz bench toc version clean setup tools

test: setup
	$(RUN) test_testcloud.py

setup:
	@$(PYTHON) -c 'import zmq' 2>/dev/null || $(VENV)/bin/python -c 'import zmq' 2>/dev/null || { \
	  echo "pyzmq is missing: installing it into $(VENV)"; \
	  { $(PYTHON) -m venv $(VENV) && $(VENV)/bin/python -m pip install -q 'pyzmq>=24'; } || { \
	  echo "could not: install pyzmq yourself, e.g. 'apt install python3-zmq' or" \
	       "'apt install python3-venv' and try again" >&2; exit 1; }; }

tools:
	@$(VENV)/bin/python -c 'import ruff, mypy, coverage, lxml, zmq' 2>/dev/null || { \
	  $(PYTHON) -m venv $(VENV) && $(VENV)/bin/python -m pip install -q 'pyzmq>=24' $(LINT); }
	@# the schema of JUnit's reports is only in pytest's source archive
	@test -s $(VENV)/junit-10.xsd || { \
	  $(VENV)/bin/python -m pip download -q --no-deps --no-binary :all: -d $(VENV)/sources $(SCHEMA) && \
	  tar -xzOf $(VENV)/sources/pytest-*.tar.gz --wildcards '*/junit-10.xsd' > $(VENV)/junit-10.xsd; }

check: tools
	$(VENV)/bin/python -m ruff check --isolated --line-length 100 --target-version py39 \
	  --select $(RULES) --ignore UP006,UP035,UP045,UP007,B006,B008,SIM115 \
	  testcloud.py test_testcloud.py pi.py
	$(VENV)/bin/python -m mypy --strict --no-error-summary --cache-dir $(VENV)/mypy testcloud.py pi.py
	$(VENV)/bin/python -m unittest -q test_testcloud.JUnitTest

cover: setup tools
	$(VENV)/bin/python -m coverage run --data-file $(VENV)/coverage -m unittest -q test_testcloud
	$(VENV)/bin/python -m coverage report --data-file $(VENV)/coverage -m --include testcloud.py

# simulations for so many minutes: make soak MINUTES=60
MINUTES ?= 10
soak: setup
	$(RUN) test_testcloud.py soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# a long run whose real processes are killed, stopped and cut off: make chaos SEED=7
COMMANDS ?= 2000
chaos: setup
	$(RUN) test_testcloud.py chaos --commands $(COMMANDS) $(if $(SEED),--seed $(SEED))

# random messages to every socket of the program: make fuzz MESSAGES=50000 SEED=7
MESSAGES ?= 1000000
fuzz: setup
	$(RUN) test_testcloud.py fuzz --messages $(MESSAGES) $(if $(SEED),--seed $(SEED))

# speed beside what is installed, as a Markdown table: make bench ONLY=latency MARKDOWN=1
ONLY ?=
bench: setup
	$(RUN) test_testcloud.py bench --only "$(ONLY)" $(if $(MARKDOWN),--markdown)

# a broker, two workers and a client that computes pi, as real processes
demo: setup
	@export PYTHONUNBUFFERED=1 dir=$$(mktemp -d) run=$(RUN); \
	$$run testcloud.py broker --clients ipc://$$dir/clients --workers ipc://$$dir/workers & b=$$!; \
	$$run testcloud.py worker --connect ipc://$$dir/workers & w=$$!; \
	$$run testcloud.py worker --host other --connect ipc://$$dir/workers & v=$$!; \
	trap 'kill $$w $$v $$b 2>/dev/null; wait; rm -r $$dir' EXIT; \
	seq 5 | awk '{print "./pi.py " $$1}' | $$run testcloud.py client --wait 30 --connect ipc://$$dir/clients

# the table of contents: sections, their parts, and classes with what they are for
toc:
	@awk 'FNR == 1 { print FILENAME } \
	  class { sub(/"""$$/, ""); print class (sub(/^ *"""/, ": ") ? $$0 : ""); class = "" } \
	  /^# === / { printf "\n" } \
	  /^# === |^ *# --- / { sub(/^ *# /, ""); sub(/ =+$$/, ""); printf "%6d %s\n", FNR, $$0 } \
	  /^class / { sub(/[(:].*/, ""); class = sprintf("%6d     %s", FNR, $$2) }' \
	  testcloud.py test_testcloud.py

version:
	@$(PYTHON) testcloud.py --version

clean:
	rm -rf $(VENV) __pycache__ .mypy_cache .ruff_cache

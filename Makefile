# Each target does its own set-up; a second run finds it done. What was installed for what is remembered in .make/.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := .venv/bin
DECLARED := setup.cfg pyproject.toml constraints.txt
ENGINES := ocr,ner,facefusion,acestep
ENGINE_TESTS := tests/acestep tests/ocr
MODEL_TESTS := acestep contract facefusion ner ocr
# The tests that need no engine's packages. up/test_up.py and packaging/test_shadowed.py start the real `inferq up`.
CORE_TESTS := $(addprefix tests/,schemas broker storage worker gateway client callbacks batch nightly jobs weights \
	cli/test_arguments.py cli/test_output.py cli/test_terminal.py contract/test_checks.py up/test_up.py packaging)
# The Python of `make test-lowest` and `make test-newest`, by name or path.
PYTHON ?= $(BIN)/python
PYTHON_STAMP := $(subst /,_,$(PYTHON))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The tests start several hundred processes; each would compile inferq, and each run rewrite all assertions, anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo up quick test coverage test-engines test-lowest test-newest chaos chaos-quick scale-in \
	lint docs bench ocr-quality observe generate image-check compose-check release-check clean system prometheus nginx

help: ## say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: .make/run | system ## install what running inferq needs, here and in .venv
	@echo "Ready. Now:  . $(BIN)/activate && inferq up"

demo: .make/run | system ## start everything, have a task of each type, a callback and a batch done, stop everything
	@exec $(BIN)/python examples/demo.py

up: .make/run | system ## start everything on this machine; Ctrl-C stops it
	@exec $(BIN)/inferq up

quick: .make/test ## run the tests that need no service, no process and no model: under a minute
	@$(BIN)/python -m pytest --quick -q -r fE -n 2 $(addprefix --ignore=tests/,$(MODEL_TESTS)) $(ARGS)

test: .make/test .make/client | system prometheus nginx ## run the tests, against a real RabbitMQ and Redis
	@$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(ARGS)

coverage: ## the same, and which lines no test runs: takes half as long again, fails where that is over a tenth
	@$(MAKE) test ARGS="--cov --cov-fail-under=90 $(ARGS)"

test-engines: .make/test-engines ## run the tests that need the engines' own large packages, in .venv-engines
	@.venv-engines/bin/python -m pytest -m engines $(ENGINE_TESTS) $(ARGS)

test-lowest: ## run the tests of the core with the oldest releases that setup.cfg allows; PYTHON=python3.13 picks a Python
test-newest: ## the same with the newest releases, without constraints.txt
test-lowest test-newest: test-%: .make/test-%-$(PYTHON_STAMP) .make/client | system
	@.venv-$*/bin/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(CORE_TESTS) $(ARGS)

chaos: .make/test | system ## break everything that can break, count what was lost, write docs/reliability.md
	@exec $(BIN)/python -m tests.chaos $(ARGS)

chaos-quick: .make/test | system ## the same in a few minutes, and nothing is written
	@exec $(BIN)/python -m tests.chaos --quick $(ARGS)

scale-in: .make/test | system ## scale real workers as Kubernetes does, with and without the scale-in guard
	@exec $(BIN)/python -m tests.scale_in $(ARGS)

lint: .make/lint .make/k8s ## check style, types, the walls between the rooms, what is generated, the pages and k8s/
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/sentiment/inferq_sentiment
	$(BIN)/mypy -p k8s.monitoring
	$(BIN)/lint-imports
	$(BIN)/python -m tests.packaging.wheel
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -P -m inferq.schemas.publish --check docs/schemas
	$(BIN)/python -m tests.packaging.sync_client --check
	$(BIN)/python -m k8s.monitoring.generate --check
	work=$$(mktemp -d)
	trap 'rm -rf "$$work"' EXIT
	$(BIN)/python -P -m mkdocs build --strict --site-dir "$$work/site"
	mkdir "$$work/k8s"
	$(BIN)/python -m tests.k8s.render "$$work/k8s"
	.venv-k8s/bin/python tests/k8s/schemas.py "$$work/k8s"
	.venv-k8s/bin/checkov --config-file tests/k8s/checkov.yaml --directory "$$work/k8s"

# Not --quiet: --strict then counts no warnings.
docs: .make/docs ## build the pages and the Python reference into site/; a broken link is an error
	@$(BIN)/python -P -m mkdocs build --strict
	echo "Built. Now open site/index.html"

bench: .make/bench | system ## measure what the queue itself costs
	@$(BIN)/python -m benchmarks $(ARGS)

observe: .make/run | system prometheus ## start everything, and a Prometheus (and Grafana) that watches it; Ctrl-C stops it
	@exec $(BIN)/python -m k8s.monitoring.observe $(ARGS)

ocr-quality: .make/run ## measure what OCR reads of pictures that are hard for RapidOCR
	@$(BIN)/python -m tests.ocr.quality $(ARGS)

image-check: .make/test ## install what each container image installs, and start it; writes docs/images.md
	@$(BIN)/python -m tests.images $(ARGS)

compose-check: .make/test | system ## start what compose.yaml starts, without containers, and have a task done
	@$(BIN)/python -m tests.compose $(ARGS)

generate: .make/lint ## write the generated files: published schemas, synchronous client, boards, PrometheusRule
	@$(BIN)/python -P -m inferq.schemas.publish docs/schemas
	$(BIN)/python -m tests.packaging.sync_client
	$(BIN)/python -m k8s.monitoring.generate

release-check: .make/lint ## build the last commit's sdist and wheel into dist/, and check what a user would install
	@$(BIN)/python -m tests.packaging.release

clean: ## remove what was built and measured; .venv and the data of `inferq up` stay
	@rm -rf .make build dist site inferq.egg-info demo-output .inferq-demo .coverage .coverage.* \
		.mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

# One stamp per set of extras, and for those that it holds. Installing one set leaves the others in place.
.make/run: EXTRAS := up,$(ENGINES)
.make/test: EXTRAS := up,$(ENGINES),test
.make/test: HOLDS := .make/run
.make/lint: EXTRAS := up,$(ENGINES),test,lint,docs
.make/lint: HOLDS := .make/run .make/test .make/docs
.make/docs: EXTRAS := docs
.make/bench: EXTRAS := up,$(ENGINES),bench
.make/bench: HOLDS := .make/run
.make/run .make/test .make/lint .make/docs .make/bench: $(DECLARED) .venv/pyvenv.cfg
	@mkdir -p .make
	echo "Installing inferq[$(EXTRAS)] into .venv (the first time takes a minute or two)"
	$(BIN)/python -P -m pip install -qq --no-input -c constraints.txt -e '.[$(EXTRAS)]'
	# mediapipe brings a second OpenCV into the same folder, one that needs a display's libraries.
	$(BIN)/python -P -m pip install -qq --no-input -c constraints.txt --no-deps --force-reinstall opencv-python-headless
	touch $@ $(HOLDS)

# An environment of its own: PaddleOCR insists on versions that the rest does not use, and torch is large.
# Where pip finds torch with CUDA, PIP_EXTRA_INDEX_URL with the address of its builds for CPUs spares gigabytes.
.make/test-engines: setup.cfg constraints-engines.txt .venv-engines/pyvenv.cfg
	@mkdir -p .make
	echo "Installing inferq[test-engines] into .venv-engines (the first time takes two minutes)"
	.venv-engines/bin/python -m pip install -qq --no-input -c constraints-engines.txt -e '.[test-engines]'
	touch $@

# One for the generator of a client, which does not fit beside today's typer.
.make/client: constraints-client.txt .venv-client/pyvenv.cfg
	@mkdir -p .make
	echo "Installing openapi-python-client into .venv-client (the first time takes some seconds)"
	.venv-client/bin/python -m pip install -qq --no-input -c constraints-client.txt openapi-python-client
	touch $@

# One for the checks of k8s/, whose packages do not fit beside ours.
.make/k8s: constraints-k8s.txt .venv-k8s/pyvenv.cfg
	@mkdir -p .make
	echo "Installing checkov and schemas of Kubernetes into .venv-k8s (the first time takes a minute)"
	.venv-k8s/bin/python -m pip install -qq --no-input -c constraints-k8s.txt checkov kubernetes-validate \
		cloudcoil-models-cert-manager cloudcoil-models-keda cloudcoil-models-prometheus-operator
	touch $@

# Two more, without an engine, made anew for another Python. uv resolves to the lowest versions; pip cannot.
.make/test-lowest-$(PYTHON_STAMP): RESOLUTION := lowest-direct
.make/test-newest-$(PYTHON_STAMP): RESOLUTION := highest
.make/test-lowest-$(PYTHON_STAMP) .make/test-newest-$(PYTHON_STAMP): .make/test-%-$(PYTHON_STAMP): \
		setup.cfg pyproject.toml | $(if $(filter $(BIN)/python,$(PYTHON)),.venv/pyvenv.cfg)
	@mkdir -p .make
	echo "Installing the $* releases for inferq[up,test] into .venv-$* (the first time takes a minute)"
	rm -rf .venv-$* .make/test-$*-*
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -qq --no-input -c constraints.txt uv
	.venv-$*/bin/uv pip install -q --python .venv-$*/bin/python --resolution $(RESOLUTION) -e '.[up,test]'
	touch $@

.venv-engines/pyvenv.cfg .venv-client/pyvenv.cfg .venv-k8s/pyvenv.cfg: | .venv/pyvenv.cfg
	@$(BIN)/python -m venv $(@D)

define SUDO_OR_SAY
may_install() { [ "$$(id -u)" = 0 ] && as_root() { "$$@"; } || { sudo -n true 2>/dev/null && as_root() { sudo -n "$$@"; }; }; }
apt() {
	if ! command -v apt-get >/dev/null || ! may_install; then
		echo "Not installed here, and this user may not install them: $$*" >&2
		echo "Please run:  sudo apt-get install -y --no-install-recommends $$*" >&2
		exit 1
	fi
	echo "Installing with apt-get: $$*"
	mkdir -p .make
	# The packages would start and enable services; inferq starts private ones, and only those.
	local policy=/usr/sbin/policy-rc.d
	if [ ! -e $$policy ]; then
		trap "as_root rm -f $$policy" EXIT
		printf '#!/bin/sh\nexit 101\n' | as_root tee $$policy >/dev/null
		as_root chmod 755 $$policy
	fi
	if ! { as_root apt-get update -qq && as_root env DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends "$$@"; } >.make/apt.log 2>&1; then
		tail -n 15 .make/apt.log >&2
		echo "apt-get failed (its output is in .make/apt.log). Please install: $$*" >&2
		exit 1
	fi
	if [ -d /run/systemd/system ]; then
		for package in "$$@"; do
			as_root systemctl disable --quiet "$$package" 2>/dev/null || true
		done
	fi
}
endef

.venv/pyvenv.cfg:
	@$(SUDO_OR_SAY)
	fits() { "$$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; }
	find_python() { for python in python3 python3.11 python3.12; do if fits $$python; then echo $$python; return; fi; done; }
	python=$$(find_python)
	if [ -z "$$python" ]; then
		apt python3 python3-venv
		python=$$(find_python)
	fi
	if [ -z "$$python" ]; then
		echo "Python 3.11 or 3.12 is needed; python3 here is $$(python3 --version 2>&1). Please install python3.11 and its venv module." >&2
		exit 1
	fi
	if ! $$python -c 'import ensurepip' 2>/dev/null; then
		apt $$(basename $$(readlink -f $$(command -v $$python)))-venv
	fi
	echo "Making .venv with $$($$python --version)"
	rm -rf .venv
	$$python -m venv .venv

# Looked at every time: it costs nothing, and a stamp would not notice a package that was removed.
system:
	@$(SUDO_OR_SAY)
	missing=()
	if [ -z "$${INFERQ_AMQP_URL:-}" ] || [ "$(filter demo test test-lowest test-newest chaos chaos-quick scale-in compose-check bench,$(MAKECMDGOALS))" ]; then
		compgen -G '/usr/lib/rabbitmq/bin/rabbitmq-server' >/dev/null \
			|| compgen -G '/usr/lib/rabbitmq/lib/*/sbin/rabbitmq-server' >/dev/null \
			|| [ -x "$${RABBITMQ_HOME:-/opt/rabbitmq}/sbin/rabbitmq-server" ] || missing+=(rabbitmq-server)
	fi
	if [ -z "$${INFERQ_REDIS_URL:-}" ] || [ "$(filter demo test test-lowest test-newest chaos chaos-quick scale-in compose-check bench,$(MAKECMDGOALS))" ]; then
		command -v redis-server >/dev/null || command -v valkey-server >/dev/null || missing+=(redis-server)
	fi
	if [ $${#missing[@]} -gt 0 ]; then apt "$${missing[@]}"; fi

# Debian's packages, unpacked into .make: no service starts and no root is needed. Without a mirror, the tests that
# need them are skipped.
define UNPACK_OR_SAY
unpack() {  # NAME PACKAGE [MORE...]: those after the first may be missing
	local work options
	echo "Fetching $$1 with apt-get, without installing it"
	mkdir -p .make
	work=$$(mktemp -d .make/$$1.XXXXXX)
	trap "rm -rf $$work" EXIT
	mkdir -p "$$work"/{lists,archives}/partial "$$work/tree"
	options=(-qq -o Dir::State::lists="$$PWD/$$work/lists" -o Dir::Cache="$$PWD/$$work" -o APT::Sandbox::User= \
		-o Acquire::Retries=1 -o Acquire::http::Timeout=10 -o Acquire::https::Timeout=10)
	fetch() {
		cd "$$work" && apt-get "$${options[@]}" update && \
		apt-get "$${options[@]}" download "$$1" && \
		{ [ $$# = 1 ] || apt-get "$${options[@]}" download "$${@:2}" || true; } && \
		for package in *.deb; do dpkg -x "$$package" tree || return; done && \
		rm -rf tree/usr/share/javascript/moment-timezone/data/unpacked  # 150 MB
	}
	if ! command -v apt-get >/dev/null || ! (fetch "$${@:2}") >.make/$$1.log 2>&1; then
		echo "$$1 could not be fetched (see .make/$$1.log). Tests that need it are skipped; to run them, put it on PATH." >&2
		exit 0
	fi
	rm -rf .make/$$1
	mv "$$work/tree" .make/$$1
}
endef

# promtool, and Prometheus for `make observe`. The other packages hold what its web pages load.
PROMETHEUS_PAGES := fonts-glyphicons-halflings $(addprefix libjs-,bootstrap4 d3 eonasdan-bootstrap-datetimepicker \
	jquery jquery-hotkeys moment moment-timezone mustache popper.js rickshaw)
prometheus:
	@$(UNPACK_OR_SAY)
	if [ -x .make/prometheus/usr/bin/promtool ] || { command -v promtool && command -v prometheus; } >/dev/null; then exit 0; fi
	unpack prometheus prometheus $(PROMETHEUS_PAGES)

nginx:
	@$(UNPACK_OR_SAY)
	if [ -x .make/nginx/usr/sbin/nginx ] || [ -x /usr/sbin/nginx ] || command -v nginx >/dev/null; then exit 0; fi
	unpack nginx nginx

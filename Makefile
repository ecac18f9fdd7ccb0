# The commands of this repository. `make` alone lists them.

PORT ?= 8000
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
PYTEST := $(BIN)/pytest -n 2
INSTALLED := .venv/installed

# What `check --deploy` judges: the settings as they are in production.
PRODUCTION := DEBUG=0 SECRET_KEY=$$($(BIN)/python -c 'import secrets; print(secrets.token_urlsafe(50))') \
	ALLOWED_HOSTS=chat.example DATABASE_URL=sqlite://:memory:

.DELETE_ON_ERROR:
.PHONY: help demo test check unit backends e2e frontend frontend-test install format upgrade clean

help:  ## List the commands
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

demo: export DEBUG = 1
demo: frontend  ## Serve the chat with sample accounts on 127.0.0.1 (PORT=8000)
	@$(BIN)/python manage.py migrate --verbosity 0
	@$(BIN)/python manage.py seed_demo --url http://127.0.0.1:$(PORT)/
	@$(BIN)/daphne --verbosity 0 --bind 127.0.0.1 --port $(PORT) chatproject.asgi:application

test: frontend-test unit backends e2e  ## Run all tests

unit: frontend
	$(PYTEST) tests/unit tests/integration

backends: frontend
	CHAT_TEST_BACKEND=pubsub $(PYTEST) -m backends tests/integration
	CHAT_TEST_BACKEND=core $(PYTEST) -m backends tests/integration

e2e: frontend  ## Run the tests in a real browser and with real processes
	$(PYTEST) tests/e2e $(wildcard tests/faults)

check: install  ## Lint, check types, imports, settings and migrations
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PRODUCTION) $(BIN)/python manage.py check --deploy --fail-level WARNING
	$(PRODUCTION) $(BIN)/python manage.py makemigrations --check --dry-run

format:  ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)  ## Make .venv and install everything into it

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

frontend: install  ## Build the front end, if its sources changed
	@$(BIN)/python hatch_build.py

frontend-test: frontend
	@$(BIN)/python -c 'import hatch_build; hatch_build.install(); hatch_build.npm("test")'

upgrade:  ## Pin the newest versions that fit
	rm -rf .cache/upgrade
	$(PYTHON) -m venv .cache/upgrade
	.cache/upgrade/bin/pip install --quiet '.[dev]'
	.cache/upgrade/bin/pip freeze --exclude streaming-chat > constraints.txt

clean:  ## Remove what was built; keep the database
	rm -rf .venv .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist staticfiles
	rm -rf frontend/node_modules tests/e2e/node_modules streaming_chat/static/streaming_chat

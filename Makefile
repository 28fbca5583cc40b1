# The two commands for everybody: `make demo` and `make test`. The rest is for people who change the project.
PYTHON ?= python3
PORT ?= 5000
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP_FILES := settings.ini setup.py constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
README := $(BIN)/jupyter nbconvert nbs/index.ipynb --to markdown --log-level ERROR \
	--RegexRemovePreprocessor.patterns='\#\|\s*hide' --TagRemovePreprocessor.enabled=True \
	--TagRemovePreprocessor.remove_input_tags=hide-input --stdout | sed 's,](images/,](nbs/images/,'

.PHONY: demo test check lint coverage audit lab train docs benchmark prepare clean help

help:  ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.serve  ## the demo and the API on port 5000, with the models in models/ (PORT=5001 for another)
	$(BIN)/genre_nb serve --port $(PORT)

test: $(VENV)/.all check  ## every notebook and every test, and whether package and README are fresh
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python -m pytest tests

check: $(VENV)/.all  ## fails if genre_nb/, notebook metadata or README.md is not what the notebooks give
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT \
	&& cp -R nbs genre_nb settings.ini "$$fresh" && find "$$fresh" -name __pycache__ -prune -exec rm -rf {} + \
	&& (cd "$$fresh" && "$(CURDIR)/$(BIN)/nbdev_export" && "$(CURDIR)/$(BIN)/nbdev_clean") \
	&& $(README) > "$$fresh/README.md" \
	&& diff -r -q -x __pycache__ -x .ipynb_checkpoints genre_nb "$$fresh/genre_nb" \
	&& diff -r -q -x .ipynb_checkpoints nbs "$$fresh/nbs" && diff -q README.md "$$fresh/README.md" \
	&& echo "genre_nb/, notebooks and README.md are fresh" \
	|| { echo "Stale files: run 'make prepare' and commit what it changes."; exit 1; }

lint: $(VENV)/.all  ## types and style; `make test` looks at them, too
	$(BIN)/python -m mypy
	$(BIN)/python -m ruff check .

# Copies of the notebooks that use the package (tests/exported_notebooks.py says why), one at a time in the process that is
# measured; programs that they start are measured, too, unless they are killed.
coverage: $(VENV)/.all  ## which lines of genre_nb/ the notebooks and the tests run; at least 90 % must be
	$(BIN)/python -m coverage erase
	$(BIN)/python tests/exported_notebooks.py $(VENV)/notebooks
	for notebook in $(VENV)/notebooks/*.ipynb; do \
		OMP_NUM_THREADS=1 $(BIN)/python -m coverage run $(BIN)/nbdev_test --n_workers 0 --path $$notebook || exit 1; done
	$(BIN)/python -m coverage run -m pytest tests
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --fail-under 90

audit:  ## known weaknesses of the pinned packages; says plainly if it could not ask
	test -d $(VENV)/audit || { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/pip install --quiet 'pip-audit==2.10.1'; }
	@report=$$($(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt --progress-spinner off 2>&1); \
	code=$$?; echo "$$report" | tail -n 40; \
	case "$$report" in *CVE-*|*GHSA-*|*PYSEC-*) exit 1;; esac; \
	if [ $$code -ne 0 ]; then echo "NOT CHECKED: the list of known weaknesses could not be reached from here."; exit 2; fi

lab: $(VENV)/.all  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

train: $(VENV)/.all  ## every model on the data at hand
	$(BIN)/genre_nb train --all

benchmark: $(VENV)/.all  ## time and memory beside a peer
	$(BIN)/genre_nb benchmark

prepare: $(VENV)/.all  ## before a commit: export, clean, README
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(README) > README.md

docs: $(VENV)/.all  ## chapters, how-tos and reference as pages to search and browse, in _docs/
	$(BIN)/python docs/build.py

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist _docs _proc *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .coverage*

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make demo PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	touch $@

# The demo needs no torch: models were exported to formats that run without it.
$(VENV)/.serve: $(VENV)/.created $(SETUP_FILES)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[serve]'
	touch $@

# torch first and exactly, or pip takes a CUDA build of several GB. fastai asks for torchvision, which this project never
# uses: where its build does not fit torch it fails to import and takes transformers down with it, so it goes.
# blurr (ohmeow-blurr) can't be resolved beside current torch, hence --no-deps.
$(VENV)/.all: $(VENV)/.created $(SETUP_FILES)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) install --quiet --constraint constraints.txt --editable '.[serve,train,notebooks,docs,dev]'
	$(BIN)/python -c 'import torchvision' 2>/dev/null || $(PIP) uninstall --quiet --yes torchvision
	$(PIP) install --quiet --no-deps 'ohmeow-blurr==1.0.5'
	touch $@ $(VENV)/.serve

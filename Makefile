# Shortcuts for contributors. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help install test slow lint types docs demo gate

help: ## list the targets
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1 \2/p' $(MAKEFILE_LIST) | awk '{ name = $$1; $$1 = ""; printf "  %-9s%s\n", name, $$0 }'

install: ## install ctxlens for development, with the tested versions
	pip install -c constraints.txt -e ".[dev]"

test: ## run the tests
	pytest -n 2 --dist loadfile

slow: ## run the tests, including those that take minutes
	pytest --slow -n 2 --dist loadfile

lint: ## check style and formatting
	ruff check .
	ruff format --check .

types: ## check types
	pyright

docs: ## build the documentation into site/; any warning is an error
	mkdocs build --strict

demo: ## run the demo at its smoke size, into build/demo
	ctxlens demo --smoke --overwrite --out build/demo

gate: ## run everything that a change has to pass, in a fresh environment
	.ci/run

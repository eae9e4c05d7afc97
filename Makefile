.PHONY: lint test bench
lint:
	ruff check . && ruff format --check . && pyright
test:
	pytest
bench:
	python benchmarks/run.py
